"""The optimiser's step on copies, compared with the update that its rule asks for.

The measured gradients are put on copies of the parameters, and a copy of the optimiser steps. For
a class of torch.optim, or one derived from it, the expected update of each parameter is that of
torch's class on it alone, in its plain implementation (foreach=False, fused=False) and without
step hooks; so a parameter that is skipped, updated twice, clipped or changed by a hook is seen.
For other classes there is no reference: every parameter with a gradient must move and stay finite.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.validate.gradients.hooks import same_values
from components.validate.gradients.lint import StepFinding, covers, finding, listed
from components.validate.gradients.random_state import kept_random_state
from components.validate.gradients.slots import Reading, Slot
from components.validate.gradients.twin import Twin
from components.validate.waivers import Waiver, WaiverKind

_NAME = "optimizer_updates"
# Relative difference of an update, and the unit roundoffs of the parameter beside it.
_UPDATE_BOUND, _ULPS = 1e-3, 8.0
# Share of the largest gradient below which one is rounding.
_NEGLIGIBLE = 1e-9
# A step of the user's own may collect gradients over some steps before it moves anything.
_PATIENCE = 8
_ROUNDS = 2


class _NotApplicableError(Exception):
    """Why this optimiser cannot be stepped on copies."""


@dataclass(frozen=True)
class _Entry:
    """A parameter of the model that the optimiser holds, its copy, and the copy's group."""

    name: str
    given: Tensor
    copied: Tensor
    group: dict[str, Any]
    measured: Tensor | None
    sparse: bool

    def gradient(self) -> Tensor | None:
        """The measured gradient as the training step would hold it, in memory of its own."""
        if self.measured is None:
            return None
        complete = self.measured
        if self.given.is_complex():
            complete = torch.view_as_complex(complete.contiguous())
        complete = complete.detach().to(self.given.dtype, copy=True)
        return complete.to_sparse(1) if self.sparse else complete


def optimizer_updates(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    home: Reading,
    twin: Twin,
    waivers: Sequence[Waiver],
) -> StepFinding:
    """Passes when a step moves every parameter as expected and zero_grad clears what is left.

    A waiver of kind `hook` excuses the parameters that it names. The given objects are never
    stepped. Memory: the copies of the parameters and of the optimiser's state.
    """
    if not home.finite:
        return finding(_NAME, "not applicable: some gradients are not finite")
    with _guarded(model, optimizer):
        try:
            stepper, copies = _copied(model, optimizer)
            entries = _entries(model, stepper, copies, home, twin)
            faults = _stepped(stepper, optimizer, entries)
            faults |= _not_cleared(stepper, entries)
        except _NotApplicableError as reason:
            return finding(_NAME, f"not applicable: {reason}")
    excuses = [w for w in waivers if w.kind is WaiverKind.HOOK]
    used = [w for w in excuses if any(covers(w, name) for name in faults)]
    open_faults = {n: why for n, why in faults.items() if not any(covers(w, n) for w in excuses)}
    if not open_faults:
        kind = type(optimizer).__name__
        detail = f"a step of {kind} moves {len(entries)} parameters as expected or declared"
        return finding(_NAME, detail, in_use=used)
    said = listed(f"{name} {why}" for name, why in open_faults.items())
    detail = (
        f"{said}; look at the optimiser's step, its hooks, zero_grad and parameter groups, or "
        "waive these with kind 'hook'"
    )
    return finding(_NAME, detail, passed=False, in_use=used)


def _stepped(
    stepper: torch.optim.Optimizer, given: torch.optim.Optimizer, entries: Sequence[_Entry]
) -> dict[str, str]:
    """What is wrong, by name of the parameter."""
    rule = _torch_rule(type(stepper))
    if rule is None:
        return _moved(stepper, entries)
    faults: dict[str, str] = {}
    for rounds in range(1, _ROUNDS + 1):
        _step_on(stepper, entries)
        for entry in entries:
            if entry.name not in faults:
                expected = _expected(rule, given, entry, rounds)
                if not _agrees(entry, expected):
                    faults[entry.name] = _described(entry, expected)
    return faults


def _not_cleared(stepper: torch.optim.Optimizer, entries: Sequence[_Entry]) -> dict[str, str]:
    _called(stepper.zero_grad)
    gradients = {entry.name: entry.copied.grad for entry in entries}
    left = [name for name, g in gradients.items() if g is not None and bool(g.any())]
    return dict.fromkeys(left, "keeps its gradient after the optimiser's zero_grad")


def _described(entry: _Entry, expected: Tensor) -> str:
    before, after = entry.given.detach(), entry.copied.detach()
    if torch.equal(before, after):
        return "did not move"
    got, want = float((after - before).norm()), float((expected - before).norm())
    return f"moved by {got:.3g} instead of {want:.3g}" if got != want else "moved elsewhere"


def _moved(stepper: torch.optim.Optimizer, entries: Sequence[_Entry]) -> dict[str, str]:
    expected = [entry for entry in entries if _must_move(entry)]
    resting: dict[str, str] = {}
    for _ in range(_PATIENCE):
        _step_on(stepper, entries)
        spoiled = {
            e.name: "became NaN or infinite"
            for e in entries
            if not bool(torch.isfinite(e.copied.detach()).all())
        }
        resting = {e.name: "did not move" for e in expected if torch.equal(e.given, e.copied)}
        if spoiled or len(resting) < len(expected) or not expected:
            return {**resting, **spoiled}
    return resting


def _must_move(entry: _Entry) -> bool:
    """True when an update in proportion to the gradient, or to its sign, is seen after rounding."""
    values, rate = entry.given.detach(), entry.group.get("lr", 1.0)
    # Some set their rate by themselves and leave None there.
    if entry.measured is None or rate is None or not float(rate) > 0:
        return False
    reach = float(rate) * min(1.0, float(entry.measured.abs().max()))
    return reach > _ULPS * torch.finfo(values.dtype).eps * float(values.abs().max())


def _agrees(entry: _Entry, expected: Tensor) -> bool:
    before, after = entry.given.detach(), entry.copied.detach()
    rounding = _ULPS * torch.finfo(before.dtype).eps * float(before.norm())
    allowed = _UPDATE_BOUND * float((expected - before).norm()) + rounding
    gap = (after - expected).masked_fill(after == expected, 0)
    return float(gap.norm()) <= allowed or bool((after.isnan() & expected.isnan()).any())


def _expected(
    rule: type[torch.optim.Optimizer], given: torch.optim.Optimizer, entry: _Entry, rounds: int
) -> Tensor:
    """The parameter after `rounds` steps of the plain rule on it alone."""
    alone = nn.Parameter(entry.given.detach().clone(), requires_grad=entry.given.requires_grad)
    known = inspect.signature(rule.__init__).parameters
    options = {k: copy.deepcopy(v) for k, v in entry.group.items() if k != "params"}
    plain = {k: False for k in ("foreach", "fused") if k in known}
    accepted = {k: v for k, v in options.items() if k in known}
    try:
        reference = rule([alone], **{**accepted, **plain})
        reference.param_groups[0].update({**options, **plain})
        if entry.given in given.state:
            reference.state[alone] = copy.deepcopy(given.state[entry.given])
        for _ in range(rounds):
            alone.grad = entry.gradient()
            _called(reference.step)
    except (AssertionError, TypeError, ValueError, KeyError, RuntimeError) as error:
        kind = rule.__name__
        raise _NotApplicableError(f"{kind} does not step one parameter alone ({error})") from error
    return alone.detach()


def _torch_rule(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer] | None:
    """The class of torch.optim that this one is or derives from; None if there is none."""
    rules = (k for k in kind.__mro__ if f"{k.__module__}.".startswith("torch.optim."))
    rule = next((k for k in rules if issubclass(k, torch.optim.Optimizer)), None)
    return None if rule is torch.optim.Optimizer else rule


def _step_on(stepper: torch.optim.Optimizer, entries: Sequence[_Entry]) -> None:
    for entry in entries:
        # Set again for every step: a hook may have changed them in place.
        entry.copied.grad = None
        entry.copied.grad = entry.gradient()
    _called(stepper.step)


def _called(method: Callable[[], object]) -> None:
    try:
        method()
    except Exception as error:
        raise _NotApplicableError(
            f"outside of training {method.__name__} raised {type(error).__name__}: {error}"
        ) from error


def _copied(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.optim.Optimizer, dict[int, Tensor]]:
    """A copy of the optimiser, with state and hooks, over copies of its parameters by their id."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise _NotApplicableError(f"{type(optimizer).__name__} steps with a closure")
    given = [*model.parameters(), *(p for g in optimizer.param_groups for p in g["params"])]
    try:
        copies = {id(p): _leaf_copy(p) for p in {id(p): p for p in given}.values()}
        stepper: torch.optim.Optimizer = object.__new__(type(optimizer))
        # Not copy.deepcopy(optimizer): Optimizer.__getstate__ leaves out hooks and own attributes.
        memo: dict[int, Any] = {**copies, id(optimizer): stepper}
        own = {k: v for k, v in vars(optimizer).items() if not _is_scheduled_step(k, v)}
        vars(stepper).update(copy.deepcopy(own, memo))
    except (TypeError, RuntimeError, AttributeError) as error:
        raise _NotApplicableError(f"the optimiser cannot be copied ({error})") from error
    if not isinstance(vars(stepper).get("step", stepper.step), types.MethodType):
        raise _NotApplicableError("step was replaced by a function bound to the given optimiser")
    return stepper, copies


def _leaf_copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied.requires_grad_(tensor.requires_grad)


def _is_scheduled_step(name: str, value: object) -> bool:
    # A learning-rate scheduler shadows step by one that counts calls of the given optimiser.
    return name == "step" and hasattr(value, "_wrapped_by_lr_sched")


def _entries(
    model: nn.Module,
    stepper: torch.optim.Optimizer,
    copies: dict[int, Tensor],
    home: Reading,
    twin: Twin,
) -> list[_Entry]:
    groups = {id(p): group for group in stepper.param_groups for p in group["params"]}
    # Two parameters that share storage are moved twice, which has no simple reference.
    measured = {s.name: _visible(s, home) for s in twin.slots if len(s.leaves) == 1}
    shared = {n for s in twin.slots if len(s.leaves) > 1 for n in (s.name, *s.aliases)}
    tables = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    sparse = {id(table.weight) for table in tables if table.sparse}
    return [
        _Entry(
            name, p, copies[id(p)], groups[id(copies[id(p)])], measured.get(name), id(p) in sparse
        )
        for name, p in model.named_parameters()
        if id(copies[id(p)]) in groups and name not in shared and p.numel()
    ]


def _visible(slot: Slot, home: Reading) -> Tensor | None:
    """The measured gradient, or a random one where it is zero but for rounding.

    The optimiser cannot know the difference, and a skipped update of nothing is not seen.
    """
    gradient = home.gradients[slot.name]
    sizes = (float(g.norm()) / g.numel() ** 0.5 for g in home.gradients.values() if g is not None)
    largest = max(sizes, default=0.0)
    if gradient is None or float(gradient.norm()) > _NEGLIGIBLE * largest * gradient.numel() ** 0.5:
        return gradient
    return largest * slot.normal(torch.Generator().manual_seed(0))


@contextmanager
def _guarded(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put parameters, gradients and group options back; keep the random state.

    A hook or a step of the user's own may close over the objects that it was written for.
    """
    tensors = list(model.parameters())
    foreign = _torch_rule(type(optimizer)) is not type(optimizer) or any(
        vars(optimizer).get(kind)
        for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    )
    values = [tensor.detach().clone() for tensor in tensors] if foreign else []
    gradients = [tensor.grad for tensor in tensors]
    options = [dict(group) for group in optimizer.param_groups]
    devices = sorted({t.device for t in tensors if t.is_cuda}, key=str)
    try:
        for tensor in tensors:
            # Out of reach of hooks that clip what the given parameters hold.
            tensor.grad = None
        with kept_random_state(devices):
            yield
    finally:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        for tensor, kept in zip(tensors, values, strict=bool(values)):
            if not same_values(tensor.detach(), kept):
                tensor.data.copy_(kept)
        for group, option in zip(optimizer.param_groups, options, strict=True):
            group.clear()
            group.update(option)
