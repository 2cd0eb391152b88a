"""Clipping, and the norms that are told, seen from PyTorch's own hooks of every optimiser."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.training_lab import change, fit, make_rows, plain
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from components.train.hooks import MEASURE_EVERY, GradientNorm


@dataclass
class Norms:
    """Norms of the whole gradient as it came, and as the optimiser took it."""

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)


@pytest.fixture
def norms() -> Iterator[Norms]:
    found = Norms()

    def norm(optimizer: torch.optim.Optimizer) -> float:
        parameters = optimizer.param_groups[0]["params"]
        return float(torch.cat([p.grad.flatten() for p in parameters]).double().norm())

    def before(optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        found.before.append(norm(optimizer))

    def after(optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        found.after.append(norm(optimizer))

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_no_gradient_that_the_optimiser_takes_is_longer_than_allowed(
    norms: Norms, precision: str
) -> None:
    """In float16 it is unscaled by then: what is clipped is the gradient itself."""
    config = change(clip_norm=0.2, precision=precision)
    trained = fit(make_rows(), config, plain)
    assert len(norms.after) == 12
    assert max(norms.after) <= 0.2 * (1 + 1e-5)
    assert 0.21 < max(norms.before) < 5, "there was something to clip, and it was not scaled"
    for before, after in zip(norms.before, norms.after, strict=True):
        assert after == pytest.approx(min(before, 0.2), rel=1e-4), "short ones stay as they are"
    told = [epoch.gradient_norm for epoch in trained.history]
    expected = [sum(norms.before[first : first + 4]) / 4 for first in (0, 4, 8)]
    assert told == pytest.approx(expected, rel=1e-5), "the norms before clipping"


def test_clipping_changes_what_is_learned() -> None:
    free, clipped = (fit(make_rows(), change(clip_norm=c), plain) for c in (0.0, 0.05))
    assert any(not torch.equal(free.state[n], clipped.state[n]) for n in free.state)


def test_without_clipping_gradients_stay_and_every_epoch_tells_a_norm(norms: Norms) -> None:
    trained = fit(make_rows(), change(epochs=4), plain)
    assert norms.before == norms.after
    told = [epoch.gradient_norm for epoch in trained.history]
    assert told == pytest.approx(norms.before[::4], rel=1e-6), "the first step of every epoch"


def test_in_a_long_epoch_some_steps_are_measured(norms: Norms) -> None:
    config = change(batch_size=1, epochs=2)
    trained = fit(make_rows(), config, plain)
    steps = len(norms.before) // 2
    assert MEASURE_EVERY < steps < 2 * MEASURE_EVERY
    for epoch, start in zip(trained.history, (0, steps), strict=True):
        expected = (norms.before[start] + norms.before[start + MEASURE_EVERY]) / 2
        assert epoch.gradient_norm == pytest.approx(expected, rel=1e-6)


def test_parameters_without_gradients_are_left_alone() -> None:
    one, two = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    one.grad = torch.tensor([3.0, 4.0])
    hook = GradientNorm([one, two], 1.0)
    hook(torch.optim.SGD([one, two]))
    assert [float(norm) for norm in hook.measured] == [5.0]
    assert one.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert two.grad is None
