"""The smoke test as a stage: registered bytes that changed on disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from components.errors import GateError, InfrastructureError
from components.export.config import Budget, Release
from components.pipeline import Pipeline, load_pipeline
from components.settings import load_settings
from tasks.decide import decide
from tasks.promotion import promote
from tasks.register import register
from tasks.release import proving
from tasks.smoke_test import smoke_test


def registered_file(bench: Any, model: str, version: int) -> Path:
    """Where the file of a version lies."""
    uri = bench.client.get_model_version_download_uri(model, str(version))
    return Path(urlparse(uri).path) / "model.onnx"


def flip_a_bit(path: Path) -> bytes:
    """Change one bit of the weights and return what the file held."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    return content


def test_version_whose_bytes_changed_is_rejected(bench: Any, export_of: Callable[..., Any]) -> None:
    champion = decide.fn(smoke_test.fn(register.fn(export_of("tampered"))))
    assert champion.decision == "promoted"
    first = champion.tested.registered.version

    registered = register.fn(export_of("tampered", "epochs=3"))
    assert registered.version != first
    assert bench.aliases("tampered") == {"champion": first, "challenger": registered.version}
    path = registered_file(bench, "tampered", registered.version)
    assert path.is_relative_to(bench.home)
    content = flip_a_bit(path)

    with pytest.raises(GateError, match="sha256") as raised, proving(registered):
        smoke_test.fn(registered)
    assert raised.value.stage == "smoke_test"
    assert raised.value.rejection is not None
    assert bench.aliases("tampered") == {"champion": first}
    tags = bench.versions("tampered")[registered.version]
    assert tags["decision"] == "rejected"
    assert tags["reason"] == str(raised.value)
    assert bench.versions("tampered")[first]["decision"] == "promoted"
    run = bench.client.get_run(registered.exported.validated.trained.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["assay.decision"] == "rejected"

    again = register.fn(registered.exported)  # from the run's own artifacts, which are intact
    assert (again.version, again.created) == (registered.version + 1, True)
    decision = decide.fn(smoke_test.fn(again))
    assert decision.decision in ("promoted", "kept_champion")
    assert "challenger" not in bench.aliases("tampered")
    assert bench.versions("tampered")[again.version]["decision"] == decision.decision
    assert bench.versions("tampered")[registered.version]["decision"] == "rejected"
    assert path.read_bytes() != content, "what was damaged stays as evidence"


def test_champion_whose_bytes_changed_is_not_compared_with(
    bench: Any, export_of: Callable[..., Any]
) -> None:
    champion = decide.fn(smoke_test.fn(register.fn(export_of("staged"))))
    before = bench.aliases("staged")["champion"]
    tested = smoke_test.fn(register.fn(export_of("staged", "epochs=3")))
    path = registered_file(bench, "staged", champion.champion)
    content = flip_a_bit(path)
    try:
        with (
            pytest.raises(
                InfrastructureError, match=f"version {champion.champion}: model.onnx must"
            ),
            proving(tested.registered),
        ):
            decide.fn(tested)
        assert bench.aliases("staged") == {"champion": before}
        version = tested.registered.version
        assert bench.versions("staged")[version]["rejected_by"] == "failure"
        # It is the champion that was at fault, so a person may promote the candidate.
        promote(load_settings(), "staged", version, "the champion is damaged")
        assert bench.aliases("staged") == {"champion": version}
    finally:
        path.write_bytes(content)
    decide.fn(tested)
    assert set(bench.aliases("staged")) == {"champion"}


def test_version_over_the_budget_is_rejected(
    bench: Any, export_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(p99_ms=1e-6, rows_per_s=1e15)

    def with_budget(name: str) -> Pipeline:
        return replace(load_pipeline(name), release=Release(budget=budget))

    registered = register.fn(export_of("costly"))
    with monkeypatch.context() as patch:
        patch.setattr("tasks.proof.load_pipeline", with_budget)
        with (
            pytest.raises(GateError, match="must stay below 1e-06 ms") as raised,
            proving(registered),
        ):
            smoke_test.fn(registered)
    assert "at least 1e+15 rows a second" in str(raised.value)
    assert bench.aliases("costly") == {}
    latency = smoke_test.fn(registered).latency
    assert 0 < latency.p50_ms <= latency.p95_ms <= latency.p99_ms
    assert latency.rows_per_s > 0
