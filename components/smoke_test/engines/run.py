"""Runs other engines on a version's files, each in a child process, and compares their answers.

A consumer may use any of them, so each must give what the golden file says. An engine that
crashes, hangs or refuses is a rejection; one that is not installed is a wrong setting.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from components.errors import ConfigError, GateError, InfrastructureError
from components.export.golden import read_golden
from components.smoke_test.engines.child import Job
from components.smoke_test.engines.compare import Tensor, compare
from components.smoke_test.engines.installed import chromium, missing, node, parse_engines

STAGE = "smoke_test"
REFERENCE_ROWS = 8
"""The reference evaluator is slow, and made to be right: a few rows show whether it agrees."""

_HERE = Path(__file__).parent
_STDERR_CHARACTERS = 500
_ANSWER_BYTES = 1 << 28
_GRACE_S = 5
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")


class EngineResult(NamedTuple):
    """An engine that gave the golden answers: its versions, how many rows, and how closely."""

    version: str
    rows: int
    max_difference: float


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = ""
    batches: tuple[dict[str, Tensor], ...] = ()
    broken: str | None = None
    failure: str | None = None


def run_engines(
    names: Sequence[str],
    folder: Path,
    *,
    node_modules: Path | None,
    timeout_s: float = 60,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> dict[str, EngineResult]:
    """Prove that every engine gives the golden answers, and say how closely.

    Args:
        names: Some of :data:`~components.smoke_test.engines.installed.NAMES`.
        folder: A version's files: ``model.onnx`` and ``golden.npz``, and for engines without
            strings ``tensor.onnx`` and ``tensor_golden.npz`` where the version has them.
        node_modules: Where npm installed onnxruntime-node and onnxruntime-web.
        timeout_s: Seconds after which an engine's process is killed.
        rtol: Allowed difference of a float output, as a fraction of the golden value.
        atol: Allowed difference beside that.

    Raises:
        ConfigError: An engine is unknown, or not installed.
        GateError: An engine refused the model, crashed, ran too long or answered otherwise; the
            failures of all engines are told.
        InfrastructureError: A child process cannot start, or an engine does not load.
        DataError: The golden file cannot be read.
    """
    parse_engines(",".join(names))
    absent = [f"{name}: {fault}" for name in names for fault in missing(name, node_modules)]
    if absent:
        raise ConfigError(
            f"every engine of ASSAY_SMOKE_ENGINES must be installed; {'; '.join(absent)}. "
            "Or take the engine from the setting."
        )
    results: dict[str, EngineResult] = {}
    failures = []
    for name in names:
        try:
            results[name] = _run(name, folder, node_modules, timeout_s, rtol, atol)
        except GateError as error:
            failures += [f"{name}: {failure}" for failure in error.failures]
    if failures:
        raise GateError(STAGE, failures)
    return results


def _run(
    name: str, folder: Path, node_modules: Path | None, timeout_s: float, rtol: float, atol: float
) -> EngineResult:
    model, golden = files_for(name, folder)
    rows = REFERENCE_ROWS if name == "reference" else None
    with tempfile.TemporaryDirectory(prefix="assay-engine-", ignore_cleanup_errors=True) as scratch:
        job = Job(
            engine=name,
            model=str(model.resolve()),
            golden=str(golden.resolve()),
            answer=str(Path(scratch) / "answer.json"),
            rows=rows,
            chromium=chromium() or "",
            node_modules=str((node_modules or Path()).resolve()),
        )
        answer = _ask(job, Path(scratch), timeout_s)
    outputs = {key: array[:rows] for key, array in read_golden(golden)[1].items()}
    largest, failures = compare(answer.batches, outputs, rtol=rtol, atol=atol)
    if failures:
        raise GateError(STAGE, failures)
    return EngineResult(answer.version, len(next(iter(outputs.values()))), largest)


def files_for(engine: str, folder: Path) -> tuple[Path, Path]:
    """The model and golden file that an engine is to be tried on.

    OpenVINO has no operators for strings, so it gets the network alone where there are both.
    """
    tensor = folder / "tensor.onnx"
    if engine == "openvino" and tensor.is_file():
        return tensor, folder / "tensor_golden.npz"
    return folder / "model.onnx", folder / "golden.npz"


def _ask(job: Job, scratch: Path, timeout_s: float) -> _Answer:
    """Run the child to its end, and read its answer.

    Raises:
        GateError: There is none, or it is a refusal.
        InfrastructureError: The engine does not work here.
    """
    returncode, words = _run_child(job, scratch, timeout_s)
    said = f"; its last words: {words}" if words else ""
    if returncode is None:
        raise GateError(STAGE, [f"it must answer within {timeout_s:g} s; it was killed{said}"])
    if returncode != 0:
        raise GateError(STAGE, [f"it must exit with 0; it exited with {returncode}{said}"])
    path = Path(job["answer"])
    try:
        if path.stat().st_size > _ANSWER_BYTES:
            raise GateError(STAGE, [f"it must answer in at most {_ANSWER_BYTES} bytes"])
        answer = _Answer.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = f"it must answer in JSON as agreed; got {type(error).__name__}{said}"
        raise GateError(STAGE, [reason]) from error
    if answer.broken is not None:
        raise InfrastructureError(
            f"engine {job['engine']} must load before a model is tried; got {answer.broken}. "
            "Reinstall it, or take it from ASSAY_SMOKE_ENGINES."
        )
    if answer.failure is not None:
        raise GateError(STAGE, [f"it refused the model: {answer.failure}"])
    return answer


def _command(job: Job) -> list[str]:
    if job["engine"] == "node":
        script = str(_HERE / "node.mjs")
        paths = [job["node_modules"], job["model"], job["golden"], job["answer"]]
        return [node() or "node", script, *paths]
    return [sys.executable, "-I", str(_HERE / "child.py")]


def _run_child(job: Job, scratch: Path, timeout_s: float) -> tuple[int | None, str]:
    """The child's exit status, None where it ran out of time, and the end of what it wrote."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # Whatever an engine leaves, a browser's profile above all, goes with the folder.
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    with (scratch / "output").open("w+b") as output:
        try:
            process = subprocess.Popen(
                _command(job),
                cwd=scratch,
                env={**kept, **own},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise InfrastructureError(
                f"the process of engine {job['engine']} must start; got {error}. Check that "
                f"{_command(job)[0]} runs."
            ) from error
        try:
            process.communicate(json.dumps(job).encode(), timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            return None, _tail(scratch / "output")
        except BaseException:  # an interruption must not leave a browser behind
            _kill(process)
            raise
    return process.returncode, _tail(scratch / "output")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the child and all that it started; a browser's driver is given time to close it."""
    if sys.platform == "win32":
        process.kill()
        process.wait()
        return
    deadline = time.monotonic() + _GRACE_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # the child itself must be reaped, or its group never ends
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: Path) -> str:
    text = path.read_bytes()[-4 * _STDERR_CHARACTERS :].decode(errors="replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[
        -_STDERR_CHARACTERS:
    ]
