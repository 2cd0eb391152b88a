"""The comparison at one point and the vote over points, against values worked out by hand."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from components.validate.gradients.probe import (
    STRICT,
    Comparison,
    Outcome,
    Point,
    Rung,
    compare,
    first_step,
)
from components.validate.gradients.slots import Reading, Slot
from components.validate.gradients.survey import decide

EPS = 2.0**-52


class Cubic(Point):
    """L(w) = sum(w^3) + kink |w_0 - 1|, with a gradient scaled by `factor`."""

    def __init__(self, w: Tensor, *, factor: float = 1.0, kink: float = 0.0) -> None:
        self.w = w
        self.factor = factor
        self.kink = kink

    def value(self) -> float:
        return float(self.w.pow(3).sum() + self.kink * (self.w[0] - 1).abs())

    @contextmanager
    def settled(self) -> Iterator[Reading]:
        yield self.reading()

    def reset(self, slot: Slot) -> None:
        raise AssertionError("a single tensor is put back by the comparison itself")

    def measured(self, reading: Reading) -> Reading:
        return reading

    def reading(self, noise: float = 0.0) -> Reading:
        gradient = 3 * self.w.pow(2)
        gradient[0] += self.kink * float(torch.sign(self.w[0] - 1))
        loss = self.value()
        return Reading(loss, {"w": self.factor * gradient}, magnitude=abs(loss), noise=noise)


def weights(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def compared(point: Cubic, noise: float = 0.0, seed: int = 0) -> Comparison:
    slot = Slot("w", (point.w,))
    generator = torch.Generator().manual_seed(seed)
    return compare(slot, point, point.reading(noise), STRICT, generator)


def test_step_scale_floor_and_tolerance_follow_the_formulae() -> None:
    point = Cubic(weights(3.0, 4.0))
    rung = compared(point).rung
    reach = 5.0 + 0.05 * 2**0.5
    steepness = (27.0**2 + 48.0**2) ** 0.5
    floor = 50 * EPS * (27.0 + 64.0)
    assert rung.h == 1e-8  # the formula would give less
    assert floor / (1e-6 * steepness * reach / 2**0.5) < rung.h
    assert rung.length == pytest.approx(rung.h * reach)
    assert rung.scale == pytest.approx(max(steepness * rung.length / 2**0.5, abs(rung.numeric)))
    assert rung.floor == pytest.approx(floor)
    assert rung.tolerance == pytest.approx(1e-6 * rung.scale + floor)
    assert compared(point).outcome is Outcome.AGREES
    assert torch.equal(point.w, weights(3.0, 4.0))


@pytest.mark.parametrize(
    ("slope", "expected"), [(1e4, 1e-8), (1.0, 1.11e-5), (0.1, 1e-4), (1e-4, 1e-3)]
)
def test_the_first_step_lifts_the_derivative_above_rounding(slope: float, expected: float) -> None:
    reading = Reading(1e3, {}, magnitude=1e3)  # rounding 50 * 2.2e-16 * 1e3 = 1.11e-11
    assert first_step(slope, reading, STRICT) == pytest.approx(expected, rel=1e-2)


def test_noise_widens_the_tolerance_until_it_exceeds_it() -> None:
    point = Cubic(weights(3.0, 4.0))
    plain = compared(point).rung
    noisy = compared(point, noise=0.9 * plain.tolerance)
    assert noisy.outcome is Outcome.AGREES
    assert noisy.rung.tolerance == pytest.approx(1.9 * plain.tolerance)
    assert compared(point, noise=1.1 * plain.tolerance).outcome is Outcome.NOISY


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [-1.0, 0.999, 1.0001])
def test_a_scaled_gradient_is_a_mismatch_at_every_step(factor: float, seed: int) -> None:
    found = compared(Cubic(weights(3.0, 4.0, -2.0), factor=factor), seed=seed)
    assert found.outcome is Outcome.MISMATCH
    # The first step and the top of the ladder are enough, or three rungs of the ladder.
    assert found.rung.h in {1e-4, 1e-6}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distance", [1e-5, 1e-6, 1e-7])
def test_a_kink_within_the_step_is_stepped_over(distance: float, seed: int) -> None:
    found = compared(Cubic(weights(1 + distance, 2.0), kink=5.0), seed=seed)
    assert found.outcome is Outcome.AGREES


def test_zero_gradients() -> None:
    flat = Cubic(weights(3.0, 4.0), factor=0.0)
    assert compared(flat).outcome is Outcome.BROKEN_PATH


def votes(*outcomes: Outcome) -> Outcome | None:
    rung = Rung(1e-4, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, noisy=False)
    decided = decide([Comparison(outcome, rung) for outcome in outcomes])
    return decided.outcome if decided else None


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ((Outcome.AGREES,), Outcome.AGREES),
        ((Outcome.MISMATCH, Outcome.AGREES, Outcome.AGREES), Outcome.AGREES),
        ((Outcome.MISMATCH, Outcome.AGREES, Outcome.MISMATCH), Outcome.MISMATCH),
        ((Outcome.SILENT, Outcome.SILENT, Outcome.AGREES), Outcome.AGREES),
        ((Outcome.SILENT, Outcome.SILENT, Outcome.SILENT), Outcome.SILENT),
        ((Outcome.SILENT, Outcome.SILENT, Outcome.BROKEN_PATH), Outcome.BROKEN_PATH),
        ((Outcome.UNRESOLVED, Outcome.UNRESOLVED, Outcome.AGREES), Outcome.AGREES),
        ((Outcome.UNRESOLVED,) * 3, Outcome.UNRESOLVED),
        ((Outcome.HIDDEN,) * 3, Outcome.HIDDEN),
        ((Outcome.SILENT, Outcome.HIDDEN, Outcome.SILENT), Outcome.HIDDEN),
        ((Outcome.UNRESOLVED, Outcome.NOISY), Outcome.NOISY),
        ((), None),
    ],
)
def test_votes(outcomes: tuple[Outcome, ...], expected: Outcome | None) -> None:
    assert votes(*outcomes) is expected
