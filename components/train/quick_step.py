"""A step of AdamW without the bookkeeping around it.

``optimizer.step()`` collects the same lists of tensors before every step, which on a small model
takes as long as the update itself. This collects them once and calls the functional form of the
same update, with the optimiser's own state; the results are equal to the bit.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.optim import optimizer as hooks
from torch.optim.adamw import adamw


@final
class QuickStep:
    """Steps of an optimiser with one group of parameters and unscaled gradients.

    Args:
        optimizer: A fused AdamW, whose settings and state count; once a step has been made, it must
            keep its state's tensors.
        parameters: Its parameters, on their device.
    """

    def __init__(self, optimizer: torch.optim.AdamW, parameters: list[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._weights: list[Tensor] = [parameter.detach() for parameter in parameters]
        self._state: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        """Step; the optimiser does so itself if a gradient is missing or somebody hooked in."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        complete = len(gradients) == len(self._parameters)
        if not complete or self._hooked() or not (self._state or self._collect()):
            self._optimizer.step()
            return
        settings = self._optimizer.param_groups[0]
        adamw(
            self._weights,
            gradients,
            self._state["exp_avg"],
            self._state["exp_avg_sq"],
            [],
            self._state["step"],
            foreach=False,
            fused=True,
            has_complex=False,
            amsgrad=False,
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            maximize=False,
        )

    def _hooked(self) -> bool:
        own = self._optimizer
        return bool(
            hooks._global_optimizer_pre_hooks
            or hooks._global_optimizer_post_hooks
            or own._optimizer_step_pre_hooks
            or own._optimizer_step_post_hooks
        )

    def _collect(self) -> bool:
        """Whether the optimiser has made its state by now."""
        states = [self._optimizer.state.get(parameter) for parameter in self._parameters]
        if not all(states):
            return False
        self._state = {name: [s[name] for s in states if s] for name in states[0] or {}}
        return True
