"""The child of the smoke test: judges one ONNX model with numpy and onnxruntime alone.

Run as ``python -I -S child.py <folder> ...``, where the folders hold numpy and onnxruntime. A
:class:`Job` is read as JSON from stdin, and one :class:`Answer` is written as JSON to stdout. It is
stand-alone: nothing of assay is importable here, and that is part of the proof.

Legend: N = golden rows, B = rows of one batch.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Named = dict[str, npt.NDArray[np.generic]]

Result = TypeVar("Result")

ALLOWED = frozenset({"numpy", "onnxruntime"})
"""Importable beyond the standard library; onnxruntime itself needs only numpy to load."""

SESSION_CONFIG = {
    "session.intra_op.allow_spinning": "0",
    "session.inter_op.allow_spinning": "0",
    # Without this, bytes in onnxruntime's own format would be accepted under an ONNX name.
    "session.load_model_format": "ONNX",
}

OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "Failed to allocate memory", "Cannot allocate memory")


class Job(TypedDict):
    """What to test, and how."""

    model: str
    sha256: str
    golden: str
    batch_sizes: list[int]
    warm_ups: int
    latency_runs: int
    rtol: float
    atol: float
    threads: int
    provider: str
    memory_bytes: int
    cpu_seconds: int


class Answer(TypedDict):
    """``broken``: the engine cannot load. ``failures``: why not. ``report``: the measurements."""

    broken: str | None
    failures: list[str]
    report: dict[str, Any] | None


class ImportGuard(MetaPathFinder):
    """Refuses every package but those of the standard library and :data:`ALLOWED`."""

    def find_spec(self, fullname: str, _path: object = None, _target: object = None) -> None:
        """Leave an allowed name to the next finder.

        Raises:
            ModuleNotFoundError: The package is not allowed.
        """
        package = fullname.partition(".")[0]
        if package not in ALLOWED and package not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"the smoke test forbids {fullname!r}", name=fullname)


def main(folders: Sequence[str]) -> None:
    """Read the job from stdin, judge, and write the answer to stdout."""
    sys.meta_path.insert(0, ImportGuard())
    sys.path.extend(folders)
    # Native code may print, so stdout is kept for the answer and everything else goes to stderr.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job: Job = json.loads(sys.stdin.buffer.read())
    with answer:
        json.dump(judge(job), answer, allow_nan=False)


def judge(job: Job) -> Answer:
    """Limit this process, then run every check and collect all failures."""
    limits = apply_limits(job)
    try:
        importlib.import_module("numpy")
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        return {"broken": describe(error), "failures": [], "report": None}
    failures = check_isolation()
    measured = check_model(ort, job, failures)
    report = {"onnxruntime_version": ort.__version__, "limits": limits, **measured}
    return {"broken": None, "failures": failures, "report": None if failures else report}


def check_model(ort: ModuleType, job: Job, failures: list[str]) -> dict[str, Any]:
    """Check bytes, session and answers in that order; measurements come back if all is well."""
    golden = attempt("golden file", failures, lambda: Golden(Path(job["golden"])))
    model = Path(job["model"]).read_bytes()
    if (sha256 := hashlib.sha256(model).hexdigest()) != job["sha256"]:
        # Bytes that nobody vouches for are never parsed, so the model's checks end here.
        failures.append(f"the model's sha256 must be {job['sha256']}; got {sha256}. Fetch it again")
        return {}
    started = time.perf_counter()
    session = attempt("loading the model", failures, lambda: open_session(ort, model, job))
    load_ms = (time.perf_counter() - started) * 1e3
    if session is None:
        return {}
    failures += check_provider(session, job["provider"])
    if golden is None:
        return {}
    return {"load_ms": load_ms, **Examination(session, golden, job, failures).report()}


def apply_limits(job: Job) -> dict[str, int]:
    """Lower this process's own limits, and say which ones the platform accepted."""
    if sys.platform == "win32":  # the parent's timeout still holds there
        return {}
    import resource

    # CUDA reserves far more address space than it uses; there, only data pages are counted.
    memory = "RLIMIT_AS" if job["provider"] == "CPUExecutionProvider" else "RLIMIT_DATA"
    wanted = {"RLIMIT_CORE": 0, memory: job["memory_bytes"], "RLIMIT_CPU": job["cpu_seconds"]}
    applied = {}
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


def check_isolation() -> list[str]:
    """Prove that the framework which trained the model cannot be reached."""
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError:
        return []
    return ["torch must not be importable in the smoke test; it was imported. Check the guard"]


def check_provider(session: Any, required: str) -> list[str]:
    """Compare the provider that onnxruntime chose, since it falls back without an error."""
    chosen = session.get_providers()
    if chosen[0] == required:
        return []
    return [
        f"the session must run on {required}; onnxruntime chose {', '.join(chosen)}. Run where "
        "the provider and its libraries are installed, or require CPUExecutionProvider"
    ]


def open_session(ort: Any, model: bytes, job: Job) -> Any:
    """Load the very bytes that were hashed, so that the file cannot be swapped in between."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    # One that this build lacks is left to check_provider, so that the other checks still run.
    built_in = job["provider"] in ort.get_available_providers()
    provider: Any = job["provider"] if built_in else "CPUExecutionProvider"
    if provider == "CUDAExecutionProvider":
        # torch is not there to load the CUDA libraries, and TF32 is off by 1e-3.
        ort.preload_dlls()
        provider = (provider, {"use_tf32": "0"})
    return ort.InferenceSession(model, options, providers=[provider], enable_fallback=False)


def attempt(what: str, failures: list[str], step: Callable[[], Result]) -> Result | None:
    """Take a step; an exception becomes a failure, so that the checks after it still run."""
    try:
        return step()
    except Exception as error:  # whatever a hostile model provokes is a reason to reject it
        failures.append(f"{what}: {describe(error)}")
        return None


def describe(error: Exception) -> str:
    """One bounded line about an exception; exhausted memory is named as such."""
    line = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return f"out of memory: {line}" if any(sign in line for sign in OUT_OF_MEMORY) else line


class Golden:
    """Recorded inputs and outputs, N rows each.

    Raises:
        ValueError: The file is not usable as a reference.
    """

    def __init__(self, path: Path) -> None:
        import numpy as np

        self.inputs: Named = {}
        self.outputs: Named = {}
        groups = {"input": self.inputs, "output": self.outputs}
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                group, _, name = key.partition("/")
                if group not in groups or not name:
                    raise ValueError(f"keys must be input/<name> or output/<name>; got {key!r}")
                groups[group][name] = archive[key]
        if not self.inputs or not self.outputs:
            raise ValueError("at least one input/<name> and one output/<name> are needed")
        arrays = [*self.inputs.values(), *self.outputs.values()]
        counts = {array.shape[0] if array.ndim else 0 for array in arrays}
        if len(counts) != 1:
            raise ValueError(f"inputs and outputs must share N rows; got {sorted(counts)}")
        self.rows = counts.pop()
        # Equal rows would hide an output that depends on the other rows of its batch.
        if not any((array != array[:1]).any() for array in self.inputs.values()):
            raise ValueError(f"at least two different rows are needed; got {self.rows} equal ones")
        for name, array in self.outputs.items():
            if bad := count_bad(array):
                raise ValueError(f"recorded output {name!r} holds {bad} NaN or infinite values")


def count_bad(array: npt.NDArray[np.generic]) -> int:
    """Count NaN and infinite values; integers have none."""
    import numpy as np

    return int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else 0


class Examination:
    """One session against the golden rows; ``largest`` is the largest difference seen."""

    def __init__(self, session: Any, golden: Golden, job: Job, failures: list[str]) -> None:
        self.session = session
        self.golden = golden
        self.job = job
        self.failures = failures
        self.largest = 0.0

    def report(self) -> dict[str, Any]:
        """Check signature, values and batch sizes in that order, then measure."""
        import numpy as np

        if faults := self.signature_faults():
            self.failures += faults
            return {}
        sizes = self.job["batch_sizes"]
        started = time.perf_counter()
        attempt("the first run", self.failures, lambda: self.run(np.arange(1)))
        first_run_ms = (time.perf_counter() - started) * 1e3
        for label, size in [("golden rows", self.golden.rows), *((f"batch {b}", b) for b in sizes)]:
            faults = attempt(label, self.failures, partial(self.batch_faults, size)) or []
            self.failures += [f"{label}: {fault}" for fault in faults]
        if self.failures:
            return {}
        p50_ms, p99_ms = self.latency()
        return {
            "golden_rows": self.golden.rows,
            "max_difference": self.largest,
            "batch_sizes": sizes,
            "p50_ms": p50_ms,
            "p99_ms": p99_ms,
            "first_run_ms": first_run_ms,
            "providers": self.session.get_providers(),
        }

    def signature_faults(self) -> list[str]:
        """Compare names and element types of inputs and outputs with the golden file's."""
        pairs = (
            ("inputs", self.golden.inputs, self.session.get_inputs()),
            ("outputs", self.golden.outputs, self.session.get_outputs()),
        )
        faults = []
        for side, recorded, nodes in pairs:
            want = {name: onnx_type(array.dtype.name) for name, array in sorted(recorded.items())}
            got = {node.name: node.type for node in sorted(nodes, key=lambda node: str(node.name))}
            if got != want:
                faults.append(f"{side} must be {want} as in the golden file; the model has {got}")
        return faults

    def run(self, rows_B: npt.NDArray[np.intp]) -> Named:
        """Answer golden rows by index."""
        names = list(self.golden.outputs)
        feed = {name: array[rows_B] for name, array in self.golden.inputs.items()}
        return dict(zip(names, self.session.run(names, feed), strict=True))

    def batch_faults(self, size: int) -> list[str]:
        """Answer every golden row in batches of one size, tiling the rows to fill the last."""
        import numpy as np

        tiled = np.arange(-(-self.golden.rows // size) * size) % self.golden.rows
        for rows_B in tiled.reshape(-1, size):
            answers = self.run(rows_B)
            faults = [self.fault(name, got, rows_B) for name, got in answers.items()]
            if any(faults):
                return [fault for fault in faults if fault]  # one bad batch says enough
        return []

    def fault(
        self, name: str, got: npt.NDArray[np.generic], rows_B: npt.NDArray[np.intp]
    ) -> str | None:
        """Compare one output of one batch: shape and dtype, finiteness, values."""
        import numpy as np

        want = self.golden.outputs[name][rows_B]
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            return f"{name!r} must be {want.shape} {want.dtype}; got {got.shape} {got.dtype}"
        if bad := count_bad(got):
            return f"{name!r} must be finite; got {bad} NaN or infinite values"
        if want.dtype.kind != "f":
            wrong = int((got != want).sum())
            return f"{name!r} must equal the recorded values; {wrong} differ" if wrong else None
        want_64 = want.astype(np.float64)
        difference = np.abs(got.astype(np.float64) - want_64)
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        excess = difference - self.job["atol"] - self.job["rtol"] * np.abs(want_64)
        if excess.max(initial=0.0) <= 0:
            return None
        row = rows_B[np.unravel_index(excess.argmax(), excess.shape)[0]]
        return (
            f"{name!r} must equal the recorded values within rtol {self.job['rtol']:g} and atol "
            f"{self.job['atol']:g}; row {row} differs by {difference.flat[excess.argmax()]:.3g}"
        )

    def latency(self) -> tuple[float, float]:
        """Milliseconds of a single-row call: median and 99th percentile."""
        import numpy as np

        names = list(self.golden.outputs)
        feed = {name: array[:1] for name, array in self.golden.inputs.items()}
        laps = []
        for _ in range(self.job["warm_ups"] + self.job["latency_runs"]):
            started = time.perf_counter_ns()
            self.session.run(names, feed)
            laps.append((time.perf_counter_ns() - started) / 1e6)
        p50_ms, p99_ms = np.percentile(laps[self.job["warm_ups"] :], [50, 99])
        return float(p50_ms), float(p99_ms)


def onnx_type(dtype: str) -> str:
    """Spell numpy's dtype name as onnxruntime spells element types."""
    element = {"float32": "float", "float64": "double"}.get(dtype, dtype)
    return f"tensor({element})"


if __name__ == "__main__":
    main(sys.argv[1:])
