"""Rows to an ONNX model: what MLflow loads as a Python function.

This file travels with every version and runs where assay is not installed: it needs numpy, pandas
and onnxruntime, and nothing else. ``predict`` takes

- a DataFrame with a column for each input of one axis, in any order, others ignored. Missing text
  (None, NaN, NA) becomes "", a missing number NaN; a missing whole number or truth value is
  refused. It gives a DataFrame with a column for each output and the rows' own index; an output
  with more than one axis becomes a column of lists;
- or arrays by input name, or one array if there is one input. It gives arrays by output name.
"""

import os
from typing import Any, final

import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[Any]
_DTYPES = {
    "tensor(string)": "object",
    "tensor(bool)": "bool",
    "tensor(int64)": "int64",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
}


def _load_pyfunc(path: str) -> "AssayRows":
    # From 1.29 on, onnxruntime reports to its maker unless this is set when it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return AssayRows(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))


@final
class AssayRows:
    """Answers rows with one session of ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = {
            one.name: (_DTYPES[one.type], len(one.shape)) for one in session.get_inputs()
        }
        self._outputs = [one.name for one in session.get_outputs()]

    def predict(self, data: Any, params: Any = None) -> Any:
        """Map a DataFrame to a DataFrame, or arrays to arrays by name."""
        frame = isinstance(data, pd.DataFrame)
        if frame or isinstance(data, dict):
            given = dict(data.items())
        else:
            given = {next(iter(self._inputs)): data} if len(self._inputs) == 1 else {}
        if frame and len(self._inputs) == 1 and not self._inputs.keys() & given.keys():
            given = {next(iter(self._inputs)): data.to_numpy()}
        if missing := [name for name in self._inputs if name not in given]:
            raise ValueError(f"inputs must be named {[*self._inputs]}; {missing} are not there")
        feeds = {name: _array(name, given[name], *kind) for name, kind in self._inputs.items()}
        answers = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        if not frame:
            return answers
        columns = {name: a if a.ndim == 1 else a.tolist() for name, a in answers.items()}
        return pd.DataFrame(columns, index=data.index)


def _array(name: str, values: Any, dtype: str, axes: int) -> Array:
    if axes == 1:
        return _column(name, pd.Series(values), dtype)
    if isinstance(values, pd.Series):  # of lists or arrays
        values = np.stack([np.asarray(value) for value in values])
    found = np.asarray(values)
    fits = dtype == "object" or np.can_cast(found.dtype, dtype, "same_kind")
    if found.ndim != axes or not fits:
        raise ValueError(
            f"input {name!r} must have {axes} axes and {dtype}; it has {found.ndim} and "
            f"{found.dtype}"
        )
    cast: Array = found.astype(dtype)
    return cast


def _column(name: str, column: "pd.Series[Any]", dtype: str) -> Array:
    missing = column.isna().to_numpy(dtype=bool)
    if dtype in ("int64", "bool") and missing.any():
        raise ValueError(f"column {name!r} must hold {dtype} in every row; {missing.sum()} lack it")
    values = np.array(column.to_numpy(dtype=object))
    values[missing] = "" if dtype == "object" else np.nan
    if dtype == "object":
        others = {type(value).__name__ for value in values if not isinstance(value, str)}
        if others:
            raise ValueError(f"column {name!r} must hold text; it holds {sorted(others)}")
        return values
    found = np.array(values.tolist()) if len(values) else np.empty(0, dtype)
    kinds = {"bool": "b", "int64": "iuf"}.get(dtype, "biuf")
    if found.dtype.kind in kinds:
        with np.errstate(invalid="ignore"):
            cast: Array = found.astype(dtype)
        if dtype != "int64" or np.array_equal(cast, found):
            return cast
    raise ValueError(f"column {name!r} must hold {dtype}; it holds {found.dtype}")
