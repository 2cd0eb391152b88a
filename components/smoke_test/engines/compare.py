"""Answers of an engine against the golden file's."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Array = npt.NDArray[np.generic]


class Tensor(BaseModel):
    """One output as the child tells it: base64 of little-endian numbers, or strings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    shape: tuple[int, ...]
    data: str | tuple[str, ...]


class Compared(NamedTuple):
    """The largest difference of a float output, and what is wrong, one sentence each."""

    max_difference: float
    failures: list[str]


def compare(
    batches: Sequence[Mapping[str, Tensor]],
    golden: Mapping[str, Array],
    *,
    rtol: float,
    atol: float,
) -> Compared:
    """Compare outputs by batch with golden outputs of as many rows.

    Names come first, then types and shapes, then values: numbers within ``atol + rtol * |golden|``,
    strings and whole numbers exactly.
    """
    for batch in batches:
        if set(batch) != set(golden):
            return Compared(0.0, [f"outputs must be {sorted(golden)}; got {sorted(batch)}"])
    told, failures = {}, []
    for name in golden:
        try:
            told[name] = np.concatenate([decode(batch[name]) for batch in batches])
        except ValueError as error:
            failures.append(f"{name!r} must be an array; got {error}")
    known = {name: golden[name] for name in told}
    compared = compare_arrays(told, known, rtol=rtol, atol=atol)
    return Compared(compared.max_difference, failures + compared.failures)


def compare_arrays(
    got: Mapping[str, Array], golden: Mapping[str, Array], *, rtol: float, atol: float
) -> Compared:
    """As :func:`compare`, for outputs that are whole arrays already."""
    if set(got) != set(golden):
        return Compared(0.0, [f"outputs must be {sorted(golden)}; got {sorted(got)}"])
    largest = 0.0
    failures: list[str] = []
    for name, want in golden.items():
        difference, fault = _difference(got[name], want, rtol, atol)
        largest = max(largest, difference)
        failures += [f"{name!r} {fault}"] if fault else []
    return Compared(largest, failures)


def decode(tensor: Tensor) -> Array:
    """The array that a child told.

    Raises:
        ValueError: Type, shape and data do not fit together.
    """
    if isinstance(tensor.data, tuple):
        return np.array(tensor.data, dtype=np.str_).reshape(tensor.shape)
    if tensor.type not in ("float32", "float64", "int32", "int64", "bool"):
        raise ValueError(f"numbers of type {tensor.type!r}")
    try:
        raw = base64.b64decode(tensor.data, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
    return np.frombuffer(raw, np.dtype(tensor.type).newbyteorder("<")).reshape(tensor.shape)


def _difference(got: Array, want: Array, rtol: float, atol: float) -> tuple[float, str | None]:
    same_kind = got.dtype.kind == want.dtype.kind == "U" or got.dtype == want.dtype
    if got.shape != want.shape or not same_kind:
        return 0.0, f"must be {want.shape} {want.dtype}; got {got.shape} {got.dtype}"
    if want.dtype.kind != "f":
        wrong = np.argwhere(got != want)
        if not len(wrong):
            return 0.0, None
        at = tuple(wrong[0])
        return 0.0, (
            f"must equal the golden values; {len(wrong)} of {want.size} differ, the first in row "
            f"{at[0]}: {got[at].item()!r} for {want[at].item()!r}"
        )
    if bad := int((~np.isfinite(got)).sum()):
        return 0.0, f"must be finite; got {bad} NaN or infinite values"
    want_64 = want.astype(np.float64)
    difference = np.abs(got.astype(np.float64) - want_64)
    largest = float(difference.max(initial=0.0))
    excess = difference - atol - rtol * np.abs(want_64)
    if excess.max(initial=0.0) <= 0:
        return largest, None
    row = int(np.unravel_index(excess.argmax(), excess.shape)[0])
    return largest, (
        f"must equal the golden values within rtol {rtol:g} and atol {atol:g}; row {row} differs "
        f"by {difference.flat[excess.argmax()]:.3g}"
    )
