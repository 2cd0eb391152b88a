"""Turns findings into one culprit and one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from components.validate.gradients.hooks import has_hook
from components.validate.gradients.lint import common_module, label
from components.validate.gradients.locate import locate, locate_non_finite
from components.validate.gradients.modes import Finding
from components.validate.gradients.probe import LOOSE, STRICT, Outcome
from components.validate.gradients.report import Cause, StepCheck, TensorCheck, Verdict
from components.validate.gradients.step import StepOutcome
from components.validate.gradients.twin import Twin

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
    step: StepOutcome | None = None,
) -> tuple[str | None, str]:
    """Path of the module most likely at fault (None if none is), and the reason.

    Wrong gradients come first, then hidden parameters, then checks of the training step (`step`).
    `tensors` are the findings after waivers, in the same order; `hidden_owner` is the module that
    holds an unregistered parameter. Replays modules only if some gradient is wrong.
    """
    pairs = list(zip(findings, tensors, strict=True))
    failing = [finding for finding, tensor in pairs if tensor.verdict is Verdict.FAIL]
    headline = f"{len(failing)} of {len(tensors)} tensors fail ({_causes(failing)})"
    excused = {t.cause for t in tensors if t.verdict is Verdict.WAIVED}
    wrong = [f for f in failing if f.cause is not Cause.UNUSED]
    if wrong:
        if step is not None and step.hook_owner is not None and _all_hooked(wrong, step):
            owner = label(twin.model, step.hook_owner)
            return step.hook_owner, f"{headline}; without the hook of {owner} gradients differ"
        culprit = _replayed(twin, wrong, excused, seed)
        if culprit is None and all(any(map(has_hook, f.slot.leaves)) for f in wrong):
            # Replays leave out the hooks of parameters; in eval mode no other check runs them.
            owner = common_module([f.slot.name for f in wrong])
            return owner, f"{headline}; hooks of {label(twin.model, owner)} change them"
        if culprit is None and step is not None and step.culprit is not None:
            return step.culprit, f"{headline}; {step.reason}"
        return culprit, f"{headline}; {_replay_clause(twin.model, culprit)}"
    if failing:
        culprit = common_module([f.slot.name for f in failing])
        return culprit, (
            f"{headline}; the loss reads none of them, all lie in {label(twin.model, culprit)}"
        )
    if hidden_owner is not None:
        owner = label(twin.model, hidden_owner)
        return hidden_owner, f"{owner} holds a parameter that is not registered"
    if step is not None and step.culprit is not None:
        return step.culprit, step.reason
    return None, _without_culprit(tensors, checks)


def _all_hooked(wrong: Sequence[Finding], step: StepOutcome) -> bool:
    """True when hooks change every wrong gradient, so that no module need be replayed."""
    return all(finding.slot.name in step.hooked for finding in wrong)


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
    return f"{label(model, culprit)} is at fault when replayed alone, with none of its children"


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
