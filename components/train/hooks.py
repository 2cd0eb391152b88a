"""Hooks of the optimiser: clipping, and the telemetry of gradients."""

import contextlib
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

MEASURE_EVERY = 50
_NOTHING = contextlib.nullcontext()


@final
class GradientNorm:
    """Measures the norm of the whole gradient just before a step, and clips it where asked to.

    Without clipping it measures every :data:`MEASURE_EVERY` th step only. ``measured`` holds norms
    as tensors on the device, so that a GPU is not waited for; whoever reads them empties it.

    Args:
        parameters: Whose gradients are meant.
        largest: The norm above which gradients are scaled down to it; 0 never scales.
    """

    def __init__(self, parameters: list[nn.Parameter], largest: float) -> None:
        self._parameters = parameters
        self._largest = largest
        self.measured: list[Tensor] = []

    def attached(
        self, optimizer: torch.optim.Optimizer, step: int
    ) -> contextlib.AbstractContextManager[None]:
        """Hook into the optimiser for one step, if that one is measured; a hook takes time."""
        return self._hooked(optimizer) if self.wanted(step) else _NOTHING

    def wanted(self, step: int) -> bool:
        """Whether the step of this number within its epoch is measured."""
        return bool(self._largest) or step % MEASURE_EVERY == 0

    @contextlib.contextmanager
    def _hooked(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        handle = optimizer.register_step_pre_hook(self)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        """Measure and clip."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self._largest:
            clip_grads_with_norm_(self._parameters, self._largest, norm)
        self.measured.append(norm)
