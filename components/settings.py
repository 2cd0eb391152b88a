"""Every setting of assay, read in one place.

Order of precedence: arguments, environment (prefix ``ASSAY_``), ``.env`` in the working directory,
a secrets directory, then further sources such as a Prefect block. Secrets stay wrapped until the
call that needs them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from components.errors import ConfigError

PREFIX = "ASSAY_"


class Settings(BaseSettings):
    """Where state lives, and how MLflow and Prefect are reached."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    home: Path = Field(Path(".assay"), description="folder of all local state")
    mlflow_tracking_uri: str = Field(
        "", description="MLflow server; empty uses SQLite below the state folder"
    )
    mlflow_username: str = Field("", description="user name for the MLflow server")
    mlflow_password: SecretStr = Field(SecretStr(""), description="password for the MLflow server")
    mlflow_token: SecretStr = Field(SecretStr(""), description="bearer token for the MLflow server")
    mlflow_timeout_s: float = Field(10.0, gt=0, description="seconds to wait for MLflow to answer")
    prefect_api_url: str = Field(
        "", description="Prefect server; empty starts an embedded one. PREFECT_API_URL outranks it"
    )
    prefect_port: int = Field(
        0, ge=0, le=65535, description="port of the embedded Prefect server; 0 takes a free one"
    )
    prefect_timeout_s: float = Field(
        120.0, gt=0, description="seconds to wait for the embedded Prefect server"
    )
    database_url: SecretStr = Field(
        SecretStr(""), description="SQLAlchemy URL of the database that SQL sources read"
    )
    checkpoint_root: str = Field(
        "", description="folder or fsspec URL of checkpoints; empty is below the state folder"
    )
    snapshot_root: str = Field(
        "", description="folder or fsspec URL of snapshots; empty is below the state folder"
    )
    checkpoint_every_s: float = Field(
        60.0, gt=0, description="seconds between checkpoints within an epoch"
    )
    train_deployment: str = Field(
        "", description="deployment that retrain sends training to, as train/gpu; empty trains here"
    )
    credentials_block: str = Field(
        "", description="name of a Prefect block of type Assay Credentials to read settings from"
    )
    ray_address: str = Field(
        "", description="Ray cluster for workers > 1; empty starts the workers on this machine"
    )
    signing_key: SecretStr = Field(
        SecretStr(""), description="private key (PEM, or the path of one) that signs versions"
    )
    trusted_signer: str = Field(
        "", description="public key (PEM, or its path) of signatures; else the signing key's"
    )
    smoke_engines: str = Field(
        "", description="further engines to prove: reference, openvino, node, chromium"
    )
    node_modules: str = Field(
        "", description="folder node_modules with onnxruntime-node and onnxruntime-web"
    )
    secrets_dir: str = Field("", description="folder with one file per setting, named ASSAY_...")

    @field_validator("smoke_engines")
    @classmethod
    def _known_engines(cls, value: str) -> str:
        from components.smoke_test.engines.installed import parse_engines

        parse_engines(value)
        return value

    @property
    def root(self) -> Path:
        """The state folder as an absolute path."""
        return self.home.expanduser().resolve()


def load_settings(blocks: Mapping[str, Any] | None = None, **arguments: Any) -> Settings:
    """Read the settings.

    Args:
        blocks: Values of a Prefect block by setting name; they rank last.
        arguments: Values that outrank every source.

    Raises:
        ConfigError: A setting has the wrong type or is outside its range, the secrets directory is
            absent, or ``.env`` is not text.
    """
    try:
        settings = _read(blocks or {}, arguments, secrets_dir=None)
        if not settings.secrets_dir:
            return settings
        if not Path(settings.secrets_dir).is_dir():
            raise ConfigError(
                f"{PREFIX}SECRETS_DIR must name a folder; got {settings.secrets_dir!r}. Create it "
                "or unset it."
            )
        return _read(blocks or {}, arguments, secrets_dir=settings.secrets_dir)
    except ValidationError as error:
        raise ConfigError(describe_validation(error, PREFIX)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f".env and secrets must be text in UTF-8; got a byte that is not: {error.reason} at "
            f"position {error.start}. Save the file anew."
        ) from None


def _read(
    blocks: Mapping[str, Any], arguments: Mapping[str, Any], secrets_dir: str | None
) -> Settings:
    class WithSources(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            last = InitSettingsSource(settings_cls, init_kwargs=dict(blocks))
            return (init_settings, env_settings, dotenv_settings, file_secret_settings, last)

    found = WithSources(_secrets_dir=secrets_dir, **arguments)
    # Every call makes a class of its own; settings must be of one class to be equal.
    return Settings.model_construct(
        **{name: getattr(found, name) for name in Settings.model_fields}
    )


def describe_validation(error: ValidationError, prefix: str = "") -> str:
    """One sentence per wrong field, naming field, rule and (except for secrets) what arrived."""
    sentences = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        name = prefix + name.upper() if prefix else name
        secret = isinstance(item.get("input"), SecretStr) or any(
            word in name.lower() for word in ("password", "token", "secret", "key")
        )
        if not item["loc"]:  # several settings that do not fit together say so themselves
            sentences.append(item["msg"].removeprefix("Value error, "))
            continue
        got = "" if secret else f"; got {item.get('input')!r}"
        sentences.append(f"{name}: {item['msg'].lower()}{got}")
    return "; ".join(sentences) + "."


def hide_credentials(text: str) -> str:
    """The text with the user and password of every address in it hidden."""
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)


def setting_sources(environ: Mapping[str, str], env_file: Path) -> dict[str, str]:
    """Say for each setting which source gives it, never its value."""
    given = _upper(environ)
    in_file = _upper(dotenv_values(env_file))
    directory = given.get(PREFIX + "SECRETS_DIR") or in_file.get(PREFIX + "SECRETS_DIR")
    sources = {}
    for name in Settings.model_fields:
        variable = PREFIX + name.upper()
        if variable in given:
            sources[name] = "environment"
        elif variable in in_file:
            sources[name] = ".env"
        elif directory and _secret_exists(Path(directory), variable):
            sources[name] = "secrets directory"
        else:
            sources[name] = "default"
    return sources


def _upper(values: Mapping[str, str | None]) -> dict[str, str]:
    """Names are read whatever their case; an empty value is none."""
    return {name.upper(): value for name, value in values.items() if value}


def _secret_exists(directory: Path, variable: str) -> bool:
    return any(p.name.upper() == variable for p in directory.glob("*") if p.is_file())
