"""Quality gates: absolute bounds on the metrics of the held-out rows."""

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from components.pipeline import QualityGate


class _Frozen(BaseModel):
    # JSON has neither NaN nor infinity: an unusable value and an open bound are None.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GateResult(_Frozen):
    """One gate: ``value`` is None when the metric is missing or not finite, a bound when open."""

    metric: str
    value: float | None
    minimum: float | None
    maximum: float | None
    passed: bool
    sentence: str


class GatesReport(_Frozen):
    """Outcome of ``check_gates``; ``failures`` are the sentences of the gates that said no."""

    passed: bool
    results: tuple[GateResult, ...]
    failures: tuple[str, ...]


def check_gates(gates: Sequence[QualityGate], metrics: Mapping[str, float]) -> GatesReport:
    """Hold every gate against its metric; bounds are inclusive and every gate is looked at.

    A metric that is missing, NaN or infinite fails its gate: what was not measured is not good.

    Raises:
        ValueError: There are no gates, so nothing could say no.
    """
    if not gates:
        raise ValueError("check_gates needs at least one gate; got none. Declare gates in Pipeline")
    results = tuple(_judge(gate, metrics) for gate in gates)
    failures = tuple(result.sentence for result in results if not result.passed)
    return GatesReport(passed=not failures, results=results, failures=failures)


def _judge(gate: QualityGate, metrics: Mapping[str, float]) -> GateResult:
    value = metrics.get(gate.metric)
    usable = value is not None and math.isfinite(value)
    # Not `value < minimum`: a gate whose own bound is NaN must refuse, and NaN compares false.
    passed = value is not None and usable and gate.minimum <= value <= gate.maximum
    return GateResult(
        metric=gate.metric,
        value=value if usable else None,
        minimum=_bound(gate.minimum),
        maximum=_bound(gate.maximum),
        passed=passed,
        sentence=_sentence(gate, metrics, passed=passed),
    )


def _sentence(gate: QualityGate, metrics: Mapping[str, float], *, passed: bool) -> str:
    rule = f"{gate.metric} must {_words(gate)}"
    if gate.metric not in metrics:
        known = ", ".join(sorted(metrics)) or "none"
        return f"{rule}; it was not measured. The pipeline's metrics are: {known}."
    # The shortest text that reads back as the same number: 0.8999999 must not print as 0.9.
    return f"{rule}; got {float(metrics[gate.metric])!r}{'' if passed else ', which fails'}."


def _words(gate: QualityGate) -> str:
    low, high = _bound(gate.minimum), _bound(gate.maximum)
    if low is not None and high is not None:
        return f"lie in {low!r}..{high!r}"
    return f"be at least {gate.minimum!r}" if high is None else f"be at most {gate.maximum!r}"


def _bound(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None
