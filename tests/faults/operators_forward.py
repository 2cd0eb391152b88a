"""Faults in the forward pass that stop, replace or spoil gradients."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from faults.operators import (
    Arguments,
    Injection,
    Operator,
    at_arguments,
    at_output,
    computed,
    layers,
    modules_with_forward,
    on_first,
    override,
    pick,
    weight_only,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def detached_input(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """A pre-hook detaches what a module receives."""
    path = pick(generator, modules_with_forward(model))
    if path is None:
        return None
    sound = copy.deepcopy(model)

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return on_first(inputs, lambda x: x.detach().clone())

    model.get_submodule(path).register_forward_pre_hook(hook)
    return Injection(model, sound, (path,))


def left_no_grad(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """A submodule runs under `torch.no_grad()`."""
    path = pick(generator, modules_with_forward(model))
    if path is None:
        return None
    sound = copy.deepcopy(model)

    def forward(self: nn.Module, parent: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return parent(*args, **kwargs)

    override(model.get_submodule(path), forward)
    return Injection(model, sound, (path,))


def written_weight(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """Every forward shrinks the layer's own weight through `.data`."""
    path = pick(generator, layers(model))
    if path is None:
        return None
    sound = copy.deepcopy(model)

    def shrink(self: Any, parent: Callable[..., Any], x: Tensor) -> Any:
        self.weight.data.mul_(0.99)
        return parent(x)

    def shrunk(self: Any, parent: Callable[..., Any], x: Tensor) -> Any:
        return computed(self, x, 0.99 * self.weight, getattr(self, "bias", None))

    override(model.get_submodule(path), shrink)
    override(sound.get_submodule(path), shrunk)
    return Injection(model, sound, (path,))


def stale_copy(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """A layer computes with a copy of its weight that was made when it was built."""
    path = pick(generator, layers(model))
    if path is None:
        return None
    sound = copy.deepcopy(model)
    layer: Any = model.get_submodule(path)
    layer.register_buffer("kept", layer.weight.detach().clone(), persistent=False)
    override(
        layer,
        lambda self, parent, x: computed(self, x, self.kept, getattr(self, "bias", None)),
    )
    return Injection(model, sound, (path,), "flat")


def forgotten_random_state(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """Activation checkpointing of a module with dropout, without its random state."""
    path = pick(generator, modules_with_forward(model))
    if path is None:
        return None
    sound = copy.deepcopy(model)

    def checkpointed(*, preserve: bool) -> Callable[..., Any]:
        def forward(self: nn.Module, parent: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*inputs: Any) -> Any:
                output = parent(*inputs, **kwargs)
                return on_first(output, lambda y: functional.dropout(y, 0.3, self.training))

            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve)

        return forward

    override(model.get_submodule(path), checkpointed(preserve=False))
    override(sound.get_submodule(path), checkpointed(preserve=True))
    return Injection(model, sound, (path,))


def _half_detached(self: nn.Module, y: Tensor) -> Tensor:
    half = (y.shape[-1] + 1) // 2
    return torch.cat([y[..., :half], y[..., half:].detach()], dim=-1)


def _through_numpy(self: nn.Module, y: Tensor) -> Tensor:
    return y + 0.5 * torch.from_numpy(np.tanh(y.detach().numpy()))


def _written_data(self: nn.Module, y: Tensor) -> Tensor:
    y.data.mul_(1.5)
    return y


def _item(layer: Any, x: Tensor, arguments: Arguments) -> Arguments:
    weight, bias = arguments
    return weight / (1 + weight.norm().item()), bias


def _norm(layer: Any, x: Tensor, arguments: Arguments) -> Arguments:
    weight, bias = arguments
    return weight / (1 + weight.norm()), bias


def _chosen(self: nn.Module, y: Tensor) -> Tensor:
    return functional.one_hot(y.argmax(-1), y.shape[-1]).to(y.dtype)


def _straight_through(self: nn.Module, y: Tensor) -> Tensor:
    return y + (torch.round(4 * y) / 4 - y).detach()


def _rounded(self: nn.Module, y: Tensor) -> Tensor:
    return torch.round(4 * y) / 4


def _masked_root(self: nn.Module, y: Tensor) -> Tensor:
    return y + torch.where(y > 0, torch.sqrt(y), torch.zeros_like(y))


def _root_of_masked(self: nn.Module, y: Tensor) -> Tensor:
    safe = torch.where(y > 0, y, torch.ones_like(y))
    return y + torch.where(y > 0, torch.sqrt(safe), torch.zeros_like(y))


def _distance_to_itself(self: nn.Module, y: Tensor) -> Tensor:
    return y + (y - y.clone()).square().sum(-1, keepdim=True).sqrt()


FORWARD = (
    Operator("detached_input", "wrong_gradient", detached_input),
    Operator("detached_output", "wrong_gradient", at_output(lambda self, y: y.detach().clone())),
    Operator("detached_half", "wrong_gradient", at_output(_half_detached)),
    Operator("item_in_graph", "wrong_gradient", at_arguments(_item, _norm)),
    Operator(
        "numpy_in_graph",
        "wrong_gradient",
        at_output(_through_numpy, lambda self, y: y + 0.5 * torch.tanh(y)),
    ),
    Operator("data_read", "wrong_gradient", at_arguments(weight_only(lambda w: w.data))),
    Operator("data_written", "wrong_gradient", at_output(_written_data, lambda self, y: 1.5 * y)),
    Operator("left_no_grad", "wrong_gradient", left_no_grad),
    Operator("weight_written_by_forward", "wrong_gradient", written_weight),
    Operator("stale_copy_of_weight", "wrong_gradient", stale_copy),
    Operator("rounded", "wrong_gradient", at_output(_rounded, effect="flat")),
    Operator("hard_choice", "wrong_gradient", at_output(_chosen, effect="flat")),
    Operator("straight_through", "wrong_gradient", at_output(_straight_through, _rounded)),
    Operator("masked_root", "wrong_gradient", at_output(_masked_root, _root_of_masked)),
    Operator("distance_to_itself", "wrong_gradient", at_output(_distance_to_itself)),
    Operator("checkpoint_without_random_state", "wrong_gradient", forgotten_random_state),
)
