"""Backward hooks of the twin: copied from the model, switched off, kept from touching the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
            for register, kind in ((before, "_backward_hooks"), (after, _AFTER)):
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
            yield vars(module).get("_backward_hooks", {})
            yield vars(module).get("_backward_pre_hooks", {})


@contextmanager
def unharmed(model: nn.Module) -> Iterator[None]:
    """Put values and gradients of `model` back on leaving, if it has hooks that could change them.

    A hook may close over the model that it was written for, and write there from the twin.
    """
    tensors = [*model.parameters(), *model.buffers()] if _is_hooked(model) else []
    kept = [(t, t.detach().clone(), t.grad, _copied(t.grad)) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values, grad, grad_values in kept:
                if not _same(tensor, values):
                    tensor.data.copy_(values)
                if grad is not None and grad_values is not None and not _same(grad, grad_values):
                    grad.copy_(grad_values)
                if tensor.grad is not grad:
                    tensor.grad = grad


def _is_hooked(model: nn.Module) -> bool:
    of_tensors = (
        getattr(p, k, None) for p in model.parameters() for k in ("_backward_hooks", _AFTER)
    )
    of_modules = (vars(m).get(kind) for m in model.modules() for kind in _MODULE_HOOKS)
    return any(of_tensors) or any(of_modules)


_MODULE_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_AFTER = "_post_accumulate_grad_hooks"


def _rebound(hook: Callable[..., Any], memo: dict[int, Any]) -> Callable[..., Any]:
    # Plain functions are returned as they are; what cannot be copied is used as it is.
    with suppress(TypeError, RuntimeError):
        return copy.deepcopy(hook, memo)
    return hook


def _copied(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().clone()


def _same(now: Tensor, before: Tensor) -> bool:
    if now.layout != torch.strided:
        now, before = now.to_dense(), before.to_dense()
    return torch.equal(now.detach().nan_to_num(), before.nan_to_num())
