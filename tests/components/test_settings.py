"""Settings: precedence of the sources, refusals that keep secrets, and the sample file."""

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, TypeAdapter, ValidationError

from components.errors import ConfigError
from components.settings import (
    PREFIX,
    Settings,
    describe_validation,
    load_settings,
    setting_sources,
)

HIDDEN = "hunter2"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put_secret(folder: Path, name: str, value: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{PREFIX}{name.upper()}").write_text(value)


def test_defaults_need_no_server() -> None:
    settings = load_settings()
    assert (settings.mlflow_tracking_uri, settings.prefect_api_url) == ("", "")
    assert settings.root == Path.cwd() / ".assay"


def test_reading_settings_touches_nothing(tmp_path: Path) -> None:
    load_settings(home=tmp_path / "home")
    assert list(tmp_path.iterdir()) == []


def test_the_home_of_the_user_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/someone")
    assert load_settings(home="~/assay").root == Path("/srv/someone/assay")


def test_sources_rank_in_the_declared_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, secrets = "mlflow_username", tmp_path / "secrets"
    found = [load_settings().mlflow_username]
    blocks = {name: "block"}
    found.append(load_settings(blocks).mlflow_username)
    put_secret(secrets, name, "secrets")
    monkeypatch.setenv("ASSAY_SECRETS_DIR", str(secrets))
    found.append(load_settings(blocks).mlflow_username)
    Path(".env").write_text("ASSAY_MLFLOW_USERNAME=file\n")
    found.append(load_settings(blocks).mlflow_username)
    monkeypatch.setenv("ASSAY_MLFLOW_USERNAME", "environment")
    found.append(load_settings(blocks).mlflow_username)
    found.append(load_settings(blocks, mlflow_username="argument").mlflow_username)
    assert found == ["", "block", "secrets", "file", "environment", "argument"]


@pytest.mark.parametrize("source", ["environment", ".env", "argument"])
def test_the_secrets_folder_may_be_named_by_any_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    put_secret(tmp_path / "secrets", "mlflow_token", HIDDEN)
    arguments: dict[str, Any] = {}
    match source:
        case "environment":
            monkeypatch.setenv("ASSAY_SECRETS_DIR", "secrets")
        case ".env":
            Path(".env").write_text("ASSAY_SECRETS_DIR=secrets\n")
        case "argument":
            arguments["secrets_dir"] = "secrets"
    assert load_settings(**arguments).mlflow_token.get_secret_value() == HIDDEN


def test_a_secrets_folder_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_SECRETS_DIR", "absent")
    with pytest.raises(ConfigError, match="ASSAY_SECRETS_DIR must name a folder; got 'absent'"):
        load_settings()


def test_an_empty_variable_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("ASSAY_PREFECT_PORT=4200\n")
    monkeypatch.setenv("ASSAY_PREFECT_PORT", "")
    assert load_settings().prefect_port == 4200


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("prefect_port", "many", "got 'many'"),
        ("prefect_port", "65536", "less than or equal to 65535; got '65536'"),
        ("prefect_timeout_s", "0", "greater than 0; got '0'"),
        ("mlflow_timeout_s", "soon", "got 'soon'"),
    ],
)
@pytest.mark.parametrize("source", ["environment", ".env", "secrets", "block"])
def test_an_ill_typed_value_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str, value: str, words: str
) -> None:
    variable, blocks = f"{PREFIX}{name.upper()}", {}
    match source:
        case "environment":
            monkeypatch.setenv(variable, value)
        case ".env":
            Path(".env").write_text(f"{variable}={value}\n")
        case "secrets":
            put_secret(tmp_path / "secrets", name, value)
            monkeypatch.setenv("ASSAY_SECRETS_DIR", "secrets")
        case "block":
            blocks[name] = value
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_settings(blocks)
    assert str(caught.value).startswith(f"{variable}: ")


def test_all_faults_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_PREFECT_PORT", "x")
    monkeypatch.setenv("ASSAY_MLFLOW_TIMEOUT_S", "y")
    with pytest.raises(ConfigError, match="ASSAY_PREFECT_PORT") as caught:
        load_settings()
    assert "ASSAY_MLFLOW_TIMEOUT_S" in str(caught.value)


def test_a_file_that_is_no_text_is_refused() -> None:
    Path(".env").write_bytes(b"ASSAY_MLFLOW_USERNAME=\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"\.env"):
        load_settings()


@pytest.mark.parametrize("name", ["mlflow_password", "mlflow_token"])
@pytest.mark.parametrize("value", [[HIDDEN], {"value": HIDDEN}, HIDDEN.encode() + b"\xff"])
def test_a_refused_secret_is_not_shown(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{PREFIX}{name.upper()}") as caught:
        load_settings(**{name: value})
    assert HIDDEN not in "".join(traceback.format_exception(caught.value))


def test_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"ASSAY_MLFLOW_{name}", HIDDEN)
    settings = load_settings()
    shown = [repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())]
    assert all(HIDDEN not in text for text in shown)
    assert settings.mlflow_password.get_secret_value() == HIDDEN


def test_every_field_that_sounds_secret_is_wrapped() -> None:
    sounding = {
        n
        for n in Settings.model_fields
        if re.search("password|token|api_key|signing_key|database_url", n)
    }
    wrapped = {n for n, f in Settings.model_fields.items() if f.annotation is SecretStr}
    assert sounding == wrapped != set()


def test_equal_settings_are_equal_and_hash_alike(tmp_path: Path) -> None:
    first, second = load_settings(home=tmp_path), load_settings(home=tmp_path)
    assert first == second
    assert hash(first) == hash(second)
    assert type(first) is Settings
    assert first != load_settings(home=tmp_path / "other")
    assert first != load_settings(home=tmp_path, mlflow_token=HIDDEN)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().home = Path("elsewhere")


def test_sources_are_named_and_values_are_not(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    put_secret(secrets, "mlflow_password", HIDDEN)
    put_secret(secrets, "mlflow_token", HIDDEN)
    Path(".env").write_text(
        "# ASSAY_HOME=commented\n"
        "ASSAY_MLFLOW_TOKEN=hunter2\n"
        "export ASSAY_MLFLOW_USERNAME='hunter2'\n"
        "ASSAY_PREFECT_API_URL=\n"
    )
    environ = {
        "ASSAY_SECRETS_DIR": str(secrets),
        "ASSAY_MLFLOW_TRACKING_URI": HIDDEN,
        "ASSAY_MLFLOW_USERNAME": "",
    }
    sources = setting_sources(environ, Path(".env"))
    assert list(sources) == list(Settings.model_fields)
    assert HIDDEN not in str(sources)
    assert {name: source for name, source in sources.items() if source != "default"} == {
        "mlflow_tracking_uri": "environment",
        "secrets_dir": "environment",
        "mlflow_token": ".env",
        "mlflow_username": ".env",
        "mlflow_password": "secrets directory",
    }


def test_sources_agree_with_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_secret(tmp_path / "secrets", "mlflow_username", "x")
    Path(".env").write_text("ASSAY_SECRETS_DIR=secrets\nASSAY_PREFECT_PORT=7 # a comment\n")
    monkeypatch.setenv("ASSAY_PREFECT_TIMEOUT_S", "3")
    settings = load_settings()
    sources = setting_sources({"assay_prefect_timeout_s": "3"}, Path(".env"))
    given = {n for n, f in Settings.model_fields.items() if getattr(settings, n) != f.default}
    assert given == {name for name, source in sources.items() if source != "default"}
    assert sources["mlflow_username"] == "secrets directory"


def test_sources_without_a_file_are_defaults(tmp_path: Path) -> None:
    assert set(setting_sources({}, tmp_path / ".env").values()) == {"default"}


def test_a_sentence_per_fault() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(dict[str, int]).validate_python({"a": "x", "api_token": HIDDEN})
    text = describe_validation(caught.value)
    assert text.count(";") == 2
    assert "got 'x'" in text
    assert "api_token: " in text
    assert HIDDEN not in text


def test_every_setting_says_what_it_is() -> None:
    assert [n for n, field in Settings.model_fields.items() if not field.description] == []


def test_the_sample_file_lists_every_setting_and_no_other(checkout: Path) -> None:
    text = (checkout / ".env.example").read_text(encoding="utf-8")
    listed = re.findall(rf"^#?\s*({PREFIX}[A-Z_]+)=", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(PREFIX + name.upper() for name in Settings.model_fields)


def test_the_sample_file_can_be_used_as_it_is(checkout: Path) -> None:
    Path(".env").write_text((checkout / ".env.example").read_text(encoding="utf-8"))
    settings = load_settings()
    assert not settings.mlflow_password.get_secret_value(), "a sample holds no secret"
    assert not settings.mlflow_token.get_secret_value(), "a sample holds no secret"


def test_settings_that_do_not_fit_together_say_so_themselves() -> None:
    from components.pipelines.digits import pipeline
    from components.plan import resolve_config

    with pytest.raises(ConfigError) as caught:
        resolve_config(pipeline, 0, ["workers=2", "shards=3"])
    said = str(caught.value)
    assert "is not valid: workers must divide shards" in said
    assert said.count("got") == 1
    assert "epochs" not in said
