"""Faults in the backward pass: custom functions with wrong formulas, and hooks that interfere."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from faults.operators import (
    Arguments,
    Inject,
    Injection,
    Operator,
    at_arguments,
    at_output,
    crooked,
    has_weight,
    modules_with_forward,
    override,
    owners,
    pick,
    weight_only,
)
from torch import Tensor, nn
from torch.nn import functional


def scaled_output(factor: float) -> Inject:
    """A custom function at a module's output whose backward is wrong by a factor."""
    crook = crooked(lambda g: g * factor)
    return at_output(lambda self, y: crook(y))


def scaled_weight(factor: float) -> Inject:
    """A layer's own kernel whose weight gradient is wrong by a factor."""
    return at_arguments(weight_only(crooked(lambda g: g * factor)))


class BiasByRow(torch.autograd.Function):
    """x + bias for a bias along the last axis; `reduce` stands where the sum over rows belongs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.reduce = reduce
        return x + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.reduce(gradient.flatten(0, -2)), None


def misreduced_bias(reduce: Callable[[Tensor], Tensor]) -> Inject:
    """A linear layer whose bias gradient is not the sum over rows."""

    def inject(model: nn.Module, generator: torch.Generator) -> Injection | None:
        paths = [
            path
            for path, layer in model.named_modules()
            if type(layer) is nn.Linear and layer.bias is not None and has_weight(layer)
        ]
        path = pick(generator, paths)
        if path is None:
            return None
        sound = copy.deepcopy(model)

        def forward(self: Any, parent: Callable[..., Any], x: Tensor) -> Tensor:
            return BiasByRow.apply(functional.linear(x, self.weight), self.bias, reduce)

        override(model.get_submodule(path), forward)
        return Injection(model, sound, (path,))

    return inject


def at_parameter(
    register: Callable[[nn.Parameter, torch.Generator], object], **options: Any
) -> Inject:
    """A hook on one parameter; its owners hold the fault."""

    def inject(model: nn.Module, generator: torch.Generator) -> Injection | None:
        parameter = pick(generator, [p for p in model.parameters() if p.requires_grad])
        if parameter is None:
            return None
        sound = copy.deepcopy(model)
        register(parameter, generator)
        return Injection(model, sound, owners(model, parameter), **options)

    return inject


def module_hook(change: Callable[[Tensor], Tensor]) -> Inject:
    """A full backward hook on a module that changes the gradient of its inputs."""

    def inject(model: nn.Module, generator: torch.Generator) -> Injection | None:
        path = pick(generator, modules_with_forward(model))
        if path is None:
            return None
        sound = copy.deepcopy(model)

        def hook(module: nn.Module, arriving: Any, leaving: Any) -> Any:
            return tuple(None if g is None else change(g) for g in arriving)

        model.get_submodule(path).register_full_backward_hook(hook)
        return Injection(model, sound, (path,))

    return inject


def _square(layer: Any) -> bool:
    return layer.weight.dim() >= 2 and layer.weight.shape[0] == layer.weight.shape[1] > 1


def _first_word_dropped(layer: Any, words: Tensor, arguments: Arguments) -> Arguments:
    def rule(gradient: Tensor) -> Tensor:
        return gradient.index_fill(0, words.flatten()[:1], 0.0)

    return crooked(rule)(arguments[0]), None


def _dropped(gradient: Tensor) -> Tensor:
    return functional.dropout(gradient, 0.25)


def _clipped(gradient: Tensor) -> Tensor:
    return gradient / (1 + gradient.norm())


def _clipped_above_one(gradient: Tensor) -> Tensor:
    return gradient * (1 / gradient.norm().clamp(min=1.0))


def _halved_in_place(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


class RoughGelu(torch.autograd.Function):
    """The exact GELU with the derivative of its tanh approximation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
        return gradient * slope


BACKWARD = (
    Operator("wrong_sign", "wrong_gradient", scaled_output(-1.0)),
    Operator("factor_2", "wrong_gradient", scaled_output(2.0)),
    Operator("factor_1.1", "wrong_gradient", scaled_weight(1.1)),
    Operator("factor_1.01", "wrong_gradient", scaled_output(1.01)),
    Operator("factor_1.001", "wrong_gradient", scaled_weight(1.001)),
    Operator("factor_1.0001", "wrong_gradient", scaled_output(1.0001)),
    Operator("bias_of_one_row", "wrong_gradient", misreduced_bias(lambda g_RF: g_RF[0].clone())),
    Operator("bias_of_mean_row", "wrong_gradient", misreduced_bias(lambda g_RF: g_RF.mean(0))),
    Operator(
        "transposed_gradient",
        "wrong_gradient",
        at_arguments(weight_only(crooked(lambda g: g.transpose(0, 1))), where=_square),
    ),
    Operator(
        "embedding_row_dropped",
        "wrong_gradient",
        at_arguments(_first_word_dropped, kinds=(nn.Embedding,)),
    ),
    Operator("gradient_dropout", "wrong_gradient", at_output(lambda self, y: crooked(_dropped)(y))),
    Operator(
        "approximate_derivative",
        "wrong_gradient",
        at_output(lambda self, y: RoughGelu.apply(y), lambda self, y: functional.gelu(y)),
    ),
    Operator(
        "hook_clips_parameter",
        "wrong_gradient",
        at_parameter(lambda p, g: p.register_hook(_clipped)),
    ),
    Operator("hook_takes_sign", "wrong_gradient", module_hook(torch.sign)),
    Operator(
        "unscaled_twice",
        "wrong_gradient",
        at_parameter(lambda p, g: p.register_post_accumulate_grad_hook(_halved_in_place)),
    ),
    Operator(
        "clipped_before_unscaling",
        "step",
        at_parameter(lambda p, g: p.register_hook(_clipped_above_one), effect="scale"),
    ),
    Operator(
        "divided_by_rows",
        "wrong_gradient",
        at_output(lambda self, y: crooked(lambda g: g / g.shape[0])(y)),
    ),
)
