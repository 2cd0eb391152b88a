"""Several processes that train one model: plain ``torch.distributed``, whoever started them.

Gradients are summed in one flat reduction after backward, whose layout never changes, so that two
runs with equally many workers, resumed or not, add up the same numbers in the same order.
"""

from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn


@final
class Group:
    """One process among those that train together; alone, every operation does nothing.

    Args:
        rank: Number of this process.
        world: Number of processes; more than one need an initialised process group.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @classmethod
    def current(cls) -> "Group":
        """The initialised process group."""
        return cls(dist.get_rank(), dist.get_world_size())

    def sum_gradients(
        self, parameters: Sequence[nn.Parameter], flag: bool = False, look: bool = True
    ) -> bool:
        """Sum gradients over the processes, in place, and say whether any of them raised ``flag``.

        A parameter that no process has a gradient for keeps none. Without ``look`` the answer is
        False, and a GPU need not be waited for.
        """
        if self.world == 1:
            return flag
        device = parameters[0].device
        present = [0.0 if p.grad is None else 1.0 for p in parameters]
        parts = [
            torch.zeros(p.numel(), device=device) if p.grad is None else p.grad.flatten().float()
            for p in parameters
        ]
        flat = torch.cat([*parts, torch.tensor([*present, float(flag)], device=device)])
        dist.all_reduce(flat)
        if all(present) and not look:
            seen, raised = present, 0.0
        else:
            *seen, raised = flat[-len(parameters) - 1 :].tolist()
        start = 0
        for parameter, count in zip(parameters, seen, strict=True):
            if count:
                part = flat[start : start + parameter.numel()]
                parameter.grad = part.view_as(parameter).to(parameter.dtype)
            start += parameter.numel()
        return look and bool(raised)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of process 0."""
        if self.world > 1:
            for tensor in tensors:
                whole = tensor.contiguous()  # which a reduction asks for
                dist.broadcast(whole, src=0)
                tensor.copy_(whole)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of equal shape from every process, in order of rank."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor)
        return found


ALONE = Group()
