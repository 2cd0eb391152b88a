"""Whether a tensor that the loss is blind to has a right gradient in what the model returns."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from components.validate.call_audit import hookable
from components.validate.gradients.slots import Slot, generator_for
from components.validate.gradients.twin import Twin
from components.validate.nests import as_real, tensors_in

# Relative to the largest element; and what the two derivatives may differ by.
_SMALL_STEP, _OUTPUT_SHARE = 1e-5, 1e-3


def shows_in_outputs(twin: Twin, slot: Slot, batch: int, seed: int) -> bool:
    """True when a random projection of the model's outputs has the gradient that differences give.

    A loss may be blind to a tensor that the model does use: a shift of all scores cancels in a
    difference of scores, or in a sum of hinges of which as many rise as fall. Rounding or a unit
    that is dead on all rows leaves no gradient in the outputs either.
    """
    outputs = [as_real(t) for t in _outermost_outputs(twin, batch) if t.requires_grad]
    generator = generator_for(seed)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu")
        for o in outputs
    ]
    pairs = [(o, c.to(o)) for o, c in zip(outputs, cotangents, strict=True)]
    if not pairs:
        return False
    sums = [(output * cotangent).sum() for output, cotangent in pairs]
    total = torch.stack([part.to(sums[0].device) for part in sums]).sum()
    gradient = slot.dense(torch.autograd.grad(total, slot.leaves, allow_unused=True))
    if gradient is None or not bool(gradient.any()):
        return False
    direction, given = slot.normal(generator), slot.values().clone()
    direction *= _SMALL_STEP * (1 + float(given.abs().max()))
    moved = []
    for sign in (1, -1):
        slot.values().add_(direction, alpha=sign)
        try:
            again = [as_real(t) for t in _outermost_outputs(twin, batch) if t.requires_grad]
        finally:
            slot.values().copy_(given)
        if [t.shape for t in again] != [t.shape for t in outputs]:
            return False
        moved.append(
            sum(float((t.detach() * c).sum()) for t, (_, c) in zip(again, pairs, strict=True))
        )
    expected = float((gradient * direction).sum())
    return abs((moved[0] - moved[1]) / 2 - expected) <= _OUTPUT_SHARE * float(
        gradient.norm() * direction.norm()
    )


def _outermost_outputs(twin: Twin, batch: int) -> list[Tensor]:
    """What the modules that the loss calls itself return, with its graph."""
    outputs: list[Tensor] = []
    running: list[nn.Module] = []

    def enter(module: nn.Module, _args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, _args: Any, given: Any) -> None:
        # Modules above have ended by an exception, which this one caught.
        while running and running.pop() is not module:
            pass
        if not running:
            outputs.extend(tensors_in(given))

    with ExitStack() as stack:
        for _, module in hookable(twin.model):
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        twin.value(batch)
    return outputs
