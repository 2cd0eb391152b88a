"""Counts how often the forward of each module instance is entered, however it is called.

``module(x)`` is not the only way into a forward: ``module.forward(x)``, ``nn.Linear.forward(module,
x)`` and ``type(module).forward(module, x)`` are others, and none of them runs the module's hooks.
So the functions themselves are watched, on the classes, and entries are told apart by instance. A
class's forward that hands on to a base class's for the same instance is one entry, not two.
"""

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

_lock = threading.RLock()
"""Classes are shared by the whole process: only one thread at a time may watch them."""

_OWN_FORWARD = -1
"""Depth of a forward that stands on the instance, which hides those of all its classes."""


@contextmanager
def entries_counted(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Counter[str]]:
    """Count entries by module path inside the block; classes and instances are put back after it.

    Args:
        modules: Path and instance; other instances of the same classes are not counted.
    """
    watch = _Watch({id(module): (path, module) for path, module in modules})
    with _lock, ExitStack() as stack:
        for cls in watch.classes():
            stack.enter_context(_replaced_on_class(cls, watch))
        for path, module in watch.named.values():
            if "forward" in vars(module) or not _watchable(module):
                stack.enter_context(_replaced_on_instance(module, path, watch))
        yield watch.counts


class _Watch:
    def __init__(self, named: dict[int, tuple[str, nn.Module]]) -> None:
        self.named = named
        self.counts: Counter[str] = Counter()
        self._running: dict[tuple[int, int], list[int]] = {}
        self._depth = {
            cls: {base: depth for depth, base in enumerate(cls.__mro__)}
            for cls in {type(module) for _, module in named.values()}
        }

    def classes(self) -> list[type]:
        """Every class that defines a forward in Python for one of the modules."""
        bases = dict.fromkeys(base for depths in self._depth.values() for base in depths)
        return [cls for cls in bases if cls is not nn.Module and _defines_forward(cls)]

    def call(self, cls: type, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a class's forward; the first argument is the instance."""
        path, module = self.named.get(id(args[0]) if args else 0, ("", None))
        if module is None:
            return function(*args, **kwargs)
        return self.enter(
            path, module, self._depth[type(module)].get(cls, 0), function, args, kwargs
        )

    def enter(
        self, path: str, module: nn.Module, depth: int, function: Any, args: Any, kwargs: Any
    ) -> Any:
        """A call of a forward at some depth of the instance's classes."""
        running = self._running.setdefault((threading.get_ident(), id(module)), [])
        # Deeper than the forward that runs: super().forward(...), the same entry.
        if not running or depth <= running[-1]:
            self.counts[path] += 1
        running.append(depth)
        try:
            return function(*args, **kwargs)
        finally:
            running.pop()


def _defines_forward(cls: type) -> bool:
    return inspect.isfunction(vars(cls).get("forward"))


def _watchable(module: nn.Module) -> bool:
    """Whether the forward that a call reaches is a plain function of a class."""
    owner = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), nn.Module)
    return owner is nn.Module or _defines_forward(owner)


@contextmanager
def _replaced_on_class(cls: type, watch: _Watch) -> Iterator[None]:
    original = vars(cls)["forward"]

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        return watch.call(cls, original, args, kwargs)

    type.__setattr__(cls, "forward", counted)
    try:
        yield
    finally:
        type.__setattr__(cls, "forward", original)


@contextmanager
def _replaced_on_instance(module: nn.Module, path: str, watch: _Watch) -> Iterator[None]:
    own, missing = vars(module), object()
    previous, original = own.get("forward", missing), module.forward

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        return watch.enter(path, module, _OWN_FORWARD, original, args, kwargs)

    own["forward"] = counted
    try:
        yield
    finally:
        if previous is missing:
            del own["forward"]
        else:
            own["forward"] = previous
