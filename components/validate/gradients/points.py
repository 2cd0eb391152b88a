"""The points at which the loss is compared with its gradient, and how exactly it can be seen there.

Point 0 is the first batch on the given weights; at the others, with a batch each, the weights are
nudged as well: at a trained optimum or behind a zero-initialised layer gradients vanish, and a
kink at one point is rarely one at the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from components.validate.gradients.probe import Point
from components.validate.gradients.slots import Reading, Slot, generator_for
from components.validate.gradients.twin import Twin

# Relative size of the nudges that move weights and inputs off a kink; zeros move by NUDGE / 20.
NUDGE = 0.02
# Identical evaluations beyond the first, taken only when two of them differ.
_NOISE_SAMPLES = 5
# Last digits that the weights are moved by to measure how the loss rounds, and its margin.
_ROUNDING_ULPS = 4.0
_ROUNDING_MARGIN = 8.0
_ROUNDING_SAMPLES = 2
# What rounding of numbers of order one can come to.
_ROUNDING_LIMIT = 1e-13


def nudged(tensor: Tensor, z: Tensor) -> Tensor:
    """`tensor` moved by about 2% of each element, keeping signs; exact zeros leave zero."""
    return tensor * (1 + NUDGE * z) + (NUDGE / 20) * z * (tensor == 0)


@final
class Errors:
    """Noise and rounding of the loss in one mode; measured once, when first in doubt."""

    def __init__(self) -> None:
        self.noise = 0.0
        self.rounding = 0.0
        self.measured = False

    def on(self, reading: Reading) -> Reading:
        """`reading` with what is known so far."""
        return replace(reading, noise=self.noise, rounding=self.rounding)


@final
class LossPoint(Point):
    """The whole loss on one batch; beyond the first batch the weights are nudged as well."""

    def __init__(
        self, twin: Twin, training: bool, batch: int, home: Reading, errors: Errors, seed: int
    ) -> None:
        self.batch = batch
        self._twin = twin
        self._training = training
        self._home = home
        self._errors = errors
        self._seed = seed
        self._index = {slot.name: index for index, slot in enumerate(twin.slots)}
        self._nudged = False
        self.spoiled: frozenset[str] = frozenset()

    @contextmanager
    def settled(self) -> Iterator[Reading]:
        """Yield the reading at this point; at a nudged one it costs a forward and a backward.

        `spoiled` then names the slots that are not finite at the given weights on this batch.
        """
        self._twin.set_mode(self._training)
        if self.batch == 0:
            yield self._errors.on(self._home)
            return
        self._nudged = True
        try:
            self._reset_all()
            reading = self._twin.reading(self.batch)
            if not reading.finite:
                # Nudged out of the function's domain, for example below a square root.
                self._nudged = False
                self._reset_all()
                reading = self._twin.reading(self.batch)
                bad = (s.name for s in self._twin.slots if not reading.finite_for(s.name))
                self.spoiled = frozenset(bad)
            yield self._errors.on(reading)
        finally:
            self._nudged = False
            self._reset_all()

    def value(self) -> float:
        """The loss at the present weights."""
        return self._twin.value(self.batch)

    def reset(self, slot: Slot) -> None:
        """Give a slot the values that it has at this point."""
        self._twin.reset(slot)
        if self._nudged:
            values = slot.values()
            z = slot.normal(generator_for(self._seed, self.batch, self._index[slot.name]))
            values.copy_(nudged(values, z))

    def note_repeated(self, loss: float) -> None:
        """Take a second loss at the given weights into account; more are drawn if it differs."""
        if loss != self._home.loss:
            self._twin.set_mode(self._training)
            self._sample_noise([loss, self._home.loss])

    def measured(self, reading: Reading) -> Reading:
        """`reading` with noise and rounding of the loss, measured at the first call in this mode.

        |L| alone understates rounding where large terms cancel in the loss.
        """
        errors = self._errors
        if not errors.measured:
            errors.measured = True
            again = self.value()
            if again != reading.loss:
                self._sample_noise([again, reading.loss])
            elif errors.noise == 0.0:
                errors.rounding = self._rounding(reading)
        return errors.on(reading)

    def _sample_noise(self, losses: list[float]) -> None:
        losses += [self.value() for _ in range(_NOISE_SAMPLES)]
        finite = [loss for loss in losses if math.isfinite(loss)]
        self._errors.noise = max(finite) - min(finite) if finite else 0.0

    def _rounding(self, reading: Reading) -> float:
        losses = [self._last_digit_value(sample) for sample in range(_ROUNDING_SAMPLES)]
        rounding = _ROUNDING_MARGIN * max(abs(loss - reading.loss) for loss in losses)
        # A jump or NaN on moving the last digit is no rounding; it must not loosen the tolerance.
        limit = max(1e-9 * abs(reading.loss), _ROUNDING_LIMIT)
        return rounding if rounding <= limit else 0.0

    def _last_digit_value(self, sample: int) -> float:
        for index, slot in enumerate(self._twin.slots):
            values = slot.values()
            digits = _ROUNDING_ULPS * torch.finfo(values.dtype).eps
            z = slot.normal(generator_for(self._seed, -1 - sample, index))
            values.addcmul_(values, z, value=digits)
        loss = self.value()
        self._reset_all()
        return loss

    def _reset_all(self) -> None:
        for slot in self._twin.slots:
            self.reset(slot)
