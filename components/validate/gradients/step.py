"""Checks of one training step: what is equivalent in theory must give the same gradients.

Two backward passes without zeroing add up, a scaled loss scales every gradient, zero_grad clears,
hooks and activation checkpointing leave gradients alone, rows of a batch do not interact, and the
optimiser moves every parameter as its rule says. All on the twin, at the given weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from components.validate.call_audit import count_calls
from components.validate.gradients.lint import (
    StepFinding,
    common_module,
    copied_ties,
    covers,
    eval_reaches_modules,
    finding,
    label,
    listed,
    optimizer_covers,
    structural_fault,
)
from components.validate.gradients.optimizer import optimizer_updates
from components.validate.gradients.parts import outer_calls
from components.validate.gradients.recompute import plain_checkpoints, watched_checkpoints
from components.validate.gradients.report import StepCheck
from components.validate.gradients.rows import row_checks
from components.validate.gradients.slots import Reading, Slot
from components.validate.gradients.twin import Twin
from components.validate.gradients.unhooked import HOOKS, differing, hooks_and_checkpoints
from components.validate.waivers import Waiver, WaiverKind

# Powers of two, by which scaling is exact: one large enough to reach a limit that clips scaled
# gradients only, and one that half precision inside the model survives.
_SCALE, _LOWERED_SCALE = 1024.0, 0.25
# Elements from which on gradients are read a second time rather than kept.
_HEAVY = 1_000_000
# Which failed check names the culprit: the most specific first.
_BLAMED_FIRST = (
    "modules_called",
    "eval_reaches_modules",
    "hooks_keep_gradients",
    "checkpointing_agrees",
    "batch_sizes",
    "rows_independent",
)


@dataclass(frozen=True)
class StepOutcome:
    """What the checks of a training step found.

    `loss` is the second loss on batch 0 in train mode, `away` the reading of batch 0 in eval mode.
    `culprit` is the module to blame if a check failed ('' is the model itself), and
    `reason` the sentence about it. `in_use` are waivers that excused something here, `hooked` the
    tensors whose gradient a hook changes and `hook_owner` the module that holds the hook.
    """

    checks: tuple[StepCheck, ...]
    loss: float
    away: Reading
    culprit: str | None
    reason: str
    in_use: frozenset[Waiver] = frozenset()
    hooked: frozenset[str] = frozenset()
    hook_owner: str | None = None


def step_checks(
    twin: Twin,
    home: Reading,
    model: nn.Module,
    *,
    waivers: Sequence[Waiver],
    optimizer: torch.optim.Optimizer | None,
) -> StepOutcome:
    """All checks of a training step; call it right after `home` was read in train mode.

    Cost where all passes: a second backward, the reading in the other mode, two parts of a batch,
    and one more backward where there are hooks or checkpoints. Only a failure costs more. The twin
    is left in train mode with no gradients.
    """
    second = _second_backward(twin, home, waivers)
    hooks, changed = hooks_and_checkpoints(twin, home, second.checkpoints, waivers)
    # Before there is a second set of gradients beside the optimiser's copied state.
    updates = (
        [] if optimizer is None else _optimizer_findings(twin, home, model, optimizer, waivers)
    )
    twin.set_mode(False)
    before = _in_train_mode(twin.model)
    with outer_calls(twin.model) as calls:
        away = _settled_reading(twin)
    switched = [path for path in _in_train_mode(twin.model) if path not in before]
    reread = _is_heavy(twin) and not (twin.has_hooks or second.checkpoints)
    if reread:
        home.gradients.clear()
    found = [
        *second.findings,
        *hooks,
        *row_checks(twin, away, calls, waivers),
        eval_reaches_modules(twin.model, switched, waivers),
        copied_ties(model, waivers),
        *updates,
    ]
    twin.set_mode(True)
    twin.clear_gradients()
    if reread:
        home.gradients.update(twin.reading(0).gradients)
    culprit, reason = _blame(twin, model, found, waivers)
    return StepOutcome(
        checks=tuple(f.check for f in found),
        loss=second.loss,
        away=away,
        culprit=culprit,
        reason=reason,
        in_use=frozenset().union(*(f.in_use for f in found)),
        hooked=frozenset(changed),
        hook_owner=next((f.culprit for f in hooks if f.check.name == HOOKS), None),
    )


def _optimizer_findings(
    twin: Twin,
    home: Reading,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    waivers: Sequence[Waiver],
) -> list[StepFinding]:
    covered = StepFinding(optimizer_covers(model, optimizer))
    return [covered, optimizer_updates(model, optimizer, home, twin, waivers)]


def _blame(
    twin: Twin, model: nn.Module, found: Sequence[StepFinding], waivers: Sequence[Waiver]
) -> tuple[str | None, str]:
    worst = min((f for f in found if not f.check.passed), key=_precedence, default=None)
    if worst is None or worst.culprit is None:
        fault = structural_fault(model, twin.rewritten, waivers)
        if fault is not None:
            return fault
    if worst is None:
        return None, ""
    return worst.culprit, f"the check {worst.check.name} failed: {worst.check.detail}"


def _in_train_mode(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if module.training]


def _is_heavy(twin: Twin) -> bool:
    """True where a third set of gradients would cost more than reading one set anew."""
    return sum(slot.size for slot in twin.slots) >= _HEAVY


def _precedence(failed: StepFinding) -> tuple[bool, int]:
    name = failed.check.name
    rank = _BLAMED_FIRST.index(name) if name in _BLAMED_FIRST else len(_BLAMED_FIRST)
    return failed.culprit is None, rank


def _settled_reading(twin: Twin) -> Reading:
    reading = twin.reading(0)
    # Weights changed under this reading; the next one is protected.
    return twin.reading(0) if twin.note_rewrites() else reading


@dataclass(frozen=True)
class _Second:
    findings: list[StepFinding]
    loss: float
    checkpoints: list[str]


def _second_backward(twin: Twin, home: Reading, waivers: Sequence[Waiver]) -> _Second:
    """One backward of the scaled loss on top of `home`'s gradients, and then zero_grad."""
    _put_back(twin, home)
    losses: list[float] = []

    def call() -> None:
        losses.append(twin.backward(0, scale=_scale(twin)))

    with watched_checkpoints(twin.model) as checkpoints:
        counts = count_calls(twin.model, call)
    slots = _comparable(twin, home, waivers)
    if checkpoints and _bypassed(counts):
        # Recomputing calls functions of modules, not the modules.
        with plain_checkpoints():
            counts = count_calls(twin.model, lambda: twin.value(0))
    odd = differing(twin, home, slots, 1 + _scale(twin))
    twin.model.zero_grad()
    left = [slot.name for slot in twin.slots if _holds_gradient(slot)]
    wrong = _attributed(twin, home, slots, odd) if odd else {}
    twin.clear_gradients()
    findings = [_calls_finding(twin.model, counts), *_accumulation_findings(twin, wrong, left)]
    return _Second(findings, losses[0], checkpoints)


def _scale(twin: Twin) -> float:
    return _LOWERED_SCALE if twin.lowered else _SCALE


def _comparable(twin: Twin, home: Reading, waivers: Sequence[Waiver]) -> list[Slot]:
    """Slots with a finite gradient that no waiver of kind `hook` names."""
    named = [w for w in waivers if w.kind is WaiverKind.HOOK]
    return [
        slot
        for slot in twin.slots
        if home.finite_for(slot.name) and not any(covers(w, slot.name, slot.aliases) for w in named)
    ]


def _put_back(twin: Twin, home: Reading) -> None:
    """Let `.grad` hold the gradients of `home`, in memory of its own."""
    twin.clear_gradients()
    for slot in twin.slots:
        gradient = home.gradients[slot.name]
        if gradient is not None:
            leaf = slot.leaves[0]
            complete = gradient.clone()
            leaf.grad = torch.view_as_complex(complete) if leaf.is_complex() else complete


def _holds_gradient(slot: Slot) -> bool:
    return any(leaf.grad is not None and bool(leaf.grad.any()) for leaf in slot.leaves)


def _attributed(
    twin: Twin, home: Reading, slots: Sequence[Slot], odd: list[str]
) -> dict[str, list[str]]:
    """Names of slots that do not repeat, do not scale and do not add up, each seen alone.

    `odd` are those that did not do all of it in one pass.
    """

    def apart(scale: float = 1.0) -> list[str]:
        twin.clear_gradients()
        twin.backward(0, scale=scale)
        return differing(twin, home, slots, scale)

    # The first and the last are alike, in case that every other step differs.
    drifting, scaled = apart(), apart(_scale(twin))
    _put_back(twin, home)
    twin.backward(0)
    doubled = differing(twin, home, slots, 2.0)
    drifting = drifting or apart()
    if drifting or not (scaled or doubled):
        # Where a step does not repeat, sums and scales say nothing.
        return {"repeats": drifting or odd}
    return {"scales": scaled, "adds": doubled}


def _accumulation_findings(
    twin: Twin, wrong: Mapping[str, list[str]], left: Sequence[str]
) -> list[StepFinding]:
    repeats, scales, adds = (wrong.get(kind, []) for kind in ("repeats", "scales", "adds"))
    added = (
        f"a second backward pass without zero_grad did not add to {listed(adds)}; something clears "
        "or rewrites .grad between passes"
        if adds
        else "a second backward pass without zero_grad adds to every gradient"
    )
    scale = _scale(twin)
    scaled = (
        f"the loss times {scale:g} did not scale {listed(scales)}; gradients are clipped or "
        "normalised before they are unscaled, do it right before the optimiser's step"
        if scales
        else f"the loss times {scale:g} scales every gradient by {scale:g}"
    )
    repeated = "zero_grad clears every gradient and an identical step repeats them"
    if left:
        repeated = f"zero_grad left the gradients of {listed(left)}; do not override it"
    elif repeats:
        repeated = f"an identical step changed the gradients of {listed(repeats)}; keep no state"
    # zero_grad is the model's own method.
    keeper = "" if left else _owner(repeats)
    return [
        finding("accumulation_adds", added, passed=not adds, culprit=_owner(adds)),
        finding("loss_scale_linear", scaled, passed=not scales, culprit=_owner(scales)),
        finding("zero_grad_repeats", repeated, passed=not (left or repeats), culprit=keeper),
    ]


def _owner(names: Sequence[str]) -> str | None:
    """The module that holds all these parameters, unless that is the whole model."""
    return (common_module(names) or None) if names else None


def _bypassed(counts: Mapping[str, tuple[int, int]]) -> list[str]:
    return [path for path, (entered, fired) in counts.items() if entered > fired]


def _calls_finding(model: nn.Module, counts: Mapping[str, tuple[int, int]]) -> StepFinding:
    bypassed = _bypassed(counts)
    detail = (
        "forward was called directly, so that hooks were bypassed, on "
        f"{listed(label(model, path) for path in bypassed)}; call the module instead"
        if bypassed
        else "every module's forward was entered by calling the module"
    )
    return finding(
        "modules_called", detail, passed=not bypassed, culprit=next(iter(bypassed), None)
    )
