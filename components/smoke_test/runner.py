"""Runs the smoke test of a registered model in a child process, and reads its answer.

A model is loaded only in a process that may crash: one without torch, without this process's
environment, and with limits on memory and time. However that process ends, it is either an answer
or a rejection; only what is not the model's doing is an :class:`InfrastructureError`.
"""

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from components.errors import ConfigError, GateError, InfrastructureError
from components.smoke_test.judge.job import ANNOUNCEMENT, OUT_OF_MEMORY, Job
from components.smoke_test.process import Ended, run_child

STAGE = "smoke_test"
GIB = 1 << 30

_CHILD = Path(__file__).with_name("child.py")
_CALLS = 1000
_ROUNDS_PER_TIMEOUT = 10
_CPU_GRACE_S = 5

_ANNOUNCED = re.compile(ANNOUNCEMENT.format("([a-z0-9 ]+)"))

# Where shared libraries and devices are found; everything else, secrets above all, stays behind.
_PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "SYSTEMROOT")

_SIGNAL_HINTS = {
    "SIGKILL": "which is how the kernel ends a process when memory runs out",
    "SIGSEGV": "an invalid memory access in native code",
    "SIGABRT": "native code gave up",
    "SIGXCPU": "the limit on CPU seconds was used up",
}


class Measurements(BaseModel):
    """What the child found; milliseconds are of single-row calls with one thread.

    ``growth_bytes`` is what resident memory gained over ``calls`` of them. ``rows_per_s`` counts
    rows in batches of 1024, and ``parts_ms`` says what each check took. ``limits`` are those that
    the platform accepted; its ``network`` is ``namespace`` where the kernel took the network away,
    ``audit`` where only Python's sockets are refused. ``not_tried`` says why a check was left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    golden_rows: int
    max_difference: float
    batch_sizes: tuple[int, ...]
    calls: int
    growth_bytes: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    rows_per_s: float
    load_ms: float
    first_run_ms: float
    providers: tuple[str, ...]
    onnxruntime_version: str
    limits: dict[str, int | str]
    parts_ms: dict[str, float]
    not_tried: dict[str, str]


class SmokeReport(Measurements):
    """The evidence of a passed smoke test; ``seconds`` includes starting the child."""

    seconds: float


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    broken: str | None
    failures: tuple[str, ...]
    report: Measurements | None


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
    p99_ms: float = math.inf,
    rows_per_s: float = 0.0,
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
        p99_ms: Milliseconds that 99 of 100 calls with one row must stay below.
        rows_per_s: Rows that must be answered in a second, in batches of 1024.

    Raises:
        GateError: A check failed, or the child crashed, ran too long or answered nonsense.
        ConfigError: A limit, a batch size, a tolerance or the budget is out of range.
        InfrastructureError: A file or onnxruntime is missing, or the child cannot start.
    """
    bounds = {"rtol": rtol, "atol": atol, "rows_per_s": rows_per_s}
    _check_arguments(timeout_s, memory_bytes, batch_sizes, bounds, p99_ms)
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
        rtol=rtol,
        atol=atol,
        threads=1,
        provider=required_provider,
        memory_bytes=memory_bytes,
        # The clock ends a run first; CPU seconds end a child whose parent has died.
        cpu_seconds=math.ceil(timeout_s) + _CPU_GRACE_S,
        p99_ms=p99_ms,
        rows_per_s=rows_per_s,
        calls=_CALLS,
        round_seconds=timeout_s / _ROUNDS_PER_TIMEOUT,
    )
    command = [sys.executable, "-I", "-S", str(_CHILD), *_package_folders()]
    started = time.perf_counter()
    ended = run_child(command, _environment(), json.dumps(job).encode(), timeout_s)
    measurements = _read(ended, timeout_s, memory_bytes)
    seconds = time.perf_counter() - started
    return SmokeReport(**measurements.model_dump(), seconds=seconds)


def _check_arguments(
    timeout_s: float,
    memory_bytes: int,
    batch_sizes: Sequence[int],
    bounds: Mapping[str, float],
    p99_ms: float,
) -> None:
    faults = [
        f"{name} must be finite and not negative, got {value}"
        for name, value in bounds.items()
        if not 0 <= value < math.inf
    ]
    if not 0 < timeout_s < math.inf:
        faults.append(f"timeout_s must be positive and finite, got {timeout_s}")
    if not p99_ms > 0:
        faults.append(f"p99_ms must be positive, got {p99_ms}")
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
        # Few arenas, or every thread of the concurrency check would reserve 64 MiB of its own.
        | {"ORT_DISABLE_TELEMETRY": "1", "MALLOC_ARENA_MAX": "2"}
        | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    )


def _read(ended: Ended, timeout_s: float, memory_bytes: int) -> Measurements:
    """Turn the end of the child into measurements, or into the reason why there are none."""
    if ended.returncode is None:
        _reject(
            ended, [f"the child must answer within {timeout_s:g} s; it was killed{_when(ended)}"]
        )
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


def _end_reasons(ended: Ended, memory_bytes: int) -> list[str]:
    assert ended.returncode is not None
    reasons = [f"the child must exit with 0; it exited with {ended.returncode}"]
    if ended.returncode < 0:
        number = -ended.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        hint = _SIGNAL_HINTS.get(name, "no usual cause is known")
        reasons = [f"the child must live to answer; it died by {name}, {hint}{_when(ended)}"]
    if any(sign in ended.stderr for sign in OUT_OF_MEMORY):
        reasons.append(f"it ran out of memory; its limit was {memory_bytes} bytes")
    return reasons


def _when(ended: Ended) -> str:
    """Say which step the child announced last."""
    steps = _ANNOUNCED.findall(ended.stderr)
    return f", in the step {steps[-1]!r}" if steps else ""


def _reject(ended: Ended, reasons: Sequence[str]) -> NoReturn:
    words = " ".join(_ANNOUNCED.sub("", ended.stderr).split())
    tail = [f"the child's last words: {words}"] if words else []
    raise GateError(STAGE, [*reasons, *tail])
