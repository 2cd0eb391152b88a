"""Proof of a registered version, as a consumer would meet it: its files, then its answers."""

from pathlib import Path
from typing import NamedTuple

from components.adapters.mlflow_model import answer_as_function
from components.adapters.mlflow_registry import Registry, Version
from components.adapters.mlflow_tracking import Tracking
from components.errors import ConfigError, GateError
from components.export.golden import read_golden
from components.pipeline import load_pipeline
from components.records import ExportedModel
from components.register.verify import verify_files
from components.settings import Settings
from components.smoke_test.engines.compare import compare_arrays
from components.smoke_test.engines.installed import parse_engines
from components.smoke_test.engines.run import EngineResult, run_engines
from components.smoke_test.runner import STAGE, SmokeReport, run_smoke_test

# The golden answers are PyTorch's in float32; parity has bounded the error of both engines already.
RTOL, ATOL = 1e-4, 1e-5

_GOLDEN = "golden.npz"


class Proof(NamedTuple):
    """What a version was found to do, in ONNX Runtime and in the other engines asked for."""

    report: SmokeReport
    engines: dict[str, EngineResult]


def require_intact(settings: Settings, registry: Registry, version: Version, model: Path) -> None:
    """Let a downloaded version through only if it is what was registered, and signed if need be.

    Args:
        settings: Name the key that signatures must fit, if any.
        registry: Of the model.
        version: What the registry says of it.
        model: Its ONNX file, in the folder of its files; nothing is loaded.

    Raises:
        GateError: A file is missing, was changed or added, or the signature is not as it must be.
    """
    sha256 = version.tags.get("onnx_sha256", "")
    name = f"{registry.model} version {version.number}"
    if not sha256:
        raise GateError(
            STAGE,
            [f"{name} must have the tag assay.onnx_sha256, or nothing tells its bytes from others"],
        )
    verify_files(model.parent, settings, onnx_sha256=sha256, **registry.claims(version))


def prove_answers(
    settings: Settings, pipeline: str, model: Path, golden: Path, sha256: str
) -> Proof:
    """Hold an intact version against its golden rows, in every way in which it may be consumed.

    Args:
        settings: Name the engines beside ONNX Runtime.
        pipeline: Gives the budget and the execution provider.
        model: The ONNX file, in the folder of the version's files.
        golden: Rows with their answers.
        sha256: What the file must have.

    Raises:
        GateError: An answer is wrong, the budget exceeded, or a process died.
        ConfigError: An engine is not installed.
    """
    release = load_pipeline(pipeline).release
    report = run_smoke_test(
        model,
        sha256=sha256,
        golden=golden,
        memory_bytes=release.budget.memory_bytes,
        required_provider=release.provider,
        rtol=RTOL,
        atol=ATOL,
        p99_ms=release.budget.p99_ms,
        rows_per_s=release.budget.rows_per_s,
    )
    inputs, outputs = read_golden(golden)
    found = compare_arrays(answer_as_function(model.parent, inputs), outputs, rtol=RTOL, atol=ATOL)
    if found.failures:
        raise GateError(STAGE, [f"as MLflow's Python function: {text}" for text in found.failures])
    modules = settings.node_modules
    engines = run_engines(
        parse_engines(settings.smoke_engines),
        model.parent,
        node_modules=Path(modules) if modules else None,
        rtol=RTOL,
        atol=ATOL,
    )
    return Proof(report, engines)


def prove(
    settings: Settings, tracking: Tracking, registry: Registry, version: Version, folder: Path
) -> SmokeReport:
    """Download a version as a consumer would, and prove the bytes that came.

    Nothing is changed, whatever is found.

    Args:
        settings: Of the installation.
        tracking: The store.
        registry: Of the model.
        version: Its tags say which bytes it must have.
        folder: Takes the files; the caller removes it.

    Raises:
        GateError: A file is missing or was changed, or the answers are wrong.
        InfrastructureError: MLflow or a disk failed.
    """
    name = f"{registry.model} version {version.number}"
    model = registry.fetch(version.number, folder)
    try:
        require_intact(settings, registry, version, model)
        golden = _golden(tracking, version, model.parent, name)
        sha256 = version.tags["onnx_sha256"]
        return prove_answers(settings, registry.model, model, golden, sha256).report
    except GateError as error:  # no candidate of a run is rejected here
        raise GateError("proof", error.failures) from error


def _golden(tracking: Tracking, version: Version, folder: Path, name: str) -> Path:
    """The golden rows of the version's folder; an older version's are in its MLflow run."""
    path = folder / _GOLDEN
    if path.is_file():
        return path
    try:
        record = ExportedModel.model_validate_json(tracking.read_record(version.run_id, "export"))
    except (ConfigError, ValueError) as error:
        where = f"in its folder or in MLflow run {version.run_id}"
        raise GateError(STAGE, [f"{name} must have golden rows, {where}: {error}"]) from error
    return tracking.fetch(record.golden, folder)
