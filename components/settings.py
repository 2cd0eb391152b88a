"""Every setting of assay, read in one place.

Order of precedence: arguments, environment (prefix ``ASSAY_``), ``.env`` in the working directory,
a secrets directory, then further sources such as a Prefect block. Secrets stay wrapped until the
call that needs them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError
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
    credentials_block: str = Field(
        "", description="name of a Prefect block of type Assay Credentials to read settings from"
    )
    secrets_dir: str = Field("", description="folder with one file per setting, named ASSAY_...")

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
        ConfigError: A setting has the wrong type or is outside its range.
    """
    directory = os.environ.get(PREFIX + "SECRETS_DIR") or None
    if directory is not None and not Path(directory).is_dir():
        raise ConfigError(
            f"{PREFIX}SECRETS_DIR must name a folder; got {directory!r}. Create it or unset it."
        )

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
            last = InitSettingsSource(settings_cls, init_kwargs=dict(blocks or {}))
            return (init_settings, env_settings, dotenv_settings, file_secret_settings, last)

    try:
        return WithSources(_secrets_dir=directory, **arguments)
    except ValidationError as error:
        raise ConfigError(describe_validation(error, PREFIX)) from None


def describe_validation(error: ValidationError, prefix: str = "") -> str:
    """One sentence per wrong field, naming field, rule and (except for secrets) what arrived."""
    sentences = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        name = prefix + name.upper() if prefix else name
        secret = isinstance(item.get("input"), SecretStr) or any(
            word in name.lower() for word in ("password", "token", "secret", "key")
        )
        got = "" if secret else f"; got {item.get('input')!r}"
        sentences.append(f"{name}: {item['msg'].lower()}{got}")
    return "; ".join(sentences) + "."


def setting_sources(environ: Mapping[str, str], env_file: Path) -> dict[str, str]:
    """Say for each setting which source gives it, never its value."""
    in_file = _names_in(env_file)
    directory = environ.get(PREFIX + "SECRETS_DIR", "")
    sources = {}
    for name in Settings.model_fields:
        variable = PREFIX + name.upper()
        if environ.get(variable):
            sources[name] = "environment"
        elif variable in in_file:
            sources[name] = ".env"
        elif directory and _secret_exists(Path(directory), variable):
            sources[name] = "secrets directory"
        else:
            sources[name] = "default"
    return sources


def _names_in(env_file: Path) -> Sequence[str]:
    if not env_file.is_file():
        return ()
    lines = env_file.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
    return [
        name.removeprefix("export ").strip().upper()
        for name, value in pairs
        if value.strip().strip("\"'")
    ]


def _secret_exists(directory: Path, variable: str) -> bool:
    return any(p.name.upper() == variable for p in directory.glob("*") if p.is_file())
