"""The process's random states: kept as they are, and set to a seed for an evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state(devices: Sequence[torch.device]) -> Iterator[None]:
    """Put back the states of Python, NumPy and torch on leaving; on `devices` those of CUDA."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_everything(seed: int, devices: Sequence[torch.device]) -> None:
    """Start all of them from `seed`."""
    # torch.manual_seed would also reach devices whose state is not kept.
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    # NumPy takes no others.
    np.random.seed(seed % 2**32)
