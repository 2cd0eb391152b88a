"""The learning rate by step, against PyTorch's own schedulers."""

import warnings

import pytest
import torch
from support.training_lab import change

from components.train.schedule import make_schedule

LENGTHS = [1, 2, 3, 4, 5, 7, 10, 33, 100, 999]


def optimizer(rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def course(
    optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: int
) -> list[tuple[float, float]]:
    found = []
    for _ in range(steps):
        (group,) = optimizer.param_groups
        found.append((group["lr"], group["betas"][0]))
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("steps", LENGTHS)
def test_one_cycle_is_that_of_pytorch(steps: int) -> None:
    ours = make_schedule(change(schedule="one_cycle", learning_rate=0.02), steps)
    own = optimizer(0.02)
    theirs = torch.optim.lr_scheduler.OneCycleLR(own, max_lr=0.02, total_steps=steps + 1)
    for step, (rate, beta) in enumerate(course(own, theirs, steps)):
        assert ours(step) == pytest.approx((rate, beta), rel=1e-12), step


@pytest.mark.parametrize("steps", LENGTHS)
def test_cosine_is_that_of_pytorch(steps: int) -> None:
    ours = make_schedule(change(schedule="cosine", learning_rate=0.02), steps)
    own = optimizer(0.02)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(own, T_max=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = course(own, theirs, steps)
    for step, (rate, beta) in enumerate(expected):
        assert ours(step) == pytest.approx((rate, beta), rel=1e-9), step


def test_constant_is_constant() -> None:
    schedule = make_schedule(change(schedule="constant", learning_rate=0.02), 10)
    assert {schedule(step) for step in range(10)} == {(0.02, 0.9)}


@pytest.mark.parametrize("kind", ["one_cycle", "cosine", "constant"])
@pytest.mark.parametrize("steps", LENGTHS)
def test_the_rate_stays_positive_and_below_its_peak(kind: str, steps: int) -> None:
    schedule = make_schedule(change(schedule=kind, learning_rate=0.02), steps)
    assert all(0 < schedule(step)[0] <= 0.02 * (1 + 1e-12) for step in range(steps))
