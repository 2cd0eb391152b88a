"""Gradients with hooks and activation checkpointing, and without: they must be the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from math import isfinite
from typing import Any

import torch
from torch import nn

from components.validate.gradients.hooks import BACKWARD_HOOKS, has_hook
from components.validate.gradients.lint import (
    StepFinding,
    common_module,
    covers,
    finding,
    label,
    listed,
)
from components.validate.gradients.recompute import plain_checkpoints
from components.validate.gradients.slots import Reading, Slot
from components.validate.gradients.twin import Twin
from components.validate.waivers import Waiver, WaiverKind

HOOKS = "hooks_keep_gradients"
# Identical backward passes may differ by the summation order of a parallel device.
_REPEAT_UNITS = 1e4
# A gradient that cancels to zero, as of a shift before a softmax, leaves the rounding of its terms.
_CANCELLED_UNITS = 1e2
# The same with numbers of lower precision inside, where half precision may lose small ones.
_LOWERED_BOUND = 1e-2
# Modules with hooks that are tried one by one to find the one that changes gradients.
_SUSPECTS = 16


def hooks_and_checkpoints(
    twin: Twin, home: Reading, checkpoints: Sequence[str], waivers: Sequence[Waiver]
) -> tuple[list[StepFinding], list[str]]:
    """One pass without hooks and without checkpointing; more only if it gives other gradients."""
    slots = [slot for slot in twin.slots if home.finite_for(slot.name)]
    changed: list[str] = []
    recomputed: list[str] = []
    if twin.has_hooks or checkpoints:
        off = _without(twin, home, slots, hooks=twin.has_hooks, checkpoints=bool(checkpoints))
        if off and twin.has_hooks:
            changed = _without(twin, home, slots, hooks=True) if checkpoints else off
        if off and checkpoints:
            recomputed = _without(twin, home, slots, checkpoints=True) if twin.has_hooks else off
    twin.clear_gradients()
    return [
        _hooks_finding(twin, changed, waivers),
        _checkpoints_finding(twin.model, recomputed, checkpoints),
    ], changed


def _without(
    twin: Twin,
    home: Reading,
    slots: Sequence[Slot],
    *,
    hooks: bool = False,
    checkpoints: bool = False,
) -> list[str]:
    twin.clear_gradients()
    with ExitStack() as stack:
        if hooks:
            stack.enter_context(twin.hooks_off())
        if checkpoints:
            stack.enter_context(plain_checkpoints())
        twin.backward(0)
    return differing(twin, home, slots, 1.0)


def _hooks_finding(twin: Twin, changed: Sequence[str], waivers: Sequence[Waiver]) -> StepFinding:
    slots = {slot.name: slot for slot in twin.slots}
    own = [name for name, slot in slots.items() if any(map(has_hook, slot.leaves))]
    excuses = [w for w in waivers if w.kind is WaiverKind.HOOK]
    # Whether a clipping hook bites depends on the data, so a hook that is there is excuse enough.
    touched = {*changed, *own}
    used = [w for w in excuses if _names_only(w, slots, touched)]
    open_names = [n for n in changed if not any(covers(w, n, slots[n].aliases) for w in excuses)]
    if not open_names:
        good = "hooks leave every gradient as it is" if twin.has_hooks else "there are no hooks"
        detail = f"hooks change {len(changed)} gradients, all declared" if changed else good
        return finding(HOOKS, detail, in_use=used)
    culprit = _hook_owner(twin, open_names, own)
    detail = (
        f"a hook of {label(twin.model, culprit)} changes the gradients of {listed(open_names)}; "
        "remove it or waive these with kind 'hook'"
    )
    return finding(HOOKS, detail, passed=False, culprit=culprit, in_use=used)


def _names_only(waiver: Waiver, slots: Mapping[str, Slot], touched: set[str]) -> bool:
    named = [name for name, slot in slots.items() if covers(waiver, name, slot.aliases)]
    return bool(named) and all(name in touched for name in named)


def _hook_owner(twin: Twin, changed: Sequence[str], own: Sequence[str]) -> str:
    """The module whose own hook changes gradients; of parameters first, as those act alone."""
    of_parameters = [name for name in changed if name in own]
    if len(of_parameters) == len(changed):
        return common_module(of_parameters)
    suspects: list[tuple[str, list[dict[int, Any]]]] = [
        (path, hooks)
        for path, module in twin.model.named_modules()
        if (hooks := [vars(module)[kind] for kind in BACKWARD_HOOKS if vars(module).get(kind)])
    ]
    for path, registries in suspects[:_SUSPECTS]:
        kept = [dict(registry) for registry in registries]
        if _changes_alone(twin, registries, kept, [s for s in twin.slots if s.name in changed]):
            return path
    return common_module(changed)


def _changes_alone(
    twin: Twin,
    registries: Sequence[dict[int, Callable[..., Any]]],
    kept: Sequence[Mapping[int, Callable[..., Any]]],
    slots: Sequence[Slot],
) -> bool:
    with twin.hooks_off():
        plain = twin.reading(0)
        for registry, hooks in zip(registries, kept, strict=True):
            registry.update(hooks)
        twin.backward(0)
        changed = differing(twin, plain, slots, 1.0)
        for registry in registries:
            registry.clear()
    return bool(changed)


def _checkpoints_finding(
    model: nn.Module, recomputed: Sequence[str], checkpoints: Sequence[str]
) -> StepFinding:
    name = "checkpointing_agrees"
    if not checkpoints:
        return finding(name, "torch.utils.checkpoint is not used")
    if not recomputed:
        return finding(name, "gradients are those without activation checkpointing")
    detail = (
        f"without activation checkpointing other gradients: {listed(recomputed)}; recomputing in "
        f"{label(model, checkpoints[-1])} must repeat the forward pass (keep "
        "preserve_rng_state=True, no state, inputs that require grad if reentrant)"
    )
    return finding(name, detail, passed=False, culprit=checkpoints[-1])


def differing(twin: Twin, home: Reading, slots: Sequence[Slot], factor: float) -> list[str]:
    """Slots whose `.grad` is not `factor` times the gradient of `home`; NaN differs."""
    bound = _REPEAT_UNITS * torch.finfo(torch.float64).eps
    if twin.lowered:
        bound = _LOWERED_BOUND
    norms = (float(g.norm()) for g in home.gradients.values() if g is not None)
    largest = max((n for n in norms if isfinite(n)), default=0.0)
    floor = _CANCELLED_UNITS * torch.finfo(torch.float64).eps * largest
    names = []
    for slot in slots:
        expected, got = home.gradients[slot.name], twin.gradient(slot)
        if expected is None or got is None:
            same = not any(g is not None and bool(g.any()) for g in (expected, got))
        else:
            gap = float(torch.sub(got, expected, alpha=factor).norm())
            same = gap <= factor * (bound * float(expected.norm()) + floor)
        if not same:
            names.append(slot.name)
    return names
