"""Quality gates: bounds on metrics of the held-out rows and of slices, and a trivial baseline.

Every gate is looked at, and every failure is reported.
"""

import math
from collections.abc import Mapping, Sequence

from components.pipeline import Floats, Pipeline, QualityGate, Scored, SliceGate
from components.validate.gates.baseline import check_baseline
from components.validate.gates.report import GateResult, GatesReport, bound, in_words
from components.validate.gates.slices import check_slices


def check_quality(
    pipeline: Pipeline,
    scored: Scored,
    metrics: Mapping[str, float],
    frequencies: Floats | None = None,
) -> GatesReport:
    """Hold every gate of a pipeline against scored rows.

    Args:
        pipeline: Gives gates and deciding metric.
        scored: The held-out rows with the model's outputs.
        metrics: The pipeline's metrics of these.
        frequencies: Of the labels in training, (classes,), for the comparison with a constant
            prediction; None leaves it out.

    Raises:
        ValueError: There are no gates, so nothing could say no.
    """
    _require_gates(pipeline.gates)
    results = tuple(_judge(g, metrics) for g in pipeline.gates if isinstance(g, QualityGate))
    slices = tuple(
        check_slices(pipeline, gate, scored)
        for gate in pipeline.gates
        if isinstance(gate, SliceGate)
    )
    baseline = None
    if frequencies is not None:
        baseline = check_baseline(pipeline, scored, metrics, frequencies)
    failures = [result.sentence for result in results if not result.passed]
    failures += [failure for result in slices for failure in result.failures]
    failures += [baseline.sentence] if baseline is not None and not baseline.passed else []
    return GatesReport(
        passed=not failures,
        results=results,
        slices=slices,
        baseline=baseline,
        failures=tuple(failures),
    )


def check_gates(gates: Sequence[QualityGate], metrics: Mapping[str, float]) -> GatesReport:
    """Hold every absolute gate against its metric; bounds are inclusive.

    A metric that is missing, NaN or infinite fails its gate: what was not measured is not good.

    Raises:
        ValueError: There are no gates, so nothing could say no.
    """
    _require_gates(gates)
    results = tuple(_judge(gate, metrics) for gate in gates)
    failures = tuple(result.sentence for result in results if not result.passed)
    return GatesReport(passed=not failures, results=results, failures=failures)


def _require_gates(gates: Sequence[QualityGate | SliceGate]) -> None:
    if not gates:
        raise ValueError("check_gates needs at least one gate; got none. Declare gates in Pipeline")


def _judge(gate: QualityGate, metrics: Mapping[str, float]) -> GateResult:
    value = metrics.get(gate.metric)
    usable = value is not None and math.isfinite(value)
    # Not `value < minimum`: a gate whose own bound is NaN must refuse, and NaN compares false.
    passed = value is not None and usable and gate.minimum <= value <= gate.maximum
    return GateResult(
        metric=gate.metric,
        value=value if usable else None,
        minimum=bound(gate.minimum),
        maximum=bound(gate.maximum),
        passed=passed,
        sentence=_sentence(gate, metrics, passed=passed),
    )


def _sentence(gate: QualityGate, metrics: Mapping[str, float], *, passed: bool) -> str:
    rule = f"{gate.metric} must {in_words(gate)}"
    if gate.metric not in metrics:
        known = ", ".join(sorted(metrics)) or "none"
        return f"{rule}; it was not measured. The pipeline's metrics are: {known}."
    # The shortest text that reads back as the same number: 0.8999999 must not print as 0.9.
    return f"{rule}; got {float(metrics[gate.metric])!r}{'' if passed else ', which fails'}."
