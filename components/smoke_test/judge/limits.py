"""Limits that the child puts on itself before it loads anything: memory, time, and no network.

Source of the flags: https://man7.org/linux/man-pages/man2/unshare.2.html
"""

import ctypes
import sys

from .job import Job

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000


def apply_limits(job: Job) -> dict[str, int | str]:
    """Cut the network and lower this process's limits; say which ones the platform accepted."""
    applied: dict[str, int | str] = {"network": cut_network()}
    if sys.platform == "win32":  # the parent's timeout still holds there
        return applied
    import resource

    # CUDA reserves far more address space than it uses; there, only data pages are counted.
    memory = "RLIMIT_AS" if job["provider"] == "CPUExecutionProvider" else "RLIMIT_DATA"
    wanted = {"RLIMIT_CORE": 0, memory: job["memory_bytes"], "RLIMIT_CPU": job["cpu_seconds"]}
    for name, value in wanted.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        # SIGXCPU at the soft limit says why; it comes only while the hard one lies above it.
        limits = (value, value + 1 if name == "RLIMIT_CPU" else value)
        if hard != resource.RLIM_INFINITY:
            limits = (min(limits[0], hard), min(limits[1], hard))
        try:
            resource.setrlimit(kind, limits)
        except (ValueError, OSError):  # macOS refuses a limit on address space
            continue
        applied[name] = limits[0]
    return applied


def cut_network() -> str:
    """Leave this process without a network, for good.

    Returns:
        ``namespace`` where the kernel gave the process an empty network of its own, which native
        code cannot leave; ``audit`` where only Python's own sockets are refused.
    """
    sys.addaudithook(refuse_sockets)
    return "namespace" if sys.platform == "linux" and leave_network() else "audit"


def leave_network() -> bool:
    """Move to a new network namespace; who is not root needs a new user namespace with it.

    The second way is open only to a process with one thread, so this comes before any import that
    starts threads.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (CLONE_NEWNET, CLONE_NEWUSER | CLONE_NEWNET))


def refuse_sockets(event: str, _args: tuple[object, ...]) -> None:
    """Refuse every use of a socket, and every look-up of a name, that Python tells about.

    Raises:
        PermissionError: The event is one of the socket module.
    """
    if event.startswith("socket."):
        raise PermissionError(f"the smoke test has no network; {event} is refused")
