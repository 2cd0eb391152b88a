"""Where training stands, as what a checkpoint holds: captured, and put back.

The state of every generator of random numbers belongs to it: PyTorch's for each process, Python's
and numpy's, which are seeded alike everywhere, for process 0.
"""

import random
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from components.train.checkpoint import Progress, State
from components.train.parallel import Group


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU, contiguous, which is how safetensors takes it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


@final
class Standing:
    """Progress, and everything else that changes while training.

    Args:
        model: On its device.
        optimizer: Of the model.
        scaler: Of the losses, in float16.
        device: Whose generator counts beside the CPU's.
        group: The processes that train together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        device: torch.device,
        group: Group,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._device = device
        self._group = group
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}

    def keep_best(self) -> None:
        """Remember the present weights as the best."""
        self.best = {name: copy_to_cpu(t) for name, t in self._model.state_dict().items()}

    def capture(self) -> State:
        """Copy everything; every process of the group must call it at the same step."""
        tensors = {f"model/{n}": copy_to_cpu(t) for n, t in self._model.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for number, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{n}": copy_to_cpu(t) for n, t in state.items()}
        for rank, state in enumerate(self._group.gather(torch.get_rng_state())):
            tensors[f"generator/cpu/{rank}"] = state
        loss = torch.tensor(self.progress.loss, dtype=torch.float64)
        for rank, part in enumerate(self._group.gather(loss)):
            tensors[f"loss/{rank}"] = part
        if self._device.type == "cuda":
            for rank, state in enumerate(self._group.gather(torch.cuda.get_rng_state())):
                tensors[f"generator/cuda/{rank}"] = state
        self.progress.scaler = self._scaler.state_dict() if self._scaler else {}
        self.progress.python = _python_state()
        self.progress.numpy = _numpy_state()
        return State(self.progress.model_copy(deep=True), tensors)

    def restore(self, state: State) -> None:
        """Go back to a captured state."""
        groups = _by_prefix(state.tensors)
        self._model.load_state_dict(groups["model"])
        self.best = groups.get("best", {})
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups.get("optimizer", {}).items():
            number, slot = name.split("/", 1)
            slots.setdefault(int(number), {})[slot] = tensor
        known = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": slots, "param_groups": known})
        torch.set_rng_state(groups["generator"][f"cpu/{self._group.rank}"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(groups["generator"][f"cuda/{self._group.rank}"])
        if self._scaler:
            self._scaler.load_state_dict(state.progress.scaler)
        version, values, gauss = state.progress.python
        random.setstate((version, tuple(values), gauss))
        kind, keys, *rest = state.progress.numpy
        np.random.set_state((kind, np.array(keys, np.uint32), *rest))
        self.progress = state.progress.model_copy(deep=True)
        self.progress.loss = float(groups["loss"][str(self._group.rank)])


def _by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, rest = name.split("/", 1)
        groups.setdefault(prefix, {})[rest] = tensor
    return groups


def _python_state() -> list[Any]:
    version, values, gauss = random.getstate()
    return [version, list(values), gauss]


def _numpy_state() -> list[Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return [kind, [int(key) for key in keys], *rest]
