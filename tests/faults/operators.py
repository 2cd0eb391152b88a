"""What a fault operator is, and the tools that all of them use to change a model.

An operator knows torch's public API and nothing of any detector. It puts one fault somewhere into a
model of any architecture and says which module holds it. Beside the faulty model it leaves a sound
one with the same forward values, whose gradients by autograd are the right ones.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Loss = Callable[[nn.Module, Any], Tensor]
Family = Literal["wrong_gradient", "structural", "step"]
# By which fact an injection counts as a fault; `oracle.truth` decides each of them.
#   gradient  the gradients differ from those of the sound model
#   flat      the loss no longer depends on tensors that it used to depend on
#   rows      a row alone gives another loss than the same row in its batch, or none
#   scale     the gradients are not proportional to the loss
#   update    a step of the optimiser differs from that of the sound one on the same gradients
#   reached   the module at fault takes part in the loss
#   always    the change is a fault wherever it is
Effect = Literal["gradient", "flat", "rows", "scale", "update", "reached", "always"]
Item = TypeVar("Item")
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Injection:
    """One fault at one place.

    `culprits` are the paths of the modules that hold it, usually one; a weight that several modules
    share, or a call between two modules, has several. It is empty where the fault lies outside the
    model (optimiser, loss). `tensors` are parameters that are at fault though their gradients are
    right, such as frozen ones. `loss` wraps the loss of the architecture,
    `sound_loss` that of the sound model.
    """

    model: nn.Module
    sound: nn.Module | None
    culprits: tuple[str, ...]
    effect: Effect = "gradient"
    tensors: tuple[str, ...] = ()
    loss: Callable[[Loss], Loss] | None = None
    sound_loss: Callable[[Loss], Loss] | None = None
    optimizer: MakeOptimizer | None = None
    sound_optimizer: MakeOptimizer | None = None


Inject = Callable[[nn.Module, torch.Generator], Injection | None]


@dataclass(frozen=True)
class Operator:
    """A kind of fault. `inject` changes the model it is given; None where no place fits."""

    name: str
    family: Family
    inject: Inject


def pick(generator: torch.Generator, items: Sequence[Item]) -> Item | None:
    """One of `items` at random, or None if there are none."""
    if not items:
        return None
    return items[int(torch.randint(len(items), (), generator=generator))]


def modules_with_forward(model: nn.Module) -> list[str]:
    """Paths of modules that compute something by themselves, the model included."""
    idle = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Identity)
    return [path for path, module in model.named_modules() if not isinstance(module, idle)]


def owners(model: nn.Module, parameter: nn.Parameter) -> tuple[str, ...]:
    """Paths of the modules that hold `parameter`."""
    return tuple(
        path
        for path, module in model.named_modules()
        if any(held is parameter for held in module.parameters(recurse=False))
    )


def override(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give `module` a subclass of its class whose forward is `forward(self, parent, *inputs)`.

    `parent` is the forward that it had. Names of parameters and submodules stay as they are.
    """
    kind = type(module)

    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, functools.partial(kind.forward, self), *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"forward": replaced})


def on_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output`, a nest of tuples and dicts, with its first floating-point tensor changed."""
    changed = False

    def visit(nest: Any) -> Any:
        nonlocal changed
        if changed:
            return nest
        if isinstance(nest, Tensor):
            changed = nest.is_floating_point()
            return change(nest) if changed else nest
        if isinstance(nest, dict):
            return {key: visit(value) for key, value in nest.items()}
        if isinstance(nest, (tuple, list)):
            return type(nest)([visit(value) for value in nest])
        return nest

    return visit(output)


def after(change: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., Any]:
    """A forward for `override` that changes what the parent's forward returns."""

    def forward(self: nn.Module, parent: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_first(parent(*args, **kwargs), lambda tensor: change(self, tensor))

    return forward


def at_output(
    broken: Callable[[nn.Module, Tensor], Tensor],
    sound: Callable[[nn.Module, Tensor], Tensor] | None = None,
    effect: Effect = "gradient",
    *,
    where: Callable[[nn.Module], bool] = lambda module: True,
) -> Inject:
    """A fault in what some module returns; `sound` does the same to values, with right gradients.

    Without `sound`, the values of the model stay as they were.
    """

    def inject(model: nn.Module, generator: torch.Generator) -> Injection | None:
        paths = [p for p in modules_with_forward(model) if where(model.get_submodule(p))]
        path = pick(generator, paths)
        if path is None:
            return None
        reference = copy.deepcopy(model)
        override(model.get_submodule(path), after(broken))
        if sound is not None:
            override(reference.get_submodule(path), after(sound))
        return Injection(model, reference, (path,), effect)

    return inject


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.LayerNorm)
Arguments = tuple[Tensor, Tensor | None]


def layers(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Paths of layers with a weight whose forward `computed` can write out."""
    return [p for p, m in model.named_modules() if type(m) in (kinds or LAYERS) and has_weight(m)]


def has_weight(module: nn.Module) -> bool:
    """Whether the layer's weight is a parameter of its own that is trained."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.requires_grad


def computed(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` would return for input `x` if it had this weight and bias."""
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    if isinstance(layer, nn.Embedding):
        return functional.embedding(x, weight, layer.padding_idx)
    if isinstance(layer, nn.LayerNorm):
        return functional.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    convolve = functional.conv1d if isinstance(layer, nn.Conv1d) else functional.conv2d
    return convolve(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def with_arguments(change: Callable[[Any, Tensor, Arguments], Arguments]) -> Callable[..., Any]:
    """A forward of a layer whose weight and bias pass through `change(layer, input, arguments)`."""

    def forward(self: Any, parent: Callable[..., Any], x: Tensor) -> Tensor:
        weight, bias = change(self, x, (self.weight, getattr(self, "bias", None)))
        return computed(self, x, weight, bias)

    return forward


def at_arguments(
    broken: Callable[[Any, Tensor, Arguments], Arguments],
    sound: Callable[[Any, Tensor, Arguments], Arguments] | None = None,
    *,
    kinds: tuple[type[nn.Module], ...] = LAYERS,
    where: Callable[[Any], bool] = lambda layer: True,
) -> Inject:
    """A fault in how some layer reads its weight or bias; `sound` as in `at_output`."""

    def inject(model: nn.Module, generator: torch.Generator) -> Injection | None:
        paths = [p for p in layers(model, *kinds) if where(model.get_submodule(p))]
        path = pick(generator, paths)
        if path is None:
            return None
        reference = copy.deepcopy(model)
        override(model.get_submodule(path), with_arguments(broken))
        if sound is not None:
            override(reference.get_submodule(path), with_arguments(sound))
        return Injection(model, reference, (path,))

    return inject


def weight_only(
    change: Callable[[Tensor], Tensor],
) -> Callable[[Any, Tensor, Arguments], Arguments]:
    """`change` applied to a layer's weight, for `at_arguments`."""
    return lambda layer, x, arguments: (change(arguments[0]), arguments[1])


class Crooked(torch.autograd.Function):
    """Returns its input; in the backward pass the gradient goes through `rule`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.rule = rule
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.rule(gradient), None


def crooked(rule: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The identity with gradient `rule(gradient)`."""
    return lambda x: Crooked.apply(x, rule)
