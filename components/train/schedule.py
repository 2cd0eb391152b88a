"""The learning rate as a function of the step, so that resuming needs nothing but the step.

One cycle is Smith and Topin's (https://arxiv.org/abs/1708.07120) with the constants of
``torch.optim.lr_scheduler.OneCycleLR``, to which the tests compare it.
"""

import math
from collections.abc import Callable

from components.train.config import TrainConfig

_RISE = 0.3
_START_DIVISOR = 25.0
_END_DIVISOR = 1e4
_BETA_LOW, _BETA_HIGH = 0.85, 0.95
_BETA = 0.9

Schedule = Callable[[int], tuple[float, float]]
"""Maps a step, counted from 0, to the learning rate and AdamW's first beta."""


def make_schedule(config: TrainConfig, steps: int) -> Schedule:
    """The configured schedule over so many steps."""
    peak = config.learning_rate
    if config.schedule == "constant":
        return lambda step: (peak, _BETA)
    if config.schedule == "cosine":
        return lambda step: (_cosine(peak, 0.0, step / steps), _BETA)
    start = peak / _START_DIVISOR
    end = start / _END_DIVISOR
    turn = _RISE * (steps + 1) - 1
    rest = steps - turn

    def one_cycle(step: int) -> tuple[float, float]:
        if turn > 0 and step <= turn:
            share = step / turn
            return _cosine(start, peak, share), _cosine(_BETA_HIGH, _BETA_LOW, share)
        share = (step - turn) / rest
        return _cosine(peak, end, share), _cosine(_BETA_LOW, _BETA_HIGH, share)

    return one_cycle


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) / 2.0 * (1.0 + math.cos(math.pi * share))
