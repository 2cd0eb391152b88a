"""Directional derivatives by two-sided differences, compared with automatic gradients.

For a tensor w of n elements and z ~ N(0, I) the step is
delta = h (||w|| + 0.05 sqrt(n)) z / ||z||, and (L(w + delta) - L(w - delta)) / 2 is compared with
<g, delta>. One Gaussian direction sees an error in any element (cf. `jax.test_util.check_grads`);
torch's own fast gradcheck scales its tolerance by the projection and passes gross errors on large
tensors. The absolute part of the step keeps faults in zero-initialised tensors visible.

Allowed are 1e-6 max(||g|| ||delta|| / sqrt(n), |difference|) + 50 eps |L| plus measured noise.
On disagreement h goes down a ladder from 1e-4: where a kink (ReLU, max) lies within the step, the
error relative to the step shrinks with h; where the gradient is wrong, it stays.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from components.validate.gradient_slots import Reading, Slot

STEP_FLOOR = 0.05
ROUNDING_UNITS = 50.0
# A rounding floor above this share of the expected derivative leaves an agreement inconclusive.
RESOLVED_SHARE = 0.01
# A smaller step acquits only if the error fell at least this much faster than the step did.
SHRINKAGE = 0.5
# From this many rungs on, an error proportional to the step (to this share) is a wrong gradient;
# one that still moves comes from kinks, which get rarer as steps shrink, so the ladder goes on.
MIN_RUNGS = 3
STEADY_SHARE = 0.01
# Relative steps that reach across the plateaus of a step function such as torch.round.
PLATEAU_STEPS = (0.1, 1.0)


@dataclass(frozen=True)
class Precision:
    """Relative tolerance, unit roundoff and the ladder of relative steps, largest first."""

    relative: float
    epsilon: float
    steps: tuple[float, ...]


STRICT = Precision(1e-6, torch.finfo(torch.float64).eps, (1e-4, 1e-5, 1e-6, 1e-7, 1e-8))
# For models with float32 inside: steps long enough to rise above float32 rounding of the loss.
LOOSE = Precision(1e-2, torch.finfo(torch.float32).eps, (1e-2, 1e-3, 1e-4))


class Outcome(Enum):
    """What one comparison says about one tensor at one point."""

    AGREES = auto()
    UNRESOLVED = auto()  # agrees at once, but both are below what rounding lets one see
    HIDDEN = auto()  # cannot be seen: below rounding after a disagreement, or a loss flat at zero
    SILENT = auto()
    BROKEN_PATH = auto()
    SURROGATE = auto()
    MISMATCH = auto()
    NOISY = auto()


FAULTS = frozenset({Outcome.BROKEN_PATH, Outcome.SURROGATE, Outcome.MISMATCH})
_AGREEMENTS = frozenset({Outcome.AGREES, Outcome.UNRESOLVED})


@dataclass(frozen=True)
class Rung:
    """One step h on the ladder. All but `h` and `length` are in units of the loss.

    `analytic` is <g, delta>, `numeric` the two-sided half difference, `scale` their expected
    size, `floor` the rounding floor, `tolerance` what their difference may be, `length` ||delta||.
    """

    h: float
    length: float
    analytic: float
    numeric: float
    scale: float
    floor: float
    tolerance: float
    noisy: bool

    @property
    def error(self) -> float:
        """Distance between the two derivatives along the step."""
        return abs(self.numeric - self.analytic)

    @property
    def agrees(self) -> bool:
        """True when the error is within the tolerance; False for NaN."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Comparison:
    """The outcome for one tensor at one point, and the rung that decided it."""

    outcome: Outcome
    rung: Rung


class Point(ABC):
    """Weights and data at which a scalar function of the slots' tensors can be evaluated."""

    @abstractmethod
    def settled(self) -> AbstractContextManager[Reading]:
        """Install the point's weights; yields loss and gradients there; restores on leaving."""

    @abstractmethod
    def value(self) -> float:
        """The scalar at the present weights; one forward."""


def survey(
    points: Iterable[Point], slots: Sequence[Slot], precision: Precision, generator: torch.Generator
) -> dict[str, list[Comparison]]:
    """Compare every slot at the first point, and at further points only while in doubt.

    A kink (ReLU, max) or a vanishing gradient at one point is no verdict, so only inconclusive
    slots move on. Where the loss or the slot's gradient is not finite, nothing is compared.
    """
    found: dict[str, list[Comparison]] = {slot.name: [] for slot in slots}
    doubtful = list(slots)
    for point in points:
        if not doubtful:
            break
        with point.settled() as reading:
            for slot in doubtful:
                if reading.finite_for(slot.name):
                    found[slot.name].append(compare(slot, point, reading, precision, generator))
        doubtful = [slot for slot in doubtful if not _conclusive(found[slot.name])]
    return found


def decide(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The comparison that stands for all; None if there was no usable point.

    Two faults out of three convict. One fault convicts only if no point showed an agreement.
    """
    faults = [c for c in comparisons if c.outcome in FAULTS]
    agreements = [c for c in comparisons if c.outcome in _AGREEMENTS]
    noisy = [c for c in comparisons if c.outcome is Outcome.NOISY]
    if noisy:
        return noisy[0]
    if len(faults) >= 2 or (faults and not agreements):
        return max(faults, key=lambda c: c.rung.error / (c.rung.scale or 1.0))
    if agreements:
        return min(agreements, key=lambda c: c.outcome is Outcome.UNRESOLVED)
    hidden = [c for c in comparisons if c.outcome is Outcome.HIDDEN]
    return next(iter([*hidden, *comparisons]), None)


def compare(
    slot: Slot,
    point: Point,
    reading: Reading,
    precision: Precision,
    generator: torch.Generator,
) -> Comparison:
    """Climb down the ladder of steps until both derivatives agree; classify where it ended."""
    gradient = reading.gradients[slot.name]
    direction = slot.normal(generator)
    ladder: list[Rung] = []
    for h in precision.steps:
        ladder.append(_measure(slot, gradient, direction, h, point, reading, precision))
        if ladder[-1].noisy:
            return Comparison(Outcome.NOISY, ladder[-1])
        if ladder[-1].agrees and _fell_faster_than_step(ladder):
            return _agreement(slot, gradient, direction, point, reading, ladder)
        if len(ladder) >= MIN_RUNGS and _is_steady(ladder):
            break
    # Below the rounding floor the last rung says nothing; the first is the best resolved one.
    decisive = ladder[0] if ladder[-1].agrees else ladder[-1]
    return Comparison(_fault(gradient, decisive, precision), decisive)


def _measure(
    slot: Slot,
    gradient: Tensor | None,
    direction: Tensor,
    h: float,
    point: Point,
    reading: Reading,
    precision: Precision,
) -> Rung:
    delta = _step(slot, direction, h)
    numeric = (_shifted(slot, delta, point) - _shifted(slot, -delta, point)) / 2
    analytic = 0.0 if gradient is None else float((gradient * delta).sum())
    steepness = 0.0 if gradient is None else float(gradient.norm())
    length = float(delta.norm())
    scale = max(steepness * length / math.sqrt(delta.numel()), abs(numeric))
    floor = ROUNDING_UNITS * precision.epsilon * reading.magnitude + reading.rounding
    allowed = precision.relative * scale + floor
    noisy = reading.noise > allowed
    return Rung(h, length, analytic, numeric, scale, floor, allowed + reading.noise, noisy)


def _step(slot: Slot, direction: Tensor, h: float) -> Tensor:
    values = slot.values()
    reach = float(values.norm()) + STEP_FLOOR * math.sqrt(values.numel())
    # A direction can only be zero when every row is pinned; any step is then as good as none.
    return direction * (h * reach / (float(direction.norm()) or 1.0))


def _shifted(slot: Slot, delta: Tensor, point: Point) -> float:
    values = slot.values()
    kept = values.clone()
    values.add_(delta)
    try:
        return point.value()
    finally:
        values.copy_(kept)


def _fell_faster_than_step(ladder: Sequence[Rung]) -> bool:
    first, last = ladder[0], ladder[-1]
    if len(ladder) == 1:
        return True
    return last.error * first.length <= SHRINKAGE * first.error * last.length


def _is_steady(ladder: Sequence[Rung]) -> bool:
    before, last = ((rung.numeric - rung.analytic) / (rung.length or 1.0) for rung in ladder[-2:])
    return abs(last - before) <= STEADY_SHARE * abs(last)


def _agreement(
    slot: Slot,
    gradient: Tensor | None,
    direction: Tensor,
    point: Point,
    reading: Reading,
    ladder: Sequence[Rung],
) -> Comparison:
    rung = ladder[-1]
    if gradient is None or not bool(gradient.any()):
        if gradient is not None and reading.loss == 0.0:
            # A satisfied hinge: flat, with nothing to tell a used tensor from an unused one.
            return Comparison(Outcome.HIDDEN, rung)
        reacts = _reacts_beyond_plateau(slot, direction, point, reading, rung)
        return Comparison(Outcome.BROKEN_PATH if reacts else Outcome.SILENT, rung)
    if rung.floor <= RESOLVED_SHARE * rung.scale:
        return Comparison(Outcome.AGREES, rung)
    return Comparison(Outcome.UNRESOLVED if len(ladder) == 1 else Outcome.HIDDEN, rung)


def _reacts_beyond_plateau(
    slot: Slot, direction: Tensor, point: Point, reading: Reading, rung: Rung
) -> bool:
    for h in PLATEAU_STEPS:
        moved = _shifted(slot, _step(slot, direction, h), point)
        if abs(moved - reading.loss) > rung.floor + 2 * reading.noise:
            return True
    return False


def _fault(gradient: Tensor | None, rung: Rung, precision: Precision) -> Outcome:
    if gradient is None or not bool(gradient.any()):
        return Outcome.BROKEN_PATH
    if abs(rung.numeric) <= rung.floor + precision.relative * rung.scale:
        return Outcome.SURROGATE
    return Outcome.MISMATCH


def _conclusive(comparisons: Sequence[Comparison]) -> bool:
    outcomes = [c.outcome for c in comparisons]
    faults = sum(outcome in FAULTS for outcome in outcomes)
    if faults == 0:
        return Outcome.AGREES in outcomes or Outcome.NOISY in outcomes
    return faults >= 2
