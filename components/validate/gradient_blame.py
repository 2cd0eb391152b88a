"""Turns findings into one culprit and one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from components.validate.gradient_locate import locate, locate_non_finite
from components.validate.gradient_modes import Finding
from components.validate.gradient_probe import LOOSE, STRICT, Outcome
from components.validate.gradient_report import Cause, StepCheck, TensorCheck, Verdict
from components.validate.gradient_twin import Twin

_OUTCOMES = {
    Cause.MISMATCH: Outcome.MISMATCH,
    Cause.BROKEN_PATH: Outcome.BROKEN_PATH,
    Cause.SURROGATE: Outcome.SURROGATE,
}


def assign_blame(
    twin: Twin,
    findings: Sequence[Finding],
    tensors: Sequence[TensorCheck],
    checks: Sequence[StepCheck],
    hidden_owner: str | None,
    seed: int,
) -> tuple[str | None, str]:
    """Path of the module most likely at fault (None if none is), and the reason.

    `tensors` are the findings after waivers, in the same order; `hidden_owner` is the module that
    holds an unregistered parameter. Replays modules only if some gradient is wrong.
    """
    pairs = list(zip(findings, tensors, strict=True))
    failing = [finding for finding, tensor in pairs if tensor.verdict is Verdict.FAIL]
    headline = f"{len(failing)} of {len(tensors)} tensors fail ({_causes(failing)})"
    excused = {t.cause for t in tensors if t.verdict is Verdict.WAIVED}
    wrong = [f for f in failing if f.cause is not Cause.UNUSED]
    if wrong:
        culprit = _replayed(twin, wrong, excused, seed)
        return culprit, f"{headline}; {_replay_clause(twin.model, culprit)}"
    if failing:
        culprit = _common_module([f.slot.name for f in failing])
        label = _label(twin.model, culprit)
        return culprit, f"{headline}; the loss reads none of them, all lie in {label}"
    if hidden_owner is not None:
        label = _label(twin.model, hidden_owner)
        return hidden_owner, f"{label} holds a parameter that is not registered"
    return None, _without_culprit(tensors, checks)


def _replayed(twin: Twin, wrong: Sequence[Finding], excused: set[Cause], seed: int) -> str | None:
    spoiled = [f for f in wrong if f.cause is Cause.NON_FINITE]
    worst = (spoiled or wrong)[0]
    twin.set_mode(worst.training)
    if spoiled:
        return locate_non_finite(twin, worst.batch, seed)
    # A waived kind of disagreement is not sought, unless an unwaived tensor shows it too.
    allowed = excused - {finding.cause for finding in wrong}
    ignored = frozenset(_OUTCOMES[cause] for cause in allowed if cause in _OUTCOMES)
    return locate(twin, worst.batch, LOOSE if twin.lowered else STRICT, ignored, seed)


def _replay_clause(model: nn.Module, culprit: str | None) -> str:
    if culprit is None:
        return (
            "no module is at fault when replayed alone, so look at loss_fn and at methods of the "
            "model other than forward"
        )
    return f"{_label(model, culprit)} is at fault when replayed alone, with none of its children"


def _without_culprit(tensors: Sequence[TensorCheck], checks: Sequence[StepCheck]) -> str:
    unclear = sum(t.verdict is Verdict.UNVERIFIABLE for t in tensors)
    if unclear:
        return (
            f"{unclear} of {len(tensors)} tensors cannot be verified because the loss is noisier "
            "than the tolerance, not finite or flat at zero; remove unseeded randomness or change "
            "the batches"
        )
    failed = [check for check in checks if not check.passed]
    if failed:
        return f"the check {failed[0].name} failed: {failed[0].detail}"
    degraded = sum(t.verdict is Verdict.DEGRADED for t in tensors)
    waived = sum(t.verdict is Verdict.WAIVED for t in tensors)
    agree = len(tensors) - waived
    notes = f" ({degraded} only to float32 accuracy, {waived} waived)" if degraded + waived else ""
    return f"{agree} of {len(tensors)} tensors agree with finite differences{notes}"


def _causes(failing: Sequence[Finding]) -> str:
    return ", ".join(sorted({finding.cause.value for finding in failing}))


def _common_module(names: Sequence[str]) -> str:
    """The innermost module path that contains every named parameter."""
    shared = names[0].split(".")[:-1]
    for name in names[1:]:
        parts = name.split(".")[:-1]
        equal = [a == b for a, b in zip(shared, parts, strict=False)]
        shared = shared[: equal.index(False) if False in equal else len(equal)]
    return ".".join(shared)


def _label(model: nn.Module, path: str) -> str:
    kind = type(model.get_submodule(path)).__name__
    return f"'{path}' ({kind})" if path else f"the model itself ({kind})"
