"""All tensors compared at once along one balanced direction, and bisection where that disagrees.

Every tensor takes a step at which its part of the derivative of the loss stands above rounding by
the same factor, as far as steps are neither too short nor too long for that. So each contributes
about the same, and an error of relative size rho in one of P tensors is rho / sqrt(P) of the whole.
The direction disagrees if any tensor does; halves of the set, cut between modules, lead to it in
about 2 log2(P) comparisons.

Nothing is concluded from a disagreement alone: the tensors it leads to are compared one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import final

import torch

from components.validate.gradients.probe import (
    HIDING_SHARE,
    KINK_SHARE,
    SHRINKAGE,
    STEADY_SHARE,
    Point,
    Precision,
    Rung,
    expected_slope,
    judged_again,
    reach,
    rounding_floor,
)
from components.validate.gradients.slots import Reading, Slot, generator_for

# Rounding as a share of what one tensor contributes; many tensors together may take short steps,
# and should, because every one of them brings its kinks.
_SHARE = 1e-6
# Relative steps within the balanced direction: below, rounding of the weights would show.
_SHORTEST, _LONGEST = 1e-9, 3e-5
# For tensors without a gradient, where no other tensor has one either.
_UNKNOWN_STEP = 1e-5
# The direction is tried again at these shares, as kinks get rarer with the step.
_SHRINKING = (0.1, 0.01)


def find_suspects(
    slots: Sequence[Slot],
    points: Sequence[Point],
    precision: Precision,
    seed: int,
    *,
    acquittals: int = 1,
) -> list[Slot]:
    """Slots to be compared alone, because the direction over all disagrees at two points.

    None, after two forwards each, if it agrees at the first points, `acquittals` of them.
    """
    agreements, disagreements = 0, 0
    for place, point in enumerate(points if slots else ()):
        with point.settled() as reading:
            sound = [slot for slot in slots if reading.finite_for(slot.name)]
            balance = Balance(point, reading, precision, seed + place)
            if sound and balance.agreement(sound):
                agreements += 1
            elif sound:
                disagreements += 1
                if disagreements == 2:
                    return balance.narrowed(sound)
        if agreements == 2 or (not disagreements and agreements >= acquittals):
            return []
    return list(slots) if disagreements > agreements else []


@final
@dataclass
class Balance:
    """The balanced direction over any subset of slots, at one settled point."""

    point: Point
    reading: Reading
    precision: Precision
    seed: int

    def agreement(self, slots: Sequence[Slot], *, patient: bool = True) -> Rung | None:
        """The step at which difference and gradients agree along the direction; None if none.

        Takes two forwards if they agree at once; shorter steps are tried only if `patient`. The
        rung's `h` is the median over the slots.
        """
        steps = self._steps(slots)
        first = self._measure(slots, steps, 1.0)
        if first.agrees and not first.noisy:
            return first
        if patient and first.floor <= STEADY_SHARE * first.error:
            # The cheapest way past a kink, before anything else is measured.
            short = self._shortened(slots, steps, first, KINK_SHARE)
            if short is not None:
                return short
        self.reading = self.point.measured(self.reading)
        first = judged_again(first, self.reading, self.precision)
        if first.noisy or first.agrees:
            return None if first.noisy else first
        for share in _SHRINKING if patient else ():
            short = self._shortened(slots, steps, first, share)
            if short is not None:
                return short
        return None

    def _shortened(
        self, slots: Sequence[Slot], steps: Sequence[float], first: Rung, share: float
    ) -> Rung | None:
        """The rung at a share of the steps, if it agrees and tells a kink from a fault."""
        rung = self._measure(slots, steps, share)
        shrunk = rung.error <= SHRINKAGE * share * first.error
        resolved = rung.floor <= HIDING_SHARE * rung.scale
        return rung if rung.agrees and shrunk and resolved else None

    def narrowed(self, slots: Sequence[Slot]) -> list[Slot]:
        """The single slots that the disagreement of a set leads to, by halving it."""
        if len(slots) == 1:
            return list(slots)
        cut = _cut(slots)
        first, last = slots[:cut], slots[cut:]
        found = [] if self.agreement(first, patient=False) else self.narrowed(first)
        # Where the first half agrees the other cannot, so that it need not be asked as a whole.
        if not found or not self.agreement(last, patient=False):
            found += self.narrowed(last)
        return found

    def _steps(self, slots: Sequence[Slot]) -> list[float]:
        floor = rounding_floor(self.reading, self.precision) / _SHARE
        gradients = (self.reading.gradients[slot.name] for slot in slots)
        slopes = [expected_slope(s, g) for s, g in zip(slots, gradients, strict=True)]
        steps = [
            min(max(floor / slope, _SHORTEST), _LONGEST) if slope > 0.0 else math.nan
            for slope in slopes
        ]
        known = [h for h in steps if not math.isnan(h)]
        usual = median(known) if known else _UNKNOWN_STEP
        return [usual if math.isnan(h) else h for h in steps]

    def _measure(self, slots: Sequence[Slot], steps: Sequence[float], share: float) -> Rung:
        analytic, variance, square = 0.0, 0.0, 0.0
        factors = []
        for index, (slot, h) in enumerate(zip(slots, steps, strict=True)):
            factor = share * h * reach(slot) / math.sqrt(slot.size)
            factors.append(factor)
            gradient = self.reading.gradients[slot.name]
            square += slot.size * factor**2
            if gradient is not None:
                analytic += factor * float((gradient * self._normal(slot, index)).sum())
                variance += (factor * float(gradient.norm())) ** 2
        ahead, behind = (self._shifted(slots, factors, sign) for sign in (1.0, -1.0))
        numeric = (ahead - behind) / 2
        scale = max(math.sqrt(variance), abs(numeric))
        length, h = math.sqrt(square), share * median(steps)
        rung = Rung(h, length, analytic, numeric, scale, 0.0, 0.0, noisy=False)
        return judged_again(rung, self.reading, self.precision)

    def _shifted(self, slots: Sequence[Slot], factors: Sequence[float], sign: float) -> float:
        # Values are put back by the point and directions drawn anew, which needs no memory.
        for index, (slot, factor) in enumerate(zip(slots, factors, strict=True)):
            slot.values().add_(self._normal(slot, index), alpha=sign * factor)
        try:
            return self.point.value()
        finally:
            for slot in slots:
                self.point.reset(slot)

    def _normal(self, slot: Slot, index: int) -> torch.Tensor:
        return slot.normal(generator_for(self.seed, index, 5))


def _cut(slots: Sequence[Slot]) -> int:
    """Where to halve: the boundary nearest to the middle at the uppermost level of modules."""
    paths = [slot.name.split(".") for slot in slots]
    depth = 0
    while all(len(p) > depth and p[: depth + 1] == paths[0][: depth + 1] for p in paths):
        depth += 1
    heads = [path[: depth + 1] for path in paths]
    borders = [i for i in range(1, len(slots)) if heads[i] != heads[i - 1]]
    return min(borders, key=lambda i: abs(i - len(slots) / 2))
