"""Proof of a version that is to become champion by hand: what the registry gives today."""

from pathlib import Path

from components.adapters.mlflow_registry import Registry, Version
from components.adapters.mlflow_tracking import Tracking
from components.errors import ConfigError, GateError
from components.records import ExportedModel
from components.settings import Settings
from components.smoke_test.runner import SmokeReport, run_smoke_test
from tasks.smoke_test import ATOL, RTOL

GOLDEN_FILE = "golden.npz"
STAGE = "proof"


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
    model = registry.fetch(version.number, folder)
    name = f"{registry.model} version {version.number}"
    sha256 = version.tags.get("onnx_sha256", "")
    if not sha256:
        raise GateError(
            STAGE,
            [f"{name} must have the tag assay.onnx_sha256, or nothing tells its bytes from others"],
        )
    if not model.is_file():
        raise GateError(STAGE, [f"{name} must hold {model.name}; it is gone"])
    # verify_files(model.parent, settings, model=..., run_id=..., onnx_sha256=sha256) stands here
    golden = _golden(tracking, version, model.parent, name)
    return run_smoke_test(model, sha256=sha256, golden=golden, rtol=RTOL, atol=ATOL)


def _golden(tracking: Tracking, version: Version, folder: Path, name: str) -> Path:
    """The golden rows of the version's folder; an older version's are in its MLflow run."""
    path = folder / GOLDEN_FILE
    if path.is_file():
        return path
    try:
        record = ExportedModel.model_validate_json(tracking.read_record(version.run_id, "export"))
    except (ConfigError, ValueError) as error:
        where = f"in its folder or in MLflow run {version.run_id}"
        raise GateError(STAGE, [f"{name} must have golden rows, {where}: {error}"]) from error
    return tracking.fetch(record.golden, folder)
