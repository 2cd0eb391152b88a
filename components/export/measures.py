"""How far two implementations of one function are apart, and how far float32 lets them be.

Legend: B = batch; other axes of an output are free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from components.contract import Arrays, TensorSpec

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FACTOR = 4.0
FLOOR = 1e-6


@dataclass(frozen=True)
class Yardstick:
    """How large an output is, and how wrong float32 alone makes it."""

    error: float = 0.0
    scale: float = 0.0

    @property
    def allowed(self) -> float:
        """Largest error that another float32 implementation may make."""
        return max(FACTOR * self.error, FLOOR * self.scale)


@dataclass(frozen=True)
class Run:
    """A batch of rows of one kind, with the module's outputs in both precisions.

    ``lengths`` are those of all dynamic axes, ``"batch"`` among them.
    """

    kind: str
    rows: Arrays
    float64: list[Array]
    float32: list[Array]
    lengths: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of rows, B."""
        return int(next(iter(self.rows.values())).shape[0])

    def overflows(self, index: int) -> Bools:
        """Where float32 cannot hold an output of large rows; there is nothing to compare there."""
        lost: Bools = np.isfinite(self.float64[index]) & ~np.isfinite(self.float32[index])
        return lost & np.bool_(self.kind == "large")

    def differences(self, index: int, outputs: Sequence[Array]) -> Floats:
        """Absolute differences of an output from float64; infinite where only one is a number."""
        wanted, got = (a[index].astype(np.float64) for a in (self.float64, outputs))
        equal = (wanted == got) | (np.isnan(wanted) & np.isnan(got)) | self.overflows(index)
        with np.errstate(invalid="ignore"):
            gap = np.abs(wanted - got)
        return np.where(equal, 0.0, np.where(np.isnan(gap), np.inf, gap))


def measure(runs: Sequence[Run], index: int, least: Yardstick) -> Yardstick:
    """Largest float32 error and magnitude of an output over all runs, or ``least`` if larger."""
    errors = [run.differences(index, run.float32).max(initial=0.0) for run in runs]
    sizes = [np.abs(run.float64[index].astype(np.float64)) for run in runs]
    scales = [size.max(initial=0.0, where=np.isfinite(size)) for size in sizes]
    return Yardstick(float(max(*errors, least.error)), float(max(*scales, least.scale)))


def changed_decisions(run: Run, index: int, outputs: Sequence[Array], allowed: float) -> int:
    """Count rows with another top class, or side of the threshold, that rounding cannot explain.

    The threshold of an output without classes is 0.5 where it is a probability, else 0.
    """
    reference = run.float64[index].astype(np.float64)
    threshold = threshold_of(reference)
    wanted, margin = decide_rows(reference, threshold)
    got, _ = decide_rows(outputs[index].astype(np.float64), threshold)
    sure = any_by_row((margin > 2 * allowed) & (wanted != got))
    return int((sure & ~any_by_row(run.overflows(index))).sum())


def clear_rows(run: Run, specs: Sequence[TensorSpec], yardsticks: Sequence[Yardstick]) -> Bools:
    """Mask (B,) of the rows in which no rounding error can change a decision."""
    clear = np.ones(run.size, dtype=np.bool_)
    for index, (spec, yardstick) in enumerate(zip(specs, yardsticks, strict=True)):
        if spec.dtype == "int64":
            close = run.differences(index, run.float32) > 0
        else:
            reference = run.float64[index].astype(np.float64)
            _, margin = decide_rows(reference, threshold_of(reference))
            close = ~(margin > 2 * yardstick.allowed)
        clear &= ~any_by_row(close)
    return clear


def threshold_of(reference: Array) -> float:
    """0.5 where all numbers are probabilities, else 0: where one number turns to another class."""
    numbers = reference.astype(np.float64)
    return 0.5 if bool(((numbers >= 0) & (numbers <= 1)).all()) else 0.0


def decide_rows(values: Floats, threshold: float) -> tuple[Array, Floats]:
    """Top class over the last axis, or side of the threshold; with the distance to a change."""
    if values.ndim == 1 or values.shape[-1] == 1:
        return values > threshold, np.abs(values - threshold)
    top = np.partition(values, -2, axis=-1)
    with np.errstate(invalid="ignore"):  # infinity minus infinity is no margin
        margin: Floats = top[..., -1] - top[..., -2]
    return values.argmax(axis=-1), margin


def any_by_row(mask: Bools) -> Bools:
    """Mask (B,) of the rows in which anything is true."""
    return np.asarray(mask.reshape(mask.shape[0], -1).any(axis=1))
