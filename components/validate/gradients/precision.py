"""Keeps an evaluation in float64, and notices where it leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from components.validate.nests import is_differentiable, map_tensors, tensors_in, widened

# Losses that promote no dtypes, so that class weights in float32 stop float64 numbers.
_STRICT = frozenset(
    {
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "cross_entropy_loss",
        "nll_loss",
        "nll_loss_nd",
    }
)
_CASTS = frozenset({Tensor.float, Tensor.to, Tensor.type})


class WidenConstants(TorchFunctionMode):
    """Lets whole numbers and class weights take part in float64, as they do in float32 in training.

    `labels.float()` is a cast of whole numbers, and `torch.tensor([1.0, 3.0])` in a loss holds
    class weights: neither means that the loss is to be rounded to float32, which would hide small
    errors of gradients behind rounding. What comes from parameters or inputs is left as it is.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named: Mapping[str, Any] = kwargs or {}
        if func in _CASTS and args and _is_whole(args[0]):
            if func is Tensor.float:
                return args[0].double()
            rest = tuple(_wide_dtype(value) for value in args[1:])
            return func(args[0], *rest, **{k: _wide_dtype(v) for k, v in named.items()})
        if getattr(func, "__name__", "") in _STRICT and _is_mixed((args, named)):
            args, named = map_tensors((args, dict(named)), _wide_constant)
        return func(*args, **named)


class PrecisionWatch(TorchFunctionMode):
    """Notices a float64 tensor on the gradient's path being cast to a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.lowered = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.lowered and any(_is_low(t) for t in tensors_in(result)):
            self.lowered = any(_is_tracked_double(t) for t in tensors_in((args, kwargs)))
        return result


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_differentiable(value)


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _is_mixed(nest: Any) -> bool:
    dtypes = {tensor.dtype for tensor in tensors_in(nest)}
    return {torch.float32, torch.float64} <= dtypes


def _wide_constant(tensor: Tensor) -> Tensor:
    constant = tensor.dtype == torch.float32 and not tensor.requires_grad
    return widened(tensor) if constant else tensor


def _is_low(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _is_tracked_double(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64 and tensor.requires_grad
