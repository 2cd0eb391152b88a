"""Tensors inside nests: batches, module inputs and outputs, plain module attributes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


def map_tensors(nest: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild a nest of tensors with `change` on every tensor; nothing in `nest` is written to.

    Looks into mappings, lists, (named) tuples, dataclasses and other objects that hold tensors in
    their attributes, such as the batches and outputs of `transformers`. What holds no tensor is
    passed on as it is.
    """
    return _rebuild(nest, change, {})


def _rebuild(nest: Any, change: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    if isinstance(nest, Tensor):
        return change(nest)
    if id(nest) in done:
        return done[id(nest)]
    if next(tensors_in(nest), None) is None:
        return nest
    if isinstance(nest, (list, tuple)):
        members = [_rebuild(value, change, done) for value in nest]
        named = hasattr(nest, "_fields")
        done[id(nest)] = type(nest)(*members) if named else type(nest)(members)
        return done[id(nest)]
    # Objects may refer to each other in a ring, so the new one is known before its members are.
    rebuilt = done[id(nest)] = copy.copy(nest)
    if _is_mapping(nest):
        for key, value in nest.items():
            rebuilt[key] = _rebuild(value, change, done)
    else:
        for name, value in vars(nest).items():
            # Frozen dataclasses refuse plain assignment.
            object.__setattr__(rebuilt, name, _rebuild(value, change, done))
    return rebuilt


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """Every tensor of a nest in order, of all kinds that `map_tensors` rebuilds."""
    yield from _tensors(nest, set())


def _tensors(nest: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
        return
    if id(nest) not in seen and (members := _members(nest)):
        seen.add(id(nest))
        for value in members:
            yield from _tensors(value, seen)


def _members(nest: Any) -> Iterable[Any]:
    if _is_mapping(nest):
        return cast("Iterable[Any]", nest.values())
    if isinstance(nest, (list, tuple)):
        return nest
    return vars(nest).values() if _holds_attributes(nest) else ()


def _is_mapping(nest: Any) -> bool:
    # A mapping of another class may share what it holds with its shallow copy, which lies in its
    # attributes then.
    return isinstance(nest, dict) or (
        isinstance(nest, MutableMapping) and not _holds_attributes(nest)
    )


def _holds_attributes(nest: Any) -> bool:
    if isinstance(nest, (type, nn.Module, ModuleType, FunctionType, MethodType)):
        return False
    return hasattr(nest, "__dict__")


def common_rows(nest: Any) -> int | None:
    """Length of the first axis that all tensors share; None if there is none, or none to cut.

    None, too, where something else goes by rows, such as a list of as many lengths: cutting the
    tensors alone would tear them from it.
    """
    tensors = list(tensors_in(nest))
    if not tensors or any(t.layout != torch.strided or t.is_nested or not t.ndim for t in tensors):
        return None
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1:
        return None
    count = lengths.pop()
    return None if _goes_by_rows(nest, count, set()) else count


def _goes_by_rows(nest: Any, count: int, seen: set[int]) -> bool:
    """True when something that is no tensor counts the rows, or holds a value for each."""
    if isinstance(nest, Tensor) or id(nest) in seen:
        return False
    if isinstance(nest, np.ndarray):
        return bool(nest.shape[:1] == (count,))
    if isinstance(nest, int):
        return nest == count and not isinstance(nest, bool)
    seen.add(id(nest))
    # What a mapping keeps beside its values, such as a tokenizer's record of each row, is not read.
    members = list(nest.values() if isinstance(nest, MutableMapping) else _members(nest))
    plain = isinstance(nest, (list, tuple)) and next(tensors_in(nest), None) is None
    return (plain and len(members) == count) or any(_goes_by_rows(m, count, seen) for m in members)


def once_per_tensor(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Memoise `change` by identity: q, k and v that are one tensor stay one tensor."""
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def changed(tensor: Tensor) -> Tensor:
        # The source is kept beside its result so that its id cannot be reused meanwhile.
        return done.setdefault(id(tensor), (tensor, change(tensor)))[1]

    return changed


def is_differentiable(tensor: Tensor) -> bool:
    """True for the dtypes that can carry a gradient: floating point and complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def widened(tensor: Tensor) -> Tensor:
    """Same values in float64 or complex128; integers and booleans as they are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def as_real(tensor: Tensor) -> Tensor:
    """A real view, with a last axis of (real, imaginary) for complex tensors."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclasses.dataclass(frozen=True)
class Stray:
    """A tensor held by a module (path `owner`) without being registered there."""

    owner: str
    path: str
    tensor: Tensor


def stray_tensors(model: nn.Module) -> list[Stray]:
    """Tensors in plain attributes, lists, dicts and unregistered modules of every submodule."""
    known: set[int] = {id(t) for t in (*model.parameters(), *model.buffers())}
    known.update(id(module) for module in model.modules())
    strays = []
    for owner, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if k not in _REGISTRIES}
        for name, value in plain.items():
            path = f"{owner}.{name}" if owner else name
            strays += [Stray(owner, where, t) for where, t in _walk(value, path, known)]
    return strays


def _walk(value: Any, path: str, known: set[int]) -> Iterator[tuple[str, Tensor]]:
    containers = (Tensor, nn.Module, dict, list, tuple, set)
    if not isinstance(value, containers) or id(value) in known:
        return
    known.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        for name, child in _module_members(value):
            yield from _walk(child, f"{path}.{name}", known)
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _walk(child, f"{path}[{key!r}]", known)
    else:
        for index, child in enumerate(value):
            yield from _walk(child, f"{path}[{index}]", known)


def _module_members(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for registry in _REGISTRIES:
        yield from vars(module)[registry].items()
    for name, value in vars(module).items():
        if name not in _REGISTRIES:
            yield name, value
