"""Decide: a champion that cannot be compared, and one that moves while it is compared with."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.adapters.mlflow_registry import Version
from components.decide.promotion import Contender, Judgement
from components.errors import ConflictError, ContractError, DataError, InfrastructureError
from components.pipeline import Scored
from components.pipelines.digits import pipeline as digits
from components.settings import load_settings
from tasks import decide
from tasks.register import register
from tasks.smoke_test import smoke_test


def test_a_champion_that_cannot_answer_these_rows_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was trained on a column that the pipeline reads no more."""

    def missing(*arguments: Any) -> Contender:
        raise DataError("column 'gone' must be present; got image, digit.")

    monkeypatch.setattr(decide, "_contender", missing)
    registry: Any = SimpleNamespace(download=lambda number, folder: folder / "model.onnx")
    rows = pa.table({"digit": [1]})
    candidate = Contender(5, {}, Scored(rows=rows, labels=np.array([1]), outputs={}))
    holder = Version(3, "", {"onnx_sha256": "other"})
    with pytest.raises(ContractError, match="digits version 3 cannot: column 'gone'") as caught:
        bout = decide._Bout(
            load_settings(), digits, registry, candidate, "own", rows, date(2014, 1, 1), tmp_path
        )
        decide._champion(bout, holder, tmp_path / "champion")
    assert "take the alias away" in str(caught.value)


def test_a_candidate_is_judged_again_when_another_process_was_first(
    bench: Any, export_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = smoke_test.fn(register.fn(export_of("contested", "learning_rate=0.01", "epochs=1")))
    fast = smoke_test.fn(register.fn(export_of("contested")))
    slower, faster = slow.registered.version, fast.registered.version
    original, calls = decide.move, []

    def preceded(book: Any, **move: Any) -> Any:
        """Another process gets in with the better one."""
        calls.append(move["expected"])
        if len(calls) == 1:
            original(book, expected=None, to=faster, kind="promote", why="first", who="another")
        return original(book, **move)

    monkeypatch.setattr(decide, "move", preceded)
    decision = decide.decide.fn(slow)
    assert calls == [None], "against the new champion it has no chance"
    assert (decision.decision, decision.champion) == ("kept_champion", faster)
    assert f"champion version {faster} has" in decision.reason
    assert bench.aliases("contested")["champion"] == faster
    tags = bench.versions("contested")[slower]
    assert (tags["decision"], tags["reason"]) == ("kept_champion", decision.reason)

    def always(book: Any, **move: Any) -> Any:
        raise ConflictError("another process was first")

    better = smoke_test.fn(register.fn(export_of("contested", "epochs=3")))
    monkeypatch.setattr(decide, "move", always)
    monkeypatch.setattr(decide, "judge", lambda *given: Judgement("promoted", "surely"))
    with pytest.raises(InfrastructureError, match="was moved 5 times"):
        decide.decide.fn(better)
    assert bench.aliases("contested")["champion"] == faster
