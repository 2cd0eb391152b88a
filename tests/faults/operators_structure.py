"""Faults in what a model is made of: its registry, modes, calls and shared weights."""

from collections.abc import Callable
from typing import Any

import torch
from faults.operators import (
    Inject,
    Injection,
    Operator,
    computed,
    layers,
    modules_with_forward,
    override,
    owners,
    pick,
)
from torch import Tensor, nn

MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def frozen(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """One parameter does not ask for gradients."""
    name, parameter = pick(generator, list(model.named_parameters())) or ("", None)
    if parameter is None:
        return None
    parameter.requires_grad_(False)
    return Injection(model, None, owners(model, parameter), "always", tensors=(name,))


def replaced_weight(replace: Callable[[Any], None], read: Callable[[Any], Tensor]) -> Inject:
    """A layer's weight is no parameter; `replace` puts it elsewhere and `read` finds it there."""

    def inject(model: nn.Module, generator: torch.Generator) -> Injection | None:
        free = [p for p in layers(model) if len(owners(model, model.get_submodule(p).weight)) == 1]
        path = pick(generator, free)
        if path is None:
            return None
        layer: Any = model.get_submodule(path)
        replace(layer)
        override(
            layer,
            lambda self, parent, x: computed(self, x, read(self), getattr(self, "bias", None)),
        )
        return Injection(model, None, (path,), "reached")

    return inject


def _to_list(layer: Any) -> None:
    weight = layer.weight
    del layer.weight
    layer.kept = [weight]


def _to_tensor(layer: Any) -> None:
    weight = layer.weight.detach().clone().requires_grad_()
    del layer.weight
    layer.weight = weight


def _to_buffer(layer: Any, *, trained: bool) -> None:
    weight = layer.weight.detach().clone().requires_grad_(trained)
    del layer.weight
    layer.register_buffer("weight", weight)


def unused_parameter(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """A parameter that a change of the forward left behind."""
    path = pick(generator, modules_with_forward(model))
    if path is None:
        return None
    module = model.get_submodule(path)
    module.register_parameter("left_behind", nn.Parameter(torch.randn(3)))
    name = f"{path}.left_behind" if path else "left_behind"
    return Injection(model, None, (path,), "always", tensors=(name,))


def copied_tie(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """Weights that are meant to be one tensor are two with equal values."""
    tied = [p for p in model.parameters() if len(owners(model, p)) > 1]
    parameter = pick(generator, tied)
    if parameter is None:
        return None
    paths = owners(model, parameter)
    changed: Any = model.get_submodule(paths[-1])
    changed.weight = nn.Parameter(parameter.detach().clone())
    return Injection(model, None, paths, "always")


def train_overridden(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """A module whose train() always trains, whatever is asked, so that eval() does not reach it."""
    path = pick(generator, _modal(model))
    if path is None:
        return None
    module = model.get_submodule(path)
    kind = type(module)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return kind.train(self, True)

    module.__class__ = type(kind.__name__, (kind,), {"train": train})
    return Injection(model, None, (path,), "reached")


def left_in_eval(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """A module that was put into eval mode and never back."""
    path = pick(generator, _modal(model))
    if path is None:
        return None
    model.get_submodule(path).eval()
    return Injection(model, None, (path,), "reached")


def trained_in_forward(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """A module that switches itself to train mode in its forward."""
    path = pick(generator, _modal(model))
    if path is None:
        return None

    def forward(self: nn.Module, parent: Callable[..., Any], *args: Any) -> Any:
        self.train()
        return parent(*args)

    override(model.get_submodule(path), forward)
    return Injection(model, None, (path,), "reached")


def _modal(model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, MODAL) and getattr(module, "p", 1.0) > 0
    ]


def called_directly(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """A container calls the forward of its children, so that their hooks never run."""
    containers = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Sequential and len(module)
    ]
    path = pick(generator, containers)
    if path is None:
        return None

    def forward(self: Any, parent: Callable[..., Any], x: Tensor) -> Tensor:
        for child in self:
            x = child.forward(x)
        return x

    container: Any = model.get_submodule(path)
    override(container, forward)
    children = (f"{path}.{name}" for name, _ in container.named_children())
    return Injection(model, None, (path, *children), "reached")


def call_overridden(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """A module whose own `__call__` goes past the hooks."""
    path = pick(generator, [p for p in modules_with_forward(model) if p])
    if path is None:
        return None
    module = model.get_submodule(path)
    kind = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return Injection(model, None, (path,), "reached")


STRUCTURE = (
    Operator("frozen_parameter", "structural", frozen),
    Operator("weight_in_plain_list", "structural", replaced_weight(_to_list, lambda m: m.kept[0])),
    Operator(
        "weight_as_plain_tensor", "structural", replaced_weight(_to_tensor, lambda m: m.weight)
    ),
    Operator(
        "weight_as_buffer",
        "structural",
        replaced_weight(lambda m: _to_buffer(m, trained=False), lambda m: m.weight),
    ),
    Operator(
        "weight_as_tracked_buffer",
        "structural",
        replaced_weight(lambda m: _to_buffer(m, trained=True), lambda m: m.weight),
    ),
    Operator("unused_parameter", "structural", unused_parameter),
    Operator("copied_tie", "structural", copied_tie),
    Operator("train_overridden", "structural", train_overridden),
    Operator("left_in_eval", "structural", left_in_eval),
    Operator("trained_in_forward", "structural", trained_in_forward),
    Operator("called_directly", "structural", called_directly),
    Operator("call_overridden", "structural", call_overridden),
)
