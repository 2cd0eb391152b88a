"""What the inference benchmark runs: the shipped pipelines, and the ways to run them."""

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from components.contract import Model
from components.export.golden import read_golden
from components.export.onnx_export import export_onnx
from components.export.predictors import open_session
from components.pipeline import load_pipeline
from components.plan import open_data, plan_job
from components.settings import load_settings
from components.state import make_root
from components.train.run import build_model, run_training, to_tensors

Array = npt.NDArray[np.generic]
Call = Callable[[], object]
"""Answers one batch; its inputs are prepared, and outputs come back as an engine gives them."""

EAGER, COMPILED = "torch eager", "torch.compile"
ORT = "onnxruntime"
SPINNING, SLEEPING = "onnxruntime, spinning", "onnxruntime, sleeping"
ROWS = 1024
FEW_EPOCHS = {"flights": 1, "digits": 6}


@dataclass(frozen=True)
class Case:
    """A trained model, its exported network, and real rows for both; ``extra`` are other files.

    ``extra`` maps a name to an ONNX file and the rows that it takes, for example to the graph that
    reads raw columns. They have inputs of their own, so their answers are not compared.
    """

    name: str
    model: Model
    onnx: bytes
    rows: Mapping[str, Array]
    extra: Mapping[str, tuple[bytes, Mapping[str, Array]]] = field(default_factory=dict)

    def batch(self, size: int) -> dict[str, Array]:
        """The first rows."""
        return {name: np.ascontiguousarray(array[:size]) for name, array in self.rows.items()}


def load_case(name: str, home: Path, extra: Mapping[str, tuple[Path, Path]], quick: bool) -> Case:
    """A pipeline's model after a short training, or with fresh weights where that will do.

    Raises:
        DataError: Its rows cannot be had here.
    """
    settings = load_settings(home=home)
    make_root(settings.root)
    pipeline = load_pipeline(name)
    job = plan_job(pipeline, settings)
    snapshot = open_data(pipeline, settings, job)
    config = pipeline.config.model_copy(update={"epochs": FEW_EPOCHS.get(name, 1)})
    if quick:
        from components.data.encoding import fit_encoding

        encoding = fit_encoding(pipeline.features, snapshot.statistics)
        model = build_model(pipeline, encoding, config)
    else:
        trained, encoding = run_training(pipeline, config, snapshot)
        model = build_model(pipeline, encoding, config)
        model.load_state_dict(trained.state)
    model.eval()
    rows = fill(encoding.encode(snapshot.slice("holdout", 0, ROWS)))
    example = to_tensors({key: array[:2] for key, array in rows.items()})
    others = {
        key: (model_file.read_bytes(), fill(read_golden(golden)[0]))
        for key, (model_file, golden) in extra.items()
    }
    return Case(name, model, export_onnx(model, example, metadata={}), rows, others)


def fill(rows: Mapping[str, Array]) -> dict[str, Array]:
    """Rows repeated, or cut, to as many as the largest batch has."""
    return {name: np.resize(array, (ROWS, *array.shape[1:])) for name, array in rows.items()}


def contenders(case: Case, size: int, threads: int, *, compiled: bool) -> dict[str, Call]:
    """Every way to answer a batch, each with so many threads."""
    batch = case.batch(size)
    tensors = [torch.from_numpy(array) for array in batch.values()]
    torch.set_num_threads(threads)
    found: dict[str, Call] = {EAGER: functools.partial(run_torch, case.model.predict, tensors)}
    if compiled:
        torch._dynamo.reset()
        fast = torch.compile(case.model.predict, dynamic=False)
        run_torch(fast, tensors)
        found[COMPILED] = functools.partial(run_torch, fast, tensors)
    found[ORT] = functools.partial(open_session(case.onnx, threads=threads).run, None, batch)
    for name, spins in ((SPINNING, True), (SLEEPING, False)):
        session = other_session(case.onnx, threads, spins=spins)
        found[name] = functools.partial(session.run, None, batch)
    for name, (data, rows) in case.extra.items():
        few = {key: array[:size] for key, array in rows.items()}
        found[name] = functools.partial(open_session(data, threads=threads).run, None, few)
    return found


def run_torch(
    predict: Callable[..., tuple[torch.Tensor, ...]], tensors: list[torch.Tensor]
) -> list[Array]:
    """Outputs as arrays, as onnxruntime gives them."""
    with torch.inference_mode():
        return [output.numpy() for output in predict(*tensors)]


def session_options(threads: int) -> ort.SessionOptions:
    """As onnxruntime chooses them, but for the threads and what is printed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def other_session(data: bytes, threads: int, *, spins: bool) -> ort.InferenceSession:
    """A session whose idle threads always spin, as is onnxruntime's default, or never."""
    options = session_options(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def onnxruntime_shares(case: Case, size: int, calls: int) -> dict[str, float]:
    """Share of a call's kernels by operator, on one thread, by onnxruntime's own profiler."""
    import json

    with tempfile.TemporaryDirectory(prefix="inference-") as folder:
        options = session_options(1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(case.onnx, options, providers=["CPUExecutionProvider"])
        for _ in range(calls):
            session.run(None, case.batch(size))
        events = json.loads(Path(session.end_profiling()).read_bytes())
    seconds: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"].removeprefix("Fused")
            seconds[kind] = seconds.get(kind, 0.0) + event["dur"]
    return _shares(seconds)


def torch_shares(case: Case, size: int, calls: int) -> dict[str, float]:
    """Share of a call by operator, on one thread, by PyTorch's own profiler."""
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    tensors = [torch.from_numpy(array) for array in case.batch(size).values()]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            run_torch(case.model.predict, tensors)
    seconds = {
        event.key.removeprefix("aten::"): float(event.self_cpu_time_total)
        for event in found.key_averages()
    }
    return _shares(seconds)


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {name: value / total for name, value in ordered}
