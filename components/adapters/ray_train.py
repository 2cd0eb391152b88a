"""Data-parallel training on Ray: start workers, pass on what they report, restart lost ones.

Nothing here imports Ray. It runs in a child process (:mod:`components.adapters.ray_driver`), which
speaks JSON over pipes and ends when this process does, so that Ray's output, signal handlers,
variables and pickled control messages stay out of the process that promotes models.
"""

import contextlib
import json
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from components import errors
from components.errors import AssayError, ConfigError, GateError, InfrastructureError
from components.state import storage_errors

DRIVER = "components.adapters.ray_driver"
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_PROBE_S = 5.0
_START_S = 120.0
_STOP_S = 15.0
_SOCKET_PATH_BYTES = 36
"""What a folder's path may have: Ray adds up to 67 bytes, and a socket's path has 103 on macOS."""

_FAMILIES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, AssayError)
}


def run_workers(
    entry: str,
    payload: str,
    *,
    workers: int,
    folder: Path,
    address: str = "",
    use_gpu: bool = False,
    cpus: int = 1,
    max_failures: int = 3,
    on_report: Callable[[dict[str, Any]], None] = lambda report: None,
) -> int:
    """Run a function in ``workers`` processes that share a torch process group.

    Each worker calls ``entry(payload, report)``; ``report`` takes a dictionary of plain values. A
    group that loses a worker is ended and started again as a whole, so ``entry`` must find its own
    checkpoint. An :class:`~components.errors.AssayError` of any worker ends the job at once, but
    an InfrastructureError is tried again like a lost worker.

    Args:
        entry: ``package.module:function``, importable wherever workers run.
        payload: JSON; what the function needs to know, without secrets.
        workers: Size of the group.
        folder: Of this job alone, for Ray's logs and, on this machine, all else that Ray writes.
        address: A Ray cluster, as ``ray://host:port``, ``host:port`` or ``auto``; empty starts one
            on this machine, on loopback, for this call.
        use_gpu: One GPU for each worker, and NCCL beside gloo.
        cpus: CPUs that each worker occupies.
        max_failures: How often the group may be started again.
        on_report: Called in this thread with every report, in order. After a restart the worker
            repeats what lies behind its checkpoint.

    Returns:
        How often the group was started; 1 when nothing was lost.

    Raises:
        ConfigError: Ray is not installed.
        InfrastructureError: The cluster cannot be reached or has no room, or workers were lost
            more often than ``max_failures``.
        AssayError: Of the same type and with the same message as in the worker.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            f"training in {workers} workers needs Ray, which is not installed. Install assay[ray], "
            "or set workers=1."
        )
    _probe(address)
    log = folder / "driver.log"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "ray", ignore_errors=True)
        (folder / "ray").mkdir()
    with _short_path(folder / "ray") as short:
        job = {
            "entry": entry,
            "payload": payload,
            "workers": workers,
            "address": address,
            "use_gpu": use_gpu,
            "cpus": cpus,
            "max_failures": max_failures,
            "folder": str(short),
        }
        with _child(job, _environment(address, folder / "ray"), log) as child:
            starts = _follow(child, log, on_report)
    shutil.rmtree(folder / "ray", ignore_errors=True)
    return starts


def _follow(
    child: "subprocess.Popen[str]", log: Path, on_report: Callable[[dict[str, Any]], None]
) -> int:
    starts, rejection = 0, None
    for message in _messages(child, log):
        match message["kind"]:
            case "report":
                on_report(message["value"])
            case "started":
                starts += 1
            case "error":
                rejection = decode_error(message["value"])
            case "ended":
                if not message["failure"]:
                    return starts
                raise rejection or InfrastructureError(
                    f"{message['failure']} The logs are in {log.parent}."
                )
    child.wait(_STOP_S)
    raise InfrastructureError(
        f"Ray's driver must tell how the job ended; it stopped with {child.returncode}. Its log, "
        f"{log}, ends with: {_last_line(log)}. Run the same command again; training goes on from "
        "its last checkpoint."
    )


def _messages(child: "subprocess.Popen[str]", log: Path) -> Iterator[dict[str, Any]]:
    """What the child says until it ends; its first words must come within a bounded time."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    assert child.stdout is not None, "it was opened as a pipe"
    threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
    try:
        line = lines.get(timeout=_START_S)
    except queue.Empty:
        raise InfrastructureError(
            f"Ray must be ready within {_START_S:.0f} s; it was not. Its log, {log}, ends with: "
            f"{_last_line(log)}. Look whether ASSAY_RAY_ADDRESS names a cluster that runs."
        ) from None
    while line:
        yield json.loads(line)
        line = lines.get()


def _pump(stream: IO[str], lines: "queue.SimpleQueue[str]") -> None:
    with contextlib.suppress(ValueError):  # the stream was closed under the reader
        for line in stream:
            lines.put(line)
    lines.put("")


@contextlib.contextmanager
def _child(
    job: dict[str, Any], environment: dict[str, str], log: Path
) -> Iterator["subprocess.Popen[str]"]:
    """The driver's process; on leaving, it and whatever it started are gone."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", DRIVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None, "they were opened as pipes"
    try:
        with contextlib.suppress(BrokenPipeError):  # it died, and its log says why
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def _environment(address: str, folder: Path) -> dict[str, str]:
    """Variables of the driver, which a cluster on this machine inherits.

    Such a cluster keeps to loopback, to ``folder`` and to a token of its own: Ray would otherwise
    listen on every interface, and write a token to the user's home.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if not address:
        environment.pop("RAY_ADDRESS", None)
        environment.pop("RAY_AUTH_TOKEN_PATH", None)
        environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: no cluster, so loopback
            "RAY_TMPDIR": str(folder),
            "GLOO_SOCKET_IFNAME": _LOOPBACK,
            "NCCL_SOCKET_IFNAME": _LOOPBACK,
            "TMPDIR": str(folder),
        }
    return environment


def _probe(address: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        ConfigError: The address has no port.
        InfrastructureError: Nothing listens there.
    """
    if address in ("", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(
            "ASSAY_RAY_ADDRESS must be ray://HOST:PORT, HOST:PORT, auto, or empty for workers on "
            f"this machine; got {address!r}."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
    except (OSError, OverflowError) as error:
        raise InfrastructureError(
            f"a Ray cluster must answer at ASSAY_RAY_ADDRESS; {address} did not within "
            f"{_PROBE_S:.0f} s: {error}. Start the cluster, mend the address, or unset it to "
            "start workers on this machine."
        ) from error


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[Path]:
    """The folder under a path that is short enough for the sockets in it."""
    if len(os.fsencode(folder)) <= _SOCKET_PATH_BYTES:
        yield folder
        return
    # TMPDIR may be long itself.
    with tempfile.TemporaryDirectory(prefix="assay-ray-", dir="/tmp") as short:
        link = Path(short) / "r"
        link.symlink_to(folder)
        try:
            yield link
        finally:
            link.unlink()


def _last_line(log: Path) -> str:
    deadline = time.monotonic() + 1  # what a child wrote last may come after its end
    while not (text := log.read_text(errors="replace").strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return text.splitlines()[-1][:300] if text else "nothing"


def encode_error(error: AssayError) -> dict[str, Any]:
    """One of assay's errors as plain values."""
    family = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _FAMILIES)
    if isinstance(error, GateError):
        return {
            "family": family,
            "stage": error.stage,
            "failures": list(error.failures),
            "culprit": error.culprit,
            "metrics": error.metrics,
        }
    return {"family": family, "message": str(error)}


def decode_error(values: dict[str, Any]) -> AssayError:
    """The error that :func:`encode_error` was given."""
    if values["family"] == GateError.__name__:
        return GateError(
            values["stage"],
            values["failures"],
            culprit=values["culprit"],
            metrics=values["metrics"],
        )
    return _FAMILIES[values["family"]](values["message"])
