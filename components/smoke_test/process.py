"""One child process: started, fed, listened to within bounds, and stopped with all it started."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

from components.errors import InfrastructureError

_OUTPUT_BYTES = 1 << 18
_STDERR_CHARACTERS = 2000
_KILL_GRACE_S = 5


class Ended(NamedTuple):
    """How the child ended; ``returncode`` is None when it ran out of time."""

    returncode: int | None
    stdout: bytes
    stderr: str


def run_child(
    command: Sequence[str], environment: Mapping[str, str], payload: bytes, timeout_s: float
) -> Ended:
    """Run a command in an empty folder, with nothing of this process's environment.

    Args:
        command: Program and arguments.
        environment: All that the child knows.
        payload: What it reads from stdin.
        timeout_s: Seconds after which it and the processes that it started are killed.

    Raises:
        InfrastructureError: It cannot start.
    """
    try:
        # An empty working folder leaves a model's external data nothing to name.
        with tempfile.TemporaryDirectory(prefix="assay-smoke-") as folder:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            return _converse(process, payload, timeout_s)
    except OSError as error:
        raise InfrastructureError(
            f"the smoke test's child process must start; got {error}. Check that "
            f"{command[0]} runs and that the temporary folder is writable."
        ) from error


def _converse(process: subprocess.Popen[bytes], payload: bytes, timeout_s: float) -> Ended:
    assert process.stdin and process.stdout and process.stderr, "all three are pipes"
    stdout = _Drain(process.stdout, keep_last=False)
    stderr = _Drain(process.stderr, keep_last=True)
    threads = [threading.Thread(target=_feed, args=(process.stdin, payload), daemon=True)]
    threads += [stdout, stderr]
    for thread in threads:
        thread.start()
    try:
        returncode: int | None = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        returncode = None
    finally:
        if process.returncode is None:  # also when this wait was interrupted
            _kill(process)
    for thread in threads:
        thread.join(_KILL_GRACE_S)
    return Ended(returncode, bytes(stdout.kept), _printable(bytes(stderr.kept)))


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        # The child leads its own group and is not reaped yet, so the id is still its own.
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_GRACE_S)


def _feed(stream: IO[bytes], payload: bytes) -> None:
    # A child that died early says so by its return code.
    with contextlib.suppress(BrokenPipeError), stream:
        stream.write(payload)


class _Drain(threading.Thread):
    """Reads a pipe to its end, so that the child never blocks, and keeps a bounded part of it."""

    def __init__(self, stream: IO[bytes], *, keep_last: bool) -> None:
        super().__init__(daemon=True)
        self.kept = bytearray()
        self._stream = stream
        self._keep_last = keep_last

    def run(self) -> None:
        with self._stream:
            while chunk := os.read(self._stream.fileno(), 1 << 16):
                self.kept += chunk
                if len(self.kept) > _OUTPUT_BYTES:
                    cut = slice(-_OUTPUT_BYTES) if self._keep_last else slice(_OUTPUT_BYTES, None)
                    del self.kept[cut]


def _printable(raw: bytes) -> str:
    """Decode text that goes into a message: no colours, no control characters, bounded."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", raw.decode(errors="replace"))
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[-_STDERR_CHARACTERS:]
