"""Stopping on a signal, for certain.

Python raises an interrupt wherever the main thread happens to be. If that is inside a weak
reference's callback or a ``__del__``, the exception is printed and lost, and the process would go
on as if nobody had asked it to stop. So the interrupt is raised again, once a second, until
somebody says that it has arrived.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

_AGAIN_S = 1.0


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGINT raise KeyboardInterrupt in the main thread until it is received.

    So ``finally`` blocks run: the embedded server stops, and the MLflow run is closed.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _unraisable


def reclaim_signals() -> None:
    """Take SIGTERM back, where :func:`interrupt_on_signals` had it, from a flow that has begun.

    Prefect's own handler raises once and no more. A worker's process never called the former, and
    keeps Prefect's, which tells a cancellation from a crash.
    """
    if signal.getsignal(signal.SIGALRM) is _interrupt:
        signal.signal(signal.SIGTERM, _interrupt)


def interrupt_received() -> None:
    """Stop repeating; cleaning up is not to be interrupted. Does nothing if nobody interrupted."""
    signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def deferred_signals(patience_s: float = 10.0) -> Iterator[Callable[[], bool]]:
    """Hold back the first SIGTERM or SIGINT until the block ends; gives a function that sees it.

    So work can come to a point where it may be stopped. A second signal is not held back, nor is
    the first for longer than ``patience_s``: work that hangs is stopped where it is. Outside of the
    main thread, where Python delivers no signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    arrived: list[int] = []
    waiting: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # One that is ignored stays so; one that was not set from Python could not be put back.
    before = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
    alarm = signal.getsignal(signal.SIGALRM)

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        arrived.append(number)
        waiting.append(number)
        signal.signal(signal.SIGALRM, deliver)
        signal.setitimer(signal.ITIMER_REAL, patience_s)

    def deliver(*unused: object) -> None:
        if waiting:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
            signal.raise_signal(waiting.pop())

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(arrived)
    finally:
        restore()
        deliver()


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """Say nothing of a lost interrupt: it comes again.

    While a flow runs, SIGTERM is Prefect's, which raises a signal of its own, once.
    """
    if isinstance(lost.exc_value, Exception | GeneratorExit | SystemExit | None):
        sys.__unraisablehook__(lost)
    else:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    raise KeyboardInterrupt
