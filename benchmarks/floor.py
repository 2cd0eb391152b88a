"""How far a training step is from what the device could do.

Two floors, each measured on the device itself: the bytes that a step must move divided by the
bandwidth of a large copy, and its floating-point operations divided by the throughput of a large
matrix product of the same dtype. A device can do both at once, so the greater of them is the floor.

Bytes of a step, with E bytes per element:

    parameters    read by the forward pass and by the backward pass               2 P E
                  (a table of embeddings is not read whole, and is left out)
    gradients     written by the backward pass                                      T E
    AdamW         reads weight, gradient and two moments, writes all but gradient 7 T E
    inputs        inputs and labels, read by the forward pass                     rows
    activations   what every layer puts out: written and read forwards, read      5 A E
                  backwards, and its gradient written and read

P are the parameters that are read whole, T those that are trained, A the elements put out by the
modules without children, or by the model itself if it is one. It is an estimate: fused kernels move
less, and what stays in a cache moves at the cache's speed, so a ratio below 1 is possible for a
small model. Operations are counted while a step runs (matrix products and convolutions, two for a
multiplication with an addition); those of element-wise functions are not counted.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_READS_OF_PARAMETERS = 2
_MOVES_OF_ADAMW = 7
_MOVES_OF_ACTIVATIONS = 5


@dataclass(frozen=True)
class Work:
    """What one step does: bytes moved by kind, and floating-point operations."""

    parameters: int
    gradients: int
    optimizer: int
    inputs: int
    activations: int
    operations: int

    @property
    def traffic(self) -> int:
        """Bytes moved in all."""
        return self.parameters + self.gradients + self.optimizer + self.inputs + self.activations


@dataclass(frozen=True)
class Capability:
    """What a device was measured to do: bytes and floating-point operations per second."""

    bandwidth: float
    throughput: float


@dataclass(frozen=True)
class Floor:
    """Least seconds that a step takes, by traffic and by arithmetic."""

    traffic: float
    arithmetic: float

    @property
    def seconds(self) -> float:
        """The greater of the two."""
        return max(self.traffic, self.arithmetic)


def count_step(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Sequence[Tensor],
    labels: Tensor,
) -> Work:
    """Count the work of one training step, by doing one; the gradients of the model are lost."""
    put_out: list[Tensor] = []

    def record(module: nn.Module, arguments: Any, output: Any) -> None:
        put_out.extend(output if isinstance(output, tuple) else [output])

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(record) for leaf in leaves]
    try:
        with FlopCounterMode(display=False) as counter:
            loss(model(*inputs), labels).backward()
    finally:
        for handle in handles:
            handle.remove()
    model.zero_grad()
    tables = {id(m.weight) for m in leaves if isinstance(m, nn.Embedding)}
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    return Work(
        parameters=_READS_OF_PARAMETERS
        * sum(_size(p) for p in model.parameters() if id(p) not in tables),
        gradients=trained,
        optimizer=_MOVES_OF_ADAMW * trained,
        inputs=sum(_size(tensor) for tensor in (*inputs, labels)),
        activations=_MOVES_OF_ACTIVATIONS * sum(_size(tensor) for tensor in put_out),
        operations=counter.get_total_flops(),
    )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure_device(
    device: torch.device, dtype: torch.dtype = torch.float32, *, quick: bool = False
) -> Capability:
    """Time a large copy, and a large matrix product of a dtype; the best of several counts.

    Args:
        device: CPU (with PyTorch's threads as they are set) or CUDA.
        dtype: Of the training step.
        quick: Measure small ones; enough to see that it works.
    """
    large = device.type == "cuda" and not quick
    elements, side = (2**28, 8192) if large else (2**18, 128) if quick else (2**25, 1024)
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    multiply = _best(lambda: torch.mm(left, right, out=product), device)
    return Capability(bandwidth=2 * _size(source) / copy, throughput=2 * side**3 / multiply)


def _best(action: Callable[[], object], device: torch.device, times: int = 7) -> float:
    """Least seconds of an action, the first run not counted."""
    seconds = math.inf
    for run in range(times + 1):
        _wait(device)
        started = time.perf_counter()
        action()
        _wait(device)
        if run:
            seconds = min(seconds, time.perf_counter() - started)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_floor(work: Work, capability: Capability) -> Floor:
    """The least seconds that a step takes on a device."""
    return Floor(work.traffic / capability.bandwidth, work.operations / capability.throughput)
