"""Register as a stage: once, with one challenger, and with everything that a version holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.keys import make_key

from components.adapters.mlflow_registry import DAMAGED, Registry
from components.adapters.mlflow_tracking import connect
from components.digest import digest_file
from components.errors import ConfigError, GateError
from components.register.provenance import DOWNLOADED, read_provenance
from components.settings import load_settings
from tasks.register import register
from tasks.smoke_test import smoke_test


def test_registering_twice_gives_one_version(bench: Any, export_of: Callable[..., Any]) -> None:
    exported = export_of("once")
    first, second = register.fn(exported), register.fn(exported)
    assert (first.created, second.created) == (True, False)
    assert first.version == second.version
    assert bench.aliases("once") == {"challenger": first.version}
    assert list(bench.versions("once")) == [first.version]


def test_version_lies_in_the_experiment_of_its_pipeline(
    bench: Any, export_of: Callable[..., Any]
) -> None:
    registered = register.fn(export_of("once"))
    (run,) = bench.runs("once")
    model = bench.client.get_logged_model(registered.source.removeprefix("models:/"))
    assert model.experiment_id == run.info.experiment_id
    assert model.source_run_id == run.info.run_id
    assert model.artifact_location.startswith((bench.home / "mlflow").as_uri())


def test_signature_and_requirements_are_for_any_consumer(
    bench: Any, export_of: Callable[..., Any]
) -> None:
    import mlflow.models

    registered = register.fn(export_of("once"))
    info = mlflow.models.get_model_info(f"models:/once/{registered.version}")
    columns = [(each["name"], each["type"]) for each in info.signature.inputs.to_dict()]
    assert columns == [("a", "double"), ("b", "double"), ("c", "double")]
    folder = bench.client.get_model_version_download_uri("once", str(registered.version))
    requirements = mlflow.artifacts.load_text(f"{folder}/requirements.txt").split()
    names = {line.split("==")[0] for line in requirements}
    assert "onnxruntime" in names
    assert not names & {"onnxruntime-gpu", "torch", "assay", "prefect"}
    assert all("==" in line for line in requirements)


def downloaded(model: str, version: int, into: Path) -> Path:
    """The version's folder."""
    into.mkdir()
    return Registry(connect(load_settings()), model).download(version, into).parent


def test_a_version_holds_what_anyone_asks_of_it(
    bench: Any, export_of: Callable[..., Any], tmp_path: Path
) -> None:
    exported = export_of("once")
    registered = register.fn(exported)
    folder = downloaded("once", registered.version, tmp_path / "into")
    assert digest_file(folder / "model.onnx") == exported.onnx.sha256
    assert digest_file(folder / "golden.npz") == exported.golden.sha256
    card = (folder / "model_card.md").read_text()
    assert card.startswith("# once\n")
    held = bench.client.get_model_version("once", str(registered.version))
    assert held.description
    assert card.startswith(held.description.partition("\n\n*The whole card")[0])
    plots = {path.name for path in (folder / "plots").iterdir()}
    assert {"gradients.png", "loss.png"} <= plots
    assert all((folder / "plots" / name).read_bytes()[:4] == b"\x89PNG" for name in plots)
    environment = (folder / "environment.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in environment]
    assert names == sorted({*names}) >= ["accelerate"]
    assert {"torch", "onnx", "mlflow", "assay"} <= {*names}
    assert "://" not in "".join(environment)
    provenance = read_provenance(folder)
    assert not isinstance(provenance, str)
    job = exported.validated.trained.job
    assert (provenance.model, provenance.run_id) == ("once", exported.validated.trained.run_id)
    assert provenance.data_fingerprint == job.data_fingerprint
    assert provenance.code_revision == job.code_revision
    assert str(bench.home) not in "".join(
        path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()
    ).replace((folder / DOWNLOADED).read_text(), "")
    assert registered.signed is False


def test_a_signed_version_is_proved_and_an_unsigned_one_registered_anew(
    bench: Any, export_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A key that is configured later leaves the unsigned version behind."""
    key = make_key()
    exported = export_of("once")
    unsigned = register.fn(exported)
    assert (unsigned.signed, bool(smoke_test.fn(unsigned).golden_rows)) == (False, True)
    monkeypatch.setenv("ASSAY_SIGNING_KEY", key.private)
    connect.cache_clear()
    with pytest.raises(GateError, match="assay.sig is missing"):
        smoke_test.fn(register.fn(exported))
    assert DAMAGED in bench.versions("once")[unsigned.version]
    signed = register.fn(exported)
    assert signed.signed
    assert signed.version > unsigned.version
    assert (downloaded("once", signed.version, tmp_path / "into") / "assay.sig").is_file()
    smoke_test.fn(signed)
    monkeypatch.setenv("ASSAY_SIGNING_KEY", make_key().private)
    with pytest.raises(GateError, match="Key mismatch") as raised:
        smoke_test.fn(signed)
    assert "PRIVATE" not in str(raised.value)


def test_a_broken_key_makes_no_version(
    bench: Any, export_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export_of("once", "epochs=1")
    before = set(bench.versions("once"))
    monkeypatch.setenv("ASSAY_SIGNING_KEY", "-----BEGIN PRIVATE KEY-----hunter2")
    with pytest.raises(ConfigError, match="ASSAY_SIGNING_KEY must be") as raised:
        register.fn(exported)
    assert "hunter2" not in str(raised.value)
    assert set(bench.versions("once")) == before
