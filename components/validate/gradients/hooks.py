"""Backward hooks of the twin: copied from the model, switched off, kept from touching the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
"""Attributes in which a module keeps the hooks that a backward pass runs."""

_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_BEFORE, _AFTER = "_backward_hooks", "_post_accumulate_grad_hooks"

Pair = tuple[Tensor, Tensor]
"""A parameter of the given model and the leaf that stands for it in the twin."""


@final
class Hooks:
    """The backward hooks that a training step of the model would run, on the twin.

    `copy.deepcopy` keeps modules' hooks but drops those of tensors, so these are registered again
    on the twin's leaves. `memo` is that of the deep copy: a hook that is a bound method of the
    model becomes one of the twin.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[Pair], memo: dict[int, Any]) -> None:
        self._model = model
        self._wanted: list[tuple[Callable[..., RemovableHandle], Callable[..., Any]]] = []
        for given, leaf in pairs:
            if not leaf.requires_grad:
                continue
            before, after = leaf.register_hook, leaf.register_post_accumulate_grad_hook
            for register, kind in ((before, _BEFORE), (after, _AFTER)):
                hooks = getattr(given, kind, None) or {}
                self._wanted += [(register, _rebound(hook, memo)) for hook in hooks.values()]
        self._handles: list[RemovableHandle] = []
        self._register()

    @property
    def present(self) -> bool:
        """True when a tensor or a module has a hook that a backward pass runs."""
        return bool(self._wanted) or any(map(len, self._of_modules()))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Without any of them inside."""
        kept = [(hooks, dict(hooks)) for hooks in self._of_modules()]
        for handle in self._handles:
            handle.remove()
        for hooks, _ in kept:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, entries in kept:
                hooks.update(entries)
            self._register()

    def _register(self) -> None:
        self._handles = [register(hook) for register, hook in self._wanted]

    def _of_modules(self) -> Iterator[dict[int, Any]]:
        for module in self._model.modules():
            for kind in BACKWARD_HOOKS:
                yield vars(module).get(kind, {})


@contextmanager
def unharmed(model: nn.Module) -> Iterator[None]:
    """Put gradients and modes of `model` back on leaving, and values if it has hooks.

    A hook, or a forward that was replaced by a function, may close over the model that it was
    written for, and write there from the twin. Inside, such a hook finds copies of the gradients.
    """
    hooked = is_hooked(model)
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in tensors] if hooked else []
    gradients = [(t, t.grad) for t in tensors if t.is_leaf]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for tensor, grad in gradients:
            if grad is not None:
                tensor.grad = grad.detach().clone() if hooked else None
        yield
    finally:
        for tensor, grad in gradients:
            if grad is not None or tensor.grad is not None:
                tensor.grad = grad
        for tensor, kept in zip(tensors if hooked else (), values, strict=True):
            if not same_values(tensor.detach(), kept):
                tensor.data.copy_(kept)
        for module, training in modes:
            if module.training != training:
                module.training = training


def is_hooked(model: nn.Module) -> bool:
    """True when a training step of the model runs hooks, which may write anywhere."""
    kinds = (*_FORWARD_HOOKS, *BACKWARD_HOOKS)
    of_modules = (vars(module).get(kind) for module in model.modules() for kind in kinds)
    return any(map(has_hook, model.parameters())) or any(of_modules)


def has_hook(leaf: Tensor) -> bool:
    """True when a backward pass runs a hook of this tensor."""
    return any(bool(getattr(leaf, kind, None)) for kind in (_BEFORE, _AFTER))


def _rebound(hook: Callable[..., Any], memo: dict[int, Any]) -> Callable[..., Any]:
    # Plain functions are returned as they are; what cannot be copied is used as it is.
    with suppress(Exception):
        return copy.deepcopy(hook, memo)
    return hook


def same_values(one: Tensor, other: Tensor) -> bool:
    """Equal elements, where NaN equals NaN only."""
    if torch.equal(one, other):
        return True
    return one.shape == other.shape and bool(
        ((one == other) | ((one != one) & (other != other))).all()
    )
