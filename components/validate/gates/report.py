"""Records of the quality gates: what was measured, which bound it was held against, who failed."""

import math

from pydantic import BaseModel, ConfigDict

from components.bootstrap import Interval
from components.pipeline import QualityGate, SliceGate


class Frozen(BaseModel):
    """A frozen JSON value; unknown fields are refused."""

    # JSON has neither NaN nor infinity: an unusable value and an open bound are None.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GateResult(Frozen):
    """One gate: ``value`` is None when the metric is missing or not finite, a bound when open."""

    metric: str
    value: float | None
    minimum: float | None
    maximum: float | None
    passed: bool
    sentence: str


class Slice(Frozen):
    """Rows of one value: ``passed`` is None where they were not judged, and ``note`` says why."""

    value: str
    rows: int
    score: float | None
    passed: bool | None
    note: str


class SliceResult(Frozen):
    """One slice gate with every slice of its column; a failure for every slice that said no."""

    metric: str
    column: str
    minimum: float | None
    maximum: float | None
    min_rows: int
    slices: tuple[Slice, ...]
    passed: bool
    failures: tuple[str, ...]
    sentence: str


class BaselineResult(Frozen):
    """The model against a constant prediction; None where one of them could not be scored."""

    metric: str
    value: float | None
    baseline: float | None
    interval: Interval | None
    passed: bool
    sentence: str


class GatesReport(Frozen):
    """Outcome of the quality gates; ``failures`` are the sentences of those that said no.

    ``baseline`` is None in the decision, where the model has been compared with it before.
    """

    passed: bool
    results: tuple[GateResult, ...]
    slices: tuple[SliceResult, ...] = ()
    baseline: BaselineResult | None = None
    failures: tuple[str, ...]


def bound(value: float) -> float | None:
    """A bound as JSON has it: None where it is open."""
    return value if math.isfinite(value) else None


def in_words(gate: QualityGate | SliceGate) -> str:
    """What a gate demands, to follow upon ``must``."""
    low, high = bound(gate.minimum), bound(gate.maximum)
    if low is not None and high is not None:
        return f"lie in {low!r}..{high!r}"
    return f"be at least {gate.minimum!r}" if high is None else f"be at most {gate.maximum!r}"
