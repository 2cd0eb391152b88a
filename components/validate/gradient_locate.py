"""Finds the module at fault by replaying each submodule alone on the inputs it received.

A fault also disturbs the gradients of everything upstream of it, so failing tensors alone do not
name the place. Alone, with a random cotangent on its outputs, only a module that contains the
fault fails; the one whose own children are clean is the culprit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from components.validate.gradient_nests import (
    as_real,
    is_differentiable,
    map_tensors,
    once_per_tensor,
    tensors_in,
)
from components.validate.gradient_probe import (
    FAULTS,
    Outcome,
    Point,
    Precision,
    decide,
    survey,
)
from components.validate.gradient_slots import Reading, Slot, padding_rows
from components.validate.gradient_twin import Twin

# Relative size of the nudges that move weights and inputs off a kink; zeros move by NUDGE / 20.
NUDGE = 0.02
_VARIANTS = 3


@dataclass
class Call:
    """The last call of one submodule: its inputs, detached, and its place in the order of calls.

    `tracked` holds the inputs that upstream parameters reach; only those need a gradient.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    order: int
    tracked: list[Tensor] = field(default_factory=list)


def nudged(tensor: Tensor, z: Tensor) -> Tensor:
    """`tensor` moved by about 2% of each element, keeping signs; exact zeros leave zero."""
    return tensor * (1 + NUDGE * z) + (NUDGE / 20) * z * (tensor == 0)


@contextmanager
def nudged_slots(slots: Sequence[Slot], seed: int) -> Iterator[None]:
    """Nudge every slot's values; they are restored exactly on leaving."""
    generator = torch.Generator().manual_seed(seed)
    kept = [slot.values().clone() for slot in slots]
    try:
        for slot in slots:
            values = slot.values()
            values.copy_(nudged(values, slot.normal(generator)))
        yield
    finally:
        for slot, values in zip(slots, kept, strict=True):
            slot.values().copy_(values)


def record_calls(twin: Twin, batch: int) -> dict[str, Call]:
    """Run the loss once on batch number `batch`; the last call of every module by path."""
    calls: dict[str, Call] = {}
    ticks = iter(range(1 << 62))
    handles = [
        module.register_forward_pre_hook(
            _recorder(calls, path, ticks), prepend=True, with_kwargs=True
        )
        for path, module in twin.model.named_modules()
    ]
    try:
        twin.value(batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _recorder(
    calls: dict[str, Call], path: str, ticks: Iterator[int]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(module, (), {}, next(ticks))

        def keep(tensor: Tensor) -> Tensor:
            leaf = tensor.detach().clone()
            if tensor.requires_grad and is_differentiable(tensor):
                call.tracked.append(leaf.requires_grad_())
            return leaf

        # One memo for both, so that a tensor passed twice stays one tensor.
        call.args, call.kwargs = map_tensors((args, kwargs), once_per_tensor(keep))
        calls[path] = call

    return record


def locate(
    twin: Twin, batch: int, precision: Precision, excused: frozenset[Outcome], seed: int
) -> str | None:
    """Path of the most downstream module that fails alone while its children are clean.

    Outcomes in `excused` (those that a waiver allows) do not count. None if no module fails.
    """
    calls = record_calls(twin, batch)
    search = _Search(twin, calls, precision, excused, seed)
    culprits = [path for root in search.children(None) for path in search.culprits(root)]
    return max(culprits, key=lambda path: calls[path].order, default=None)


def locate_non_finite(twin: Twin, batch: int, seed: int) -> str | None:
    """Path of the last module that turns finite inputs into a NaN or infinite result or gradient.

    A NaN spreads downstream in values, to modules that no longer have finite inputs, and upstream
    in gradients: either way the last module that makes one by itself is its source.
    """
    calls = record_calls(twin, batch)
    failing = [path for path, call in calls.items() if _spoils(twin, call, seed)]
    # A child is called after its parent, so the last call is also the innermost.
    return max(failing, key=lambda path: calls[path].order, default=None)


@final
class _Search:
    """Walks the tree of called modules, entering only those that fail."""

    def __init__(
        self,
        twin: Twin,
        calls: dict[str, Call],
        precision: Precision,
        excused: frozenset[Outcome],
        seed: int,
    ) -> None:
        self._twin = twin
        self._calls = calls
        self._precision = precision
        self._faults = FAULTS - excused
        self._seed = seed

    def children(self, parent: str | None) -> list[str]:
        """Called modules inside `parent` with no called module between; outermost for None."""
        inside = [p for p in self._calls if parent is None or _inside(p, parent)]
        return [p for p in inside if not any(_inside(p, other) for other in inside)]

    def culprits(self, path: str) -> list[str]:
        """Failing modules at or below `path` whose own children are clean."""
        if not self._fails(path):
            return []
        below = [found for child in self.children(path) for found in self.culprits(child)]
        return below or [path]

    def _fails(self, path: str) -> bool:
        call = self._calls[path]
        slots = _replay_slots(call)
        generator = torch.Generator().manual_seed(self._seed)
        points = (_Replay(self._twin, call, slots, self._seed, v) for v in range(_VARIANTS))
        found = survey(points, slots, self._precision, generator)
        decided = (decide(comparisons) for comparisons in found.values())
        return any(c is not None and c.outcome in self._faults for c in decided)


@final
class _Replay(Point):
    """One module alone: the sum of its outputs weighted by a fixed random cotangent."""

    def __init__(
        self, twin: Twin, call: Call, slots: Sequence[Slot], seed: int, variant: int
    ) -> None:
        self._twin = twin
        self._call = call
        self._slots = slots
        self._seed = seed
        self._variant = variant

    @contextmanager
    def settled(self) -> Iterator[Reading]:
        if self._variant == 0:
            yield self.reading()
            return
        with nudged_slots(self._slots, self._seed + self._variant):
            yield self.reading()

    def value(self) -> float:
        with self._twin.isolated():
            return float(self._objective()[0].detach())

    def reading(self) -> Reading:
        leaves = [leaf for slot in self._slots for leaf in slot.leaves]
        with self._twin.isolated():
            total, magnitude = self._objective()
            gradients: Sequence[Tensor | None] = [None] * len(leaves)
            if total.requires_grad and leaves:
                self._twin.backwards += 1
                gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        dense = {s.name: s.dense([g]) for s, g in zip(self._slots, gradients, strict=True)}
        return Reading(float(total.detach()), dense, magnitude)

    def _objective(self) -> tuple[Tensor, float]:
        self._twin.forwards += 1
        # Copies, because a module may work in place and a leaf would refuse that.
        copied = once_per_tensor(lambda tensor: tensor.clone())
        args, kwargs = map_tensors((self._call.args, self._call.kwargs), copied)
        outputs = [
            as_real(t)
            for t in tensors_in(self._call.module(*args, **kwargs))
            if is_differentiable(t)
        ]
        generator = torch.Generator().manual_seed(self._seed)
        total, magnitude = torch.zeros(()), 0.0
        for output in outputs:
            cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            cotangent = cotangent.to(output)
            total = total.to(output.device) + (output * cotangent).sum()
            magnitude += float(output.detach().norm()) * float(cotangent.norm())
        return total, magnitude


def _replay_slots(call: Call) -> list[Slot]:
    pinned = padding_rows(call.module)
    named: list[tuple[str, Tensor]] = [
        (f"parameter {n}", p) for n, p in call.module.named_parameters() if p.requires_grad
    ]
    named += [(f"input {index}", leaf) for index, leaf in enumerate(call.tracked)]
    return [
        Slot(name, (tensor,), pinned_row=pinned.get(id(tensor)))
        for name, tensor in named
        if tensor.numel()
    ]


def _spoils(twin: Twin, call: Call, seed: int) -> bool:
    if not all(bool(torch.isfinite(leaf).all()) for leaf in call.tracked):
        return False
    return not _Replay(twin, call, _replay_slots(call), seed, 0).reading().finite


def _inside(path: str, ancestor: str) -> bool:
    return path != ancestor and (ancestor == "" or path.startswith(f"{ancestor}."))
