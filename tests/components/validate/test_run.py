"""Evidence is complete: a gate that cannot be evaluated fails, and the others still run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.gate_lab import PIPELINE, Candidate, Regression, World, metrics
from torch import Tensor

from components.errors import DataError, GateError
from components.pipeline import Scored
from components.validate import run


def test_metrics_that_raise_are_a_failure_beside_the_others(tmp_path: Path) -> None:
    def broken(scored: Scored) -> dict[str, float]:
        raise ZeroDivisionError("no rows")

    pipeline = replace(PIPELINE, metrics=broken)
    evidence = Candidate(pipeline=pipeline, world=World(shared_keys=2)).evidence(tmp_path)
    first, second = evidence.failures()
    assert first.startswith("quality: metrics of pipeline ")
    assert "got ZeroDivisionError: no rows. Mend metrics" in first
    assert second.startswith("leakage: ")
    assert evidence.gates is None and evidence.scored is not None and evidence.metrics == {}
    with pytest.raises(GateError, match="ZeroDivisionError"):
        evidence.require_passed()


class Torn(Regression):
    """Gives other outputs than it says."""

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self(*inputs).unsqueeze(1),)


def test_where_nothing_can_be_scored_leakage_and_gradients_are_looked_at(tmp_path: Path) -> None:
    evidence = Candidate(Torn, world=World(leak=True)).evidence(tmp_path)
    assert evidence.scored is None and evidence.gates is None
    kinds = [failure.split(":")[0] for failure in evidence.failures()]
    assert set(kinds) == {"contract", "leakage"}
    assert evidence.gradients is not None and evidence.gradients.passed
    names = {"contract_report", "gradient_report", "leakage_report", "source_report"}
    assert set(evidence.reports()) == names


def test_a_model_that_fails_on_a_held_out_row_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "answer_rows", raising(KeyError("a new category")))
    evidence = Candidate(world=World(shared_keys=2)).evidence(tmp_path)
    first, second = evidence.failures()
    assert first.startswith("quality: the model must answer every held-out row; it raised KeyError")
    assert second.startswith("leakage: ")
    monkeypatch.setattr(run, "answer_rows", raising(DataError("the file was cut")))
    with pytest.raises(DataError, match="the file was cut"):
        Candidate().evidence(tmp_path / "cut")


def test_too_few_rows_to_check_with_are_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRADIENT_ROWS", 10**6)
    with pytest.raises(DataError, match="at least 1000000 training rows .*; got "):
        Candidate().evidence(tmp_path)


def raising(error: Exception) -> Callable[..., Any]:
    def check(*arguments: Any) -> Any:
        raise error

    return check


def test_a_look_for_leakage_that_fails_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "check_leakage", raising(ValueError("odd rows")))
    evidence = Candidate().evidence(tmp_path)
    (failure,) = evidence.failures()
    assert failure.startswith("leakage: ") and failure.endswith("ValueError: odd rows")
    with pytest.raises(GateError):
        evidence.require_passed()


def test_damaged_rows_are_no_verdict_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "check_leakage", raising(DataError("the file was cut")))
    with pytest.raises(DataError, match="the file was cut"):
        Candidate().evidence(tmp_path)


def test_evidence_without_the_optional_reports_never_passes(tmp_path: Path) -> None:
    """Not even where nobody said why."""
    evidence = Candidate().evidence(tmp_path)
    assert metrics(evidence.scored) == evidence.metrics  # type: ignore[arg-type]
    for name in ("gradients", "gates", "leakage"):
        with pytest.raises((GateError, AssertionError)):
            replace(evidence, **{name: None}).require_passed()
