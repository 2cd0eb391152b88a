"""Runs the smoke test of a registered model in a child process, and reads its answer.

A model is loaded only in a process that may crash: one without torch, without this process's
environment, and with limits on memory and time. However that process ends, it is either an answer
or a rejection; only what is not the model's doing is an :class:`InfrastructureError`.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from components.errors import ConfigError, GateError, InfrastructureError
from components.smoke_test.child import OUT_OF_MEMORY, Job

STAGE = "smoke_test"
GIB = 1 << 30

_CHILD = Path(__file__).with_name("child.py")
_WARM_UPS = 20
_LATENCY_RUNS = 200

_OUTPUT_BYTES = 1 << 18
_STDERR_CHARACTERS = 2000
_CPU_GRACE_S = 5
_KILL_GRACE_S = 5

# Where shared libraries and devices are found; everything else, secrets above all, stays behind.
_PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "SYSTEMROOT")

_SIGNAL_HINTS = {
    "SIGKILL": "which is how the kernel ends a process when memory runs out",
    "SIGSEGV": "an invalid memory access in native code",
    "SIGABRT": "native code gave up",
    "SIGXCPU": "the limit on CPU seconds was used up",
}


class Measurements(BaseModel):
    """What the child found; milliseconds, single-row calls, one thread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    golden_rows: int
    max_difference: float
    batch_sizes: tuple[int, ...]
    p50_ms: float
    p99_ms: float
    load_ms: float
    first_run_ms: float
    providers: tuple[str, ...]
    onnxruntime_version: str
    limits: dict[str, int]


class SmokeReport(Measurements):
    """The evidence of a passed smoke test; ``seconds`` includes starting the child."""

    seconds: float


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    broken: str | None
    failures: tuple[str, ...]
    report: Measurements | None


class _Ended(NamedTuple):
    """How the child ended; ``returncode`` is None when it ran out of time."""

    returncode: int | None
    stdout: bytes
    stderr: str


def run_smoke_test(
    model: Path,
    *,
    sha256: str,
    golden: Path,
    timeout_s: float = 60,
    memory_bytes: int = 4 * GIB,
    required_provider: str = "CPUExecutionProvider",
    batch_sizes: Sequence[int] = (1, 2, 7, 1024),
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> SmokeReport:
    """Prove in a clean process that the registered bytes load, answer and are fast.

    Args:
        model: The ONNX file as downloaded from the registry.
        sha256: Hex digest that its bytes must have.
        golden: ``.npz`` with ``input/<name>`` and ``output/<name>``, N rows each, not all equal.
        timeout_s: Seconds after which the child is killed.
        memory_bytes: Limit on the child's address space; about three times the model's size is
            needed, as it is read, parsed and laid out.
        required_provider: The execution provider that must be the session's first.
        batch_sizes: Each must give the golden rows again, tiled to fill the last batch.
        rtol: Allowed difference of a float output, as a fraction of the recorded value.
        atol: Allowed difference beside that; wide layers with large outputs may need more.

    Raises:
        GateError: A check failed, or the child crashed, ran too long or answered nonsense.
        ConfigError: A limit, a batch size or a tolerance is out of range.
        InfrastructureError: A file or onnxruntime is missing, or the child cannot start.
    """
    _check_arguments(timeout_s, memory_bytes, batch_sizes, {"rtol": rtol, "atol": atol})
    for role, path in (("model", model), ("golden file", golden)):
        if not path.is_file():
            raise InfrastructureError(
                f"the {role} must be a local file before the smoke test; {path} is none. "
                "Download it from the pipeline run's artifacts again."
            )
    job = Job(
        model=str(model.resolve()),
        sha256=sha256.lower(),
        golden=str(golden.resolve()),
        batch_sizes=list(batch_sizes),
        warm_ups=_WARM_UPS,
        latency_runs=_LATENCY_RUNS,
        rtol=rtol,
        atol=atol,
        threads=1,
        provider=required_provider,
        memory_bytes=memory_bytes,
        # The clock ends a run first; CPU seconds end a child whose parent has died.
        cpu_seconds=math.ceil(timeout_s) + _CPU_GRACE_S,
    )
    started = time.perf_counter()
    measurements = _read(_run_child(job, timeout_s), timeout_s, memory_bytes)
    seconds = time.perf_counter() - started
    return SmokeReport(**measurements.model_dump(), seconds=seconds)


def _check_arguments(
    timeout_s: float,
    memory_bytes: int,
    batch_sizes: Sequence[int],
    tolerances: Mapping[str, float],
) -> None:
    faults = [
        f"{name} must be finite and not negative, got {value}"
        for name, value in tolerances.items()
        if not 0 <= value < math.inf
    ]
    if not 0 < timeout_s < math.inf:
        faults.append(f"timeout_s must be positive and finite, got {timeout_s}")
    if memory_bytes <= 0:
        faults.append(f"memory_bytes must be positive, got {memory_bytes}")
    if not batch_sizes or min(batch_sizes) < 1:
        faults.append(f"batch_sizes must hold sizes of at least 1, got {list(batch_sizes)}")
    if faults:
        raise ConfigError("smoke_test: " + "; ".join(faults) + ".")


def _package_folders() -> list[str]:
    """Find the folders of the two packages that the child may import, without importing them."""
    folders = []
    for package in ("numpy", "onnxruntime"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise InfrastructureError(
                f"the smoke test needs {package}, which is not installed beside {sys.executable}. "
                "Install exactly one of onnxruntime and onnxruntime-gpu, and numpy."
            )
        folders.append(str(Path(spec.origin).absolute().parent.parent))
    return list(dict.fromkeys(folders))


def _environment() -> dict[str, str]:
    # One thread each, or every pool would reserve address space for every core.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return (
        threads
        | {"ORT_DISABLE_TELEMETRY": "1"}
        | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    )


def _run_child(job: Job, timeout_s: float) -> _Ended:
    command = [sys.executable, "-I", "-S", str(_CHILD), *_package_folders()]
    try:
        # An empty working folder leaves a model's external data nothing to name.
        with tempfile.TemporaryDirectory(prefix="assay-smoke-") as folder:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            return _converse(process, json.dumps(job).encode(), timeout_s)
    except OSError as error:
        raise InfrastructureError(
            f"the smoke test's child process must start; got {error}. Check that "
            f"{sys.executable} runs and that the temporary folder is writable."
        ) from error


def _converse(process: subprocess.Popen[bytes], payload: bytes, timeout_s: float) -> _Ended:
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
    return _Ended(returncode, bytes(stdout.kept), _printable(bytes(stderr.kept)))


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


def _read(ended: _Ended, timeout_s: float, memory_bytes: int) -> Measurements:
    """Turn the end of the child into measurements, or into the reason why there are none."""
    if ended.returncode is None:
        _reject(ended, [f"the child must answer within {timeout_s:g} s; it was killed"])
    if ended.returncode != 0:
        _reject(ended, _end_reasons(ended, memory_bytes))
    try:
        answer = _Answer.model_validate_json(ended.stdout)
    except ValidationError as error:
        _reject(ended, [f"the child must answer in JSON as agreed; {error.error_count()} faults"])
    if answer.broken is not None:
        raise InfrastructureError(
            f"numpy and onnxruntime must load in the child; got {answer.broken}. Reinstall "
            f"onnxruntime, or raise the memory limit of {memory_bytes} bytes."
        )
    if answer.failures:
        _reject(ended, answer.failures)
    if answer.report is None:
        _reject(ended, ["the child must report measurements when nothing failed; it gave none"])
    return answer.report


def _end_reasons(ended: _Ended, memory_bytes: int) -> list[str]:
    assert ended.returncode is not None
    reasons = [f"the child must exit with 0; it exited with {ended.returncode}"]
    if ended.returncode < 0:
        number = -ended.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        hint = _SIGNAL_HINTS.get(name, "no usual cause is known")
        reasons = [f"the child must live to answer; it died by {name}, {hint}"]
    if any(sign in ended.stderr for sign in OUT_OF_MEMORY):
        reasons.append(f"it ran out of memory; its limit was {memory_bytes} bytes")
    return reasons


def _reject(ended: _Ended, reasons: Sequence[str]) -> NoReturn:
    tail = [f"the child's last words: {ended.stderr}"] if ended.stderr else []
    raise GateError(STAGE, [*reasons, *tail])
