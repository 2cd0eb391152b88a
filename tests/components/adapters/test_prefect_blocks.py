"""The credentials block: what it holds, what it gives, and that Prefect keeps it masked."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from components.adapters.prefect_blocks import AssayCredentials
from components.adapters.prefect_runtime import load_block_settings
from components.errors import ConfigError
from components.settings import Settings, load_settings

HIDDEN = "hunter2"


@pytest.fixture
def block() -> AssayCredentials:
    return AssayCredentials(mlflow_tracking_uri="https://host:5000", mlflow_token=SecretStr(HIDDEN))


@pytest.fixture
def api(prefect_server: str) -> Iterator[str]:
    """The session's server, as the server of this process."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_server}):
        yield prefect_server


def ask(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_every_field_is_a_setting_of_the_same_type() -> None:
    names = ("mlflow", "signing", "trusted")
    fields = {n: f for n, f in AssayCredentials.model_fields.items() if n.startswith(names)}
    assert fields
    for name, field in fields.items():
        assert field.annotation is Settings.model_fields[name].annotation, name
        assert field.description, name


def test_every_secret_of_the_settings_can_be_held() -> None:
    secrets = {n for n, f in Settings.model_fields.items() if f.annotation is SecretStr}
    assert secrets <= AssayCredentials.model_fields.keys()


def test_only_what_is_filled_in_is_given(block: AssayCredentials) -> None:
    assert block.settings() == {
        "mlflow_tracking_uri": "https://host:5000",
        "mlflow_token": SecretStr(HIDDEN),
    }
    assert AssayCredentials().settings() == {}


def test_a_secret_stays_wrapped(block: AssayCredentials) -> None:
    shown = [repr(block), str(block), str(block.settings()), block.model_dump_json()]
    assert all(HIDDEN not in text for text in shown)


def test_a_block_ranks_below_the_environment(
    block: AssayCredentials, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(block.settings())
    assert settings.mlflow_tracking_uri == "https://host:5000"
    assert settings.mlflow_token.get_secret_value() == HIDDEN
    monkeypatch.setenv("ASSAY_MLFLOW_TRACKING_URI", "https://other")
    assert load_settings(block.settings()).mlflow_tracking_uri == "https://other"


@pytest.mark.server
def test_a_block_is_stored_masked_and_loaded_whole(block: AssayCredentials, api: str) -> None:
    block.save("mine", overwrite=True)
    documents = ask(f"{api}/block_documents/filter", {})
    (stored,) = [document for document in documents if document["name"] == "mine"]
    assert HIDDEN not in json.dumps(stored)
    assert stored["data"]["mlflow_tracking_uri"] == "https://host:5000"
    assert stored["block_type"]["slug"] == "assay-credentials"
    found = load_block_settings("mine")
    assert found == block.settings()
    assert HIDDEN not in str(found)


@pytest.mark.server
@pytest.mark.parametrize("name", ["absent", "../mine", ""])
def test_a_block_that_is_absent_is_the_users_to_create(name: str, api: str) -> None:
    with pytest.raises(ConfigError, match="ASSAY_CREDENTIALS_BLOCK must name a block"):
        load_block_settings(name)
