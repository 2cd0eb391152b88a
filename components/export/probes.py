"""Rows to probe two implementations of one function with.

Legend: N = rows given, B = rows made, X = an input's other axes; a place is one index of X.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from components.contract import Arrays, TensorSpec
from components.export.onnx_file import BATCH

Array = npt.NDArray[np.generic]

LENGTHS = (1, 2, 5, 9)
"""Lengths of other dynamic axes at which graphs go wrong, for the same reasons."""

BATCHES = (1, 2, 3, 7, 1024)
"""Batch sizes at which graphs go wrong: one, even, odd, and larger than any tile or vector."""

LARGE = 1e3
"""Large rows reach this many times the largest magnitude observed at a place."""

_ROWS = max(BATCHES)


def probe_rows(inputs: Arrays, rng: np.random.Generator) -> Iterator[tuple[str, Arrays]]:
    """Yield rows of several kinds, by name, each as named arrays (1024, X).

    - ``real``: drawn from ``inputs``, repeated where there are fewer;
    - ``random``: each number within the range observed at its place;
    - ``zeros``;
    - ``large``: numbers of either sign, up to :data:`LARGE` times what was observed;
    - ``missing``: real rows with more NaN, at places where NaN was observed, if it was anywhere.

    An integer is a code: away from ``zeros``, only values observed at its place are used.
    """
    count = next(iter(inputs.values())).shape[0]
    drawn = np.resize(rng.permutation(count), _ROWS)
    # astype: whatever byte order came in, the engines see the machine's own
    real = {k: a[drawn].astype(a.dtype.newbyteorder("=")) for k, a in inputs.items()}
    yield "real", real
    yield "random", {name: _random(array, rng) for name, array in inputs.items()}
    yield "zeros", {name: np.zeros_like(array) for name, array in real.items()}
    yield "large", {name: _large(array, rng) for name, array in inputs.items()}
    if any(np.isnan(array).any() for array in inputs.values()):
        yield "missing", {name: _missing(real[name], inputs[name], rng) for name in inputs}


def split_batches(rows: Arrays) -> Iterator[Arrays]:
    """Cut rows into the sizes of :data:`BATCHES`: small ones share no row, the last has all."""
    start = 0
    for size in BATCHES:
        start = start if start + size <= _ROWS else 0
        yield {name: array[start : start + size] for name, array in rows.items()}
        start += size


def stretched(rows: Arrays, specs: Sequence[TensorSpec], lengths: Mapping[str, int]) -> Arrays:
    """Cut or repeat arrays along their dynamic axes until they have these lengths."""
    return {spec.name: _resize(rows[spec.name], spec, lengths) for spec in specs}


def other_lengths(rows: Arrays, specs: Sequence[TensorSpec]) -> Iterator[Arrays]:
    """Yield small batches at each of :data:`LENGTHS`, if there is a dynamic axis but the batch.

    Several axes have different lengths at a time, so that none passes for another.
    """
    axes = dict.fromkeys(axis for spec in specs for _, axis in spec.axes if axis != BATCH)
    for turn in range(len(LENGTHS) if axes else 0):
        lengths = {a: LENGTHS[(turn + at) % len(LENGTHS)] for at, a in enumerate(axes)}
        for size in (1, 3):
            yield stretched(rows, specs, {**lengths, BATCH: size})


def _resize(array: Array, spec: TensorSpec, lengths: Mapping[str, int]) -> Array:
    for place, axis in spec.axes:
        if axis in lengths:
            array = array.take(np.arange(lengths[axis]) % array.shape[place], axis=place)
    return np.ascontiguousarray(array)


def neighbours(rows: Arrays, rng: np.random.Generator) -> Arrays:
    """Move each number to an adjacent one of its dtype, up or down; integers stay."""
    return {name: _step(array, rng) for name, array in rows.items()}


def _step(array: Array, rng: np.random.Generator) -> Array:
    if array.dtype.kind != "f":
        return array
    ways = rng.choice(np.array([-np.inf, np.inf], dtype=array.dtype), size=array.shape)
    moved: Array = np.nextafter(array, ways)
    return np.where(np.isfinite(moved), moved, array)


def _random(array: Array, rng: np.random.Generator) -> Array:
    if array.dtype.kind != "f":
        return _observed(array, rng)
    low, high = _range(array)
    return rng.uniform(low, high, size=(_ROWS, *array.shape[1:])).astype(np.float32)


def _large(array: Array, rng: np.random.Generator) -> Array:
    if array.dtype.kind != "f":
        return _observed(array, rng)
    bound = LARGE * np.maximum(1.0, np.maximum(*np.abs(_range(array))))
    bound = np.minimum(bound, np.finfo(np.float32).max)
    made: Array = bound * rng.uniform(-1, 1, size=(_ROWS, *array.shape[1:]))
    return made.astype(np.float32)


def _missing(real: Array, inputs: Array, rng: np.random.Generator) -> Array:
    places = np.isnan(inputs).any(axis=0)
    chosen = places & (rng.random(real.shape) < 0.5)
    chosen[0] = places  # the first row, the batch of one, misses all that can be missing
    return np.where(chosen, np.array(np.nan, real.dtype), real) if places.any() else real


def _observed(array: Array, rng: np.random.Generator) -> Array:
    rows = rng.integers(0, array.shape[0], size=(_ROWS, *array.shape[1:]))
    taken: Array = np.take_along_axis(array, rows, axis=0)
    native: Array = taken.astype(array.dtype.newbyteorder("="))
    return native


def _range(array: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Smallest and largest finite number at each place (X), or 0 where there is none."""
    finite, wide = np.isfinite(array), array.astype(np.float64)
    low = wide.min(axis=0, where=finite, initial=np.inf)
    high = wide.max(axis=0, where=finite, initial=-np.inf)
    found = finite.any(axis=0)
    return np.where(found, low, 0.0), np.where(found, high, 0.0)
