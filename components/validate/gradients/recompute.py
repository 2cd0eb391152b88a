"""Activation checkpointing of torch.utils.checkpoint, watched and turned into plain calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as checkpointing
from torch import nn

# checkpoint() looks both up in its own module at every call, under whatever name it was imported.
_REENTRANT = "CheckpointFunction"
_OTHER = "_checkpoint_without_reentrant_generator"


class _Reentrant:
    """Stands for the autograd Function of the reentrant kind."""

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply


@contextmanager
def watched_checkpoints(model: nn.Module) -> Iterator[list[str]]:
    """The path of the module that made each call of checkpoint inside, in order."""
    paths = {id(module): path for path, module in model.named_modules()}
    callers: list[str] = []
    reentrant, other = getattr(checkpointing, _REENTRANT), getattr(checkpointing, _OTHER)

    def apply(*args: Any) -> Any:
        callers.append(_calling_module(paths))
        return reentrant.apply(*args)

    def generate(*args: Any, **kwargs: Any) -> Any:
        callers.append(_calling_module(paths))
        return other(*args, **kwargs)

    with _replaced(_Reentrant(apply), generate):
        yield callers


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Inside, checkpoint(function, ...) is function(...): nothing is recomputed."""

    def apply(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)

    def generate(*_args: Any, **_kwargs: Any) -> Iterator[None]:
        yield

    with _replaced(_Reentrant(apply), generate):
        yield


@contextmanager
def _replaced(reentrant: _Reentrant, other: Callable[..., Any]) -> Iterator[None]:
    kept = {name: getattr(checkpointing, name) for name in (_REENTRANT, _OTHER)}
    setattr(checkpointing, _REENTRANT, reentrant)
    setattr(checkpointing, _OTHER, other)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(checkpointing, name, value)


def _calling_module(paths: dict[int, str]) -> str:
    """Path of the innermost module whose method is on the stack; '' if there is none."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            # A method's first argument is its module, whatever it is called.
            path = paths.get(id(frame.f_locals.get(code.co_varnames[0])))
            if path is not None:
                return path
        frame = frame.f_back  # type: ignore[assignment]
    return ""
