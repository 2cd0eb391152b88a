"""Finds the module at fault by replaying each submodule alone on the inputs it received.

A fault also disturbs the gradients of everything upstream of it, so failing tensors alone do not
name the place. Alone, with a random cotangent on its outputs, only a module that contains the
fault fails; the one whose own children are clean is the culprit.

A module that was called several times is replayed on each of these calls, and one that cannot be
run alone is passed over in favour of its children. Outputs that carry no gradient (a mask, a
statistic) count only where there are no others, or where nothing deeper fails without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from components.validate.call_audit import hookable
from components.validate.gradients.balance import find_suspects
from components.validate.gradients.points import nudged
from components.validate.gradients.probe import FAULTS, Outcome, Point, Precision, has_gradient
from components.validate.gradients.slots import (
    Reading,
    Slot,
    generator_for,
    padding_rows,
    storage_key,
)
from components.validate.gradients.survey import decide, reads_none, survey
from components.validate.gradients.twin import Twin
from components.validate.nests import (
    as_real,
    is_differentiable,
    map_tensors,
    once_per_tensor,
    tensors_in,
)

# Nudged points first: behind a zero-initialised layer only they show anything.
_VARIANTS = (1, 2, 0)
# Calls of one module that are kept: the first ones and the last ones.
_FIRST_CALLS, _LAST_CALLS = 4, 4


@dataclass
class Call:
    """One call of a submodule: its inputs, detached, and its place in the order of calls.

    `tracked` holds the inputs that upstream parameters reach; only those need a gradient.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    order: int
    tracked: list[Tensor] = field(default_factory=list)


def record_calls(twin: Twin, batch: int) -> dict[str, list[Call]]:
    """Run the loss once on batch number `batch`; first and last calls of every module by path."""
    calls: dict[str, list[Call]] = {}
    ticks = iter(range(1 << 62))
    handles = [
        module.register_forward_pre_hook(
            _recorder(calls.setdefault(path, []), ticks), prepend=True, with_kwargs=True
        )
        for path, module in hookable(twin.model)
    ]
    try:
        twin.value(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: made for path, made in calls.items() if made}


def _recorder(
    calls: list[Call], ticks: Iterator[int]
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
        if len(calls) == _FIRST_CALLS + _LAST_CALLS:
            del calls[_FIRST_CALLS]
        calls.append(call)

    return record


def locate(
    twin: Twin, batch: int, precision: Precision, excused: frozenset[Outcome], seed: int
) -> str | None:
    """Path of the most downstream module that fails alone while its children are clean.

    Outcomes in `excused` (those that a waiver allows) do not count. None if no module fails.
    """
    calls = record_calls(twin, batch)
    strict, full = (
        _Search(twin, calls, precision, excused, seed, every_output=every)
        for every in (False, True)
    )
    found = [pair for root in strict.children(None) for pair in strict.culprits(root)]
    if not found:
        found = [pair for root in full.children(None) for pair in full.culprits(root)]
        return max(found)[1] if found else None
    # One of several outputs may be cut off inside a module whose others are sound.
    culprit = max(found)[1]
    deeper = [pair for child in full.children(culprit) for pair in full.culprits(child)]
    return max(deeper)[1] if deeper else culprit


def locate_non_finite(twin: Twin, batch: int, seed: int) -> str | None:
    """Path of the last module that turns finite inputs into a NaN or infinite result or gradient.

    A NaN spreads downstream in values, to modules that no longer have finite inputs, and upstream
    in gradients: either way the last module that makes one by itself is its source.
    """
    calls = record_calls(twin, batch)
    # A child is called after its parent, so the last call is also the innermost.
    failing = [
        (call.order, path)
        for path, made in calls.items()
        for call in made
        if _spoils(twin, call, seed)
    ]
    return max(failing)[1] if failing else None


@final
class _Search:
    """Walks the tree of called modules, entering only those that fail."""

    def __init__(
        self,
        twin: Twin,
        calls: dict[str, list[Call]],
        precision: Precision,
        excused: frozenset[Outcome],
        seed: int,
        *,
        every_output: bool,
    ) -> None:
        self._twin = twin
        self._calls = calls
        self._precision = precision
        self._faults = FAULTS - excused
        self._seed = seed
        self._every_output = every_output

    def children(self, parent: str | None) -> list[str]:
        """Called modules inside `parent` with no called module between; outermost for None."""
        inside = [p for p in self._calls if parent is None or _inside(p, parent)]
        return [p for p in inside if not any(_inside(p, other) for other in inside)]

    def culprits(self, path: str) -> list[tuple[int, str]]:
        """Failing modules at or below `path` whose own children are clean, with their order."""
        failing, unknown = self._failing_calls(path)
        if not failing and not unknown:
            return []
        below = [found for child in self.children(path) for found in self.culprits(child)]
        return below or [(call.order, path) for call in failing]

    def _failing_calls(self, path: str) -> tuple[list[Call], bool]:
        """Calls that fail when replayed, and whether some call cannot be replayed."""
        failing, unknown = [], False
        for call in self._calls[path]:
            try:
                if self._fails(call):
                    failing.append(call)
            except Exception:  # noqa: BLE001  whatever it raises without what its caller prepared
                unknown = True
        return failing, unknown

    def _fails(self, call: Call) -> bool:
        slots = _replay_slots(call)
        points = [
            Replay(self._twin, call, slots, self._seed, v, every_output=self._every_output)
            for v in _VARIANTS
        ]
        suspects = self._suspects(slots, points)
        found = survey(points, suspects, self._precision, generator_for(self._seed))
        decided = (decide(comparisons) for comparisons in found.values())
        return any(c is not None and c.outcome in self._faults for c in decided)

    def _suspects(self, slots: Sequence[Slot], points: Sequence[Point]) -> list[Slot]:
        """Slots worth comparing alone; none in a clean module, after few evaluations."""
        if not self._precision.adaptive:
            return list(slots)
        with points[0].settled() as reading:
            empty = [slot for slot in slots if not has_gradient(reading, slot)]
            generator = generator_for(self._seed, 1)
            unread = reads_none(empty, points[0], reading, self._precision, generator)
        suspects = find_suspects(slots, points, self._precision, self._seed, acquittals=2)
        return suspects if unread else [*empty, *(s for s in suspects if s not in empty)]


@final
class Replay(Point):
    """One module alone: the sum of its outputs weighted by a fixed random cotangent."""

    def __init__(
        self,
        twin: Twin,
        call: Call,
        slots: Sequence[Slot],
        seed: int,
        variant: int,
        *,
        every_output: bool = True,
    ) -> None:
        self._twin = twin
        self._call = call
        self._slots = slots
        self._seed = seed
        self._variant = variant
        self._every_output = every_output
        self._kept: dict[str, Tensor] = {}

    @contextmanager
    def settled(self) -> Iterator[Reading]:
        """Yield the reading on the recorded inputs, or on nudged weights and inputs."""
        given = {slot.name: slot.values().clone() for slot in self._slots}
        try:
            for index, slot in enumerate(self._slots if self._variant else ()):
                z = slot.normal(generator_for(self._seed, self._variant, index))
                slot.values().copy_(nudged(slot.values(), z))
            self._kept = {slot.name: slot.values().clone() for slot in self._slots}
            yield self.reading()
        finally:
            for slot in self._slots:
                slot.values().copy_(given[slot.name])
            self._kept = {}

    def reset(self, slot: Slot) -> None:
        """Give a slot the values that it has at this point."""
        slot.values().copy_(self._kept[slot.name])

    def value(self) -> float:
        """The weighted sum at the present weights and inputs."""
        with self._twin.isolated():
            return float(self._objective()[0].detach())

    def measured(self, reading: Reading) -> Reading:
        """`reading` itself: its magnitude covers rounding of the weighted sum."""
        return reading

    def reading(self) -> Reading:
        """The weighted sum and its gradients at the present weights and inputs."""
        leaves = [leaf for slot in self._slots for leaf in slot.leaves]
        with self._twin.isolated():
            total, magnitude = self._objective()
            gradients: Sequence[Tensor | None] = [None] * len(leaves)
            if total.requires_grad and leaves:
                self._twin.backwards += 1
                gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        left = iter(gradients)
        dense = {s.name: s.dense([next(left) for _ in s.leaves]) for s in self._slots}
        return Reading(float(total.detach()), dense, magnitude)

    def _objective(self) -> tuple[Tensor, float]:
        self._twin.forwards += 1
        # Copies, because a module may work in place and a leaf would refuse that.
        copied = once_per_tensor(lambda tensor: tensor.clone())
        args, kwargs = map_tensors((self._call.args, self._call.kwargs), copied)
        given = self._call.module(*args, **kwargs)
        outputs = [as_real(t) for t in tensors_in(given) if is_differentiable(t)]
        if not self._every_output and any(output.requires_grad for output in outputs):
            outputs = [output for output in outputs if output.requires_grad]
        generator = torch.Generator().manual_seed(self._seed)
        total, magnitude = torch.zeros((), device="cpu"), 0.0
        for output in outputs:
            cotangent = torch.randn(
                output.shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            cotangent = cotangent.to(output)
            total = total.to(output.device) + (output * cotangent).sum()
            magnitude += float(output.detach().norm()) * float(cotangent.norm())
        return total, magnitude


def _replay_slots(call: Call) -> list[Slot]:
    pinned = padding_rows(call.module)
    held: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in call.module.parameters():
        if parameter.requires_grad and parameter.numel():
            held.setdefault(storage_key(parameter), []).append(parameter)
    tensors = [*held.values(), *([leaf] for leaf in call.tracked if leaf.numel())]
    rows = ([pinned[id(t)] for t in leaves if id(t) in pinned] for leaves in tensors)
    return [
        Slot(f"tensor {index}", tuple(leaves), pinned_row=next(iter(row), None))
        for index, (leaves, row) in enumerate(zip(tensors, rows, strict=True))
    ]


def _spoils(twin: Twin, call: Call, seed: int) -> bool:
    if not all(bool(torch.isfinite(leaf).all()) for leaf in call.tracked):
        return False
    try:
        return not Replay(twin, call, _replay_slots(call), seed, 0).reading().finite
    except Exception:  # noqa: BLE001  a module that cannot be run alone is passed over
        return False


def _inside(path: str, ancestor: str) -> bool:
    return path != ancestor and (ancestor == "" or path.startswith(f"{ancestor}."))
