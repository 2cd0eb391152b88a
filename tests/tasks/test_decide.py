"""Decide: what becomes of a champion that cannot be compared."""

from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.adapters.mlflow_registry import Version
from components.decide.promotion import Contender
from components.errors import ContractError, DataError
from components.pipeline import Scored
from components.pipelines.digits import pipeline as digits
from tasks import decide


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
        bout = decide._Bout(digits, registry, candidate, "own", rows, date(2014, 1, 1), tmp_path)
        decide._champion(bout, holder, tmp_path / "champion")
    assert "take the alias away" in str(caught.value)
