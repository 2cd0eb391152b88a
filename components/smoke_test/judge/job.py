"""What the child is asked, what it answers, and how a check that raises becomes a failure.

Nothing but the standard library: the parent reads these types too.
"""

import sys
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

Result = TypeVar("Result")

OUT_OF_MEMORY = (
    "MemoryError",
    "bad_alloc",
    "Failed to allocate memory",
    "Cannot allocate memory",
    "Memory allocation still failed",
)

ANNOUNCEMENT = "<trying: {}>"
"""What stands on stderr before each step."""


class Job(TypedDict):
    """What to test, and how.

    ``p99_ms`` and ``rows_per_s`` are the budget. ``round_seconds`` ends a round of ``calls`` calls
    to a slow model early.
    """

    model: str
    sha256: str
    golden: str
    batch_sizes: list[int]
    rtol: float
    atol: float
    threads: int
    provider: str
    memory_bytes: int
    cpu_seconds: int
    p99_ms: float
    rows_per_s: float
    calls: int
    round_seconds: float


class Answer(TypedDict):
    """``broken``: the engine cannot load. ``failures``: why not. ``report``: the measurements."""

    broken: str | None
    failures: list[str]
    report: dict[str, Any] | None


def attempt(what: str, failures: list[str], step: Callable[[], Result]) -> Result | None:
    """Take a step; an exception becomes a failure, so that the checks after it still run.

    The step is announced on stderr, so that the parent can say where a child that died was.
    """
    print(ANNOUNCEMENT.format(what), file=sys.stderr, flush=True)  # noqa: T201 - read by the parent
    try:
        return step()
    except Exception as error:  # whatever a hostile model provokes is a reason to reject it
        failures.append(f"{what}: {describe(error)}")
        return None


def describe(error: Exception) -> str:
    """One bounded line about an exception; exhausted memory is named as such."""
    line = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return f"out of memory: {line}" if any(sign in line for sign in OUT_OF_MEMORY) else line
