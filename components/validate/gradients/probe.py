"""Directional derivatives by two-sided differences, compared with automatic gradients.

For a tensor w of n elements and z ~ N(0, I) the step is delta = h r z / ||z|| with the reach
r = ||w|| + 0.05 sqrt(n), and (L(w + delta) - L(w - delta)) / 2 is compared with <g, delta>. One
Gaussian direction sees an error in any element (cf. `jax.test_util.check_grads`); torch's own fast
gradcheck scales its tolerance by the projection and passes gross errors on large tensors. The
absolute part of the step keeps faults in zero-initialised tensors visible.

Allowed are 1e-6 max(||g|| ||delta|| / sqrt(n), |difference|) + 50 eps |L| plus measured noise. An
error of relative size rho is missed with a probability of about 0.8 tau / rho, where tau is what
is allowed over ||g|| ||delta|| / sqrt(n).

The first h is the smallest at which rounding of the loss is still small against the derivative
that g predicts: the shorter the step, the rarer a kink (ReLU, max) lies within. On disagreement
noise and rounding are measured, and h goes down a ladder from 1e-4: where a kink lies within the
step, the error relative to the step shrinks with h; where the gradient is wrong, it stays.

A tensor is compared alone in one mode, train, unless its gradient is below rounding there and not
in eval mode. All tensors together are compared in the other mode along one balanced direction (see
`balance`), which disagrees if any of them does; bisection then finds which. Beyond a limit
of tensors, both modes are examined that way. Where both gradients are below rounding at the given
weights, the tensor is compared at nudged weights on another batch. Where some tensors mismatch, a
second direction is tried on those that passed alone, since the first may have missed them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum, auto

import torch
from torch import Tensor

from components.validate.gradients.slots import Reading, Slot

STEP_FLOOR = 0.05
ROUNDING_UNITS = 50.0
# The first step is the shortest at which the rounding floor is this share of the derivative; only
# where that asks for too long a step, the larger share will do.
FIRST_SHARE, LARGER_SHARE = 1e-6, 1e-5
SHORTEST, USUAL, LONGEST = 1e-8, 1e-4, 1e-3
# After a disagreement, a floor above this share of the derivative hides what is sought.
HIDING_SHARE = 0.01
# A smaller step acquits only if the error fell at least this much faster than the step did.
SHRINKAGE = 0.5
# After a disagreement the next step is this share of the first: kinks get rarer with the step.
KINK_SHARE = 0.02
# From this many rungs on, an error proportional to the step (to this share) is a wrong gradient;
# one that still moves comes from kinks, which get rarer as steps shrink, so the ladder goes on.
MIN_RUNGS = 3
STEADY_SHARE = 0.01
# Two steps that differ by this factor say as much as the rungs of a ladder.
FAR_APART = 50.0
# Relative steps that reach across the plateaus of a step function such as torch.round.
PLATEAU_STEPS = (0.1, 1.0)
PLATEAU_FLOOR = 0.5
# So far from the point a loss rounds more coarsely; a reaction must exceed the floor by this.
_PLATEAU_UNITS = 1e4


@dataclass(frozen=True)
class Precision:
    """Relative tolerance, unit roundoff, the ladder of relative steps, largest first, and more.

    `resolved` is the largest rounding floor, as a share of the derivative, at which an agreement
    is conclusive; `adaptive` says that the first step follows the rounding floor.
    """

    relative: float
    epsilon: float
    steps: tuple[float, ...]
    resolved: float
    adaptive: bool


STRICT = Precision(
    1e-6, torch.finfo(torch.float64).eps, (USUAL, 1e-5, 1e-6, 1e-7, SHORTEST), 1e-4, adaptive=True
)
# For models with float32 inside: steps long enough to rise above float32 rounding of the loss.
LOOSE = Precision(1e-2, torch.finfo(torch.float32).eps, (LONGEST, USUAL), 1e-2, adaptive=False)


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
AGREEMENTS = frozenset({Outcome.AGREES, Outcome.UNRESOLVED})


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

    @abstractmethod
    def reset(self, slot: Slot) -> None:
        """Give a slot the values that it has at this point; only while settled."""

    @abstractmethod
    def measured(self, reading: Reading) -> Reading:
        """`reading` with noise and rounding of the scalar measured, as far as that is possible."""


def compare(
    slot: Slot,
    point: Point,
    reading: Reading,
    precision: Precision,
    generator: torch.Generator,
) -> Comparison:
    """Try the first step, then climb down the ladder until both derivatives agree; classify."""
    line = _Line(slot, slot.normal(generator), reading.gradients[slot.name], point, precision)
    first = line.measure(line.first_step(reading), reading)
    if first.noisy:
        return Comparison(Outcome.NOISY, first)
    if first.agrees:
        return line.agreement(first, reading, doubted=False)
    if precision.adaptive and first.floor <= STEADY_SHARE * first.error:
        shorter = line.shortened(first, reading)
        if shorter is not None:
            return shorter
    reading = point.measured(reading)
    first = judged_again(first, reading, precision)
    if first.noisy or first.agrees:
        noisy = Comparison(Outcome.NOISY, first)
        return noisy if first.noisy else line.agreement(first, reading, doubted=False)
    return line.descended(first, reading)


def judged_again(rung: Rung, reading: Reading, precision: Precision) -> Rung:
    """The same differences, held to what noise and rounding of `reading` allow."""
    floor = rounding_floor(reading, precision)
    allowed = precision.relative * rung.scale + floor
    noisy = reading.noise > allowed
    return replace(rung, floor=floor, tolerance=allowed + reading.noise, noisy=noisy)


def rounding_floor(reading: Reading, precision: Precision) -> float:
    """What rounding of the loss may come to, as far as it is known."""
    return ROUNDING_UNITS * precision.epsilon * reading.magnitude + reading.rounding


def has_gradient(reading: Reading, slot: Slot) -> bool:
    """True when some element of the slot's gradient is not zero."""
    gradient = reading.gradients[slot.name]
    return gradient is not None and bool(gradient.any())


def reach(slot: Slot) -> float:
    """Length of the step at h = 1; the absolute part moves tensors that are zero."""
    return float(slot.values().norm()) + STEP_FLOOR * math.sqrt(slot.size)


def reaction(reading: Reading, precision: Precision) -> float:
    """Change of the loss, after a step off a plateau, that rounding and noise do not explain."""
    units = _PLATEAU_UNITS if precision.adaptive else 1.0
    return units * rounding_floor(reading, precision) + 2 * reading.noise


def plateau_reach(slot: Slot) -> float:
    """Length of a step that is to leave a plateau, also for a tensor of zeros."""
    return float(slot.values().norm()) + PLATEAU_FLOOR * math.sqrt(slot.size)


def expected_slope(slot: Slot, gradient: Tensor | None) -> float:
    """Size of the derivative to expect along a random step with h = 1."""
    if gradient is None:
        return 0.0
    return float(gradient.norm()) * reach(slot) / math.sqrt(slot.size)


def first_step(slope: float, reading: Reading, precision: Precision) -> float:
    """The relative step h to begin with, for a tensor of that expected slope.

    Rounding is to be a share of 1e-6 of the derivative; where steps get long, 1e-5 is enough.
    """
    floor = rounding_floor(reading, precision)
    if not precision.adaptive or not 0.0 < slope < math.inf or floor == 0.0:
        return precision.steps[0]
    shortest = floor / (FIRST_SHARE * slope)
    if shortest <= USUAL:
        return max(shortest, SHORTEST)
    return min(max(floor / (LARGER_SHARE * slope), USUAL), LONGEST)


def is_visible(slot: Slot, reading: Reading, precision: Precision) -> bool:
    """True when the slot's gradient is large enough to tell from rounding of the loss."""
    if not precision.adaptive:
        return has_gradient(reading, slot)
    slope = expected_slope(slot, reading.gradients[slot.name])
    return rounding_floor(reading, precision) < precision.resolved * LONGEST * slope


@dataclass(frozen=True)
class _Line:
    """One slot moved to and fro along one direction at one point."""

    slot: Slot
    direction: Tensor
    gradient: Tensor | None
    point: Point
    precision: Precision

    def first_step(self, reading: Reading) -> float:
        slope = expected_slope(self.slot, self.gradient)
        return first_step(slope, reading, self.precision)

    def measure(self, h: float, reading: Reading) -> Rung:
        norm = float(self.direction.norm())
        # A direction is zero only when every row is pinned; any step is then as good as none.
        factor = h * reach(self.slot) / (norm or 1.0)
        numeric = (self.shifted(factor) - self.shifted(-factor)) / 2
        analytic, steepness = 0.0, 0.0
        if self.gradient is not None:
            analytic = factor * float((self.gradient * self.direction).sum())
            steepness = float(self.gradient.norm())
        length = factor * norm
        scale = max(steepness * length / math.sqrt(self.slot.size), abs(numeric))
        rung = Rung(h, length, analytic, numeric, scale, 0.0, 0.0, noisy=False)
        return judged_again(rung, reading, self.precision)

    def shifted(self, factor: float) -> float:
        values = self.slot.values()
        kept = values.clone()
        values.add_(self.direction, alpha=factor)
        try:
            return self.point.value()
        finally:
            values.copy_(kept)

    def shortened(self, first: Rung, reading: Reading) -> Comparison | None:
        """Agreement at a much shorter step, the cheapest way past a kink; None if there is none."""
        rung = self.measure(first.h * KINK_SHARE, reading)
        if not rung.agrees or not _fell_faster_than_step([first, rung]):
            return None
        found = self.agreement(rung, reading, doubted=True)
        return found if found.outcome is Outcome.AGREES else None

    def descended(self, first: Rung, reading: Reading) -> Comparison:
        """After a disagreement at the first step: the ladder, and where it ends."""
        ladder = [first] if first.h >= self.precision.steps[0] else []
        for h in _below(first.h, self.precision) if ladder else self.precision.steps:
            ladder.append(self.measure(h, reading))
            if ladder[-1].noisy:
                return Comparison(Outcome.NOISY, ladder[-1])
            if ladder[-1].agrees and _fell_faster_than_step(ladder):
                return self.agreement(ladder[-1], reading, doubted=True)
            if _far_apart_and_steady(first, ladder[-1]):
                break
            if len(ladder) >= MIN_RUNGS and _is_steady(ladder):
                break
        # Below the rounding floor the last rung says nothing; the first is the best resolved one.
        decisive = ladder[0] if ladder[-1].agrees else ladder[-1]
        return Comparison(_fault(self.gradient, decisive, self.precision), decisive)

    def agreement(self, rung: Rung, reading: Reading, *, doubted: bool) -> Comparison:
        gradient = self.gradient
        if gradient is None or not bool(gradient.any()):
            if gradient is not None and reading.loss == 0.0:
                # A satisfied hinge: flat, with nothing to tell a used tensor from an unused one.
                return Comparison(Outcome.HIDDEN, rung)
            reacts = self.reacts_beyond_plateau(reading)
            return Comparison(Outcome.BROKEN_PATH if reacts else Outcome.SILENT, rung)
        if rung.floor <= self.precision.resolved * rung.scale:
            return Comparison(Outcome.AGREES, rung)
        hidden = doubted and rung.floor > HIDING_SHARE * rung.scale
        return Comparison(Outcome.HIDDEN if hidden else Outcome.UNRESOLVED, rung)

    def reacts_beyond_plateau(self, reading: Reading) -> bool:
        norm = float(self.direction.norm()) or 1.0
        scale = plateau_reach(self.slot) / norm
        moves = (abs(self.shifted(h * scale) - reading.loss) for h in PLATEAU_STEPS)
        return any(move > reaction(reading, self.precision) for move in moves)


def _below(h: float, precision: Precision) -> list[float]:
    rungs = round(math.log10(h / precision.steps[-1]))
    return [h * 10.0**-k for k in range(1, rungs + 1)]


def _fell_faster_than_step(ladder: Sequence[Rung]) -> bool:
    first, last = ladder[0], ladder[-1]
    if len(ladder) == 1:
        return True
    return last.error * first.length <= SHRINKAGE * first.error * last.length


def _far_apart_and_steady(first: Rung, rung: Rung) -> bool:
    """An error proportional to the step over a wide range of steps is no kink."""
    wide = rung.h >= FAR_APART * first.h
    return wide and first.floor <= STEADY_SHARE * first.error and _is_steady([rung, first])


def _is_steady(ladder: Sequence[Rung]) -> bool:
    before, last = ((rung.numeric - rung.analytic) / (rung.length or 1.0) for rung in ladder[-2:])
    return abs(last - before) <= STEADY_SHARE * abs(last)


def _fault(gradient: Tensor | None, rung: Rung, precision: Precision) -> Outcome:
    if gradient is None or not bool(gradient.any()):
        return Outcome.BROKEN_PATH
    if abs(rung.numeric) <= rung.floor + precision.relative * rung.scale:
        return Outcome.SURROGATE
    return Outcome.MISMATCH
