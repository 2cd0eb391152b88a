"""No network while a component is imported.

Python's audit hooks (https://peps.python.org/pep-0578/) see every socket call, also those made deep
inside a library. One hook is installed when it is first needed; it looks away unless an import is
being watched. A refused call raises an ``OSError``, as it would on a machine without a network.
"""

import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_EVENTS = frozenset(
    {
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "socket.sendmsg",
        "socket.sendto",
    }
)
_LIBRARIES = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")}
)


@dataclass(frozen=True)
class Attempt:
    """A call of the network during an import: what was called, and the line that led to it."""

    event: str
    file: str
    line: int


class NetworkRefusedError(OSError):
    """Raised inside a module that calls the network while it is imported."""


_lock = threading.Lock()
_watching: list[tuple[int, list[Attempt]]] = []
_installed = False
attempts: list[Attempt] = []
"""Every attempt that was refused in this process."""


@contextmanager
def network_refused() -> Iterator[list[Attempt]]:
    """Refuse the network to this thread inside the block, and collect what tried to use it.

    The attempts are collected even where the module catches the error and goes on. Other threads go
    on undisturbed: a worker talks to its server while it imports a pipeline.
    """
    global _installed
    found: list[Attempt] = []
    watch = (threading.get_ident(), found)
    with _lock:  # a list that another thread rebuilds would lose this watch
        if not _installed:
            sys.addaudithook(_refuse)  # it cannot be removed, so there must be only one
            _installed = True
        _watching.append(watch)
    try:
        yield found
    finally:
        with _lock:
            _watching[:] = [other for other in _watching if other is not watch]


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching or event not in _EVENTS or _is_local(event, arguments):
        return
    here = threading.get_ident()
    watching = [found for thread, found in _watching if thread == here]
    if not watching:
        return
    file, line = _culprit(sys._getframe(1))
    attempt = Attempt(event, file, line)
    attempts.append(attempt)
    for found in watching:
        found.append(attempt)
    raise NetworkRefusedError(
        f"a module must not use the network while it is imported; {file}:{line} led to {event}. "
        "Move the call into a function"
    )


def is_library(file: str) -> bool:
    """Whether a file is Python's, installed, frozen into the interpreter, or none at all."""
    return not file or file.startswith(("<", *_LIBRARIES))


def _is_local(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether the call goes to a socket of this machine's file system, which is no network."""
    addressed = event in ("socket.connect", "socket.sendto", "socket.sendmsg")
    return addressed and len(arguments) > 1 and isinstance(arguments[1], (str, bytes))


def _culprit(frame: FrameType | None) -> tuple[str, int]:
    """The innermost line that belongs to no library; where there is none, the innermost line."""
    innermost = ("unknown", 0)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith("<"):
            place = (file, frame.f_lineno)
            if innermost[1] == 0:
                innermost = place
            if not is_library(file) and file != __file__:
                return place
        frame = frame.f_back
    return innermost
