"""A validated model to files: the ONNX graph, its golden rows, and the proof of parity."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from components.contract import Model
from components.data.encoding import Encoding
from components.data.snapshot import Snapshot
from components.export.golden import write_golden
from components.export.onnx_export import export_onnx
from components.export.onnx_file import ENCODING_KEY, METADATA_KEY
from components.export.parity import ParityReport, check_parity, require_parity
from components.export.predictors import TorchPredictor
from components.records import Job
from components.state import write_atomic
from components.train.run import to_tensors

OPSET = 20
EXAMPLE_ROWS = 2
GOLDEN_ROWS = 64
PARITY_ROWS = 1024


@dataclass(frozen=True)
class ExportFiles:
    """What the export stage leaves in a folder."""

    onnx: Path
    golden: Path
    parity: Path


def run_export(
    model: Model, encoding: Encoding, snapshot: Snapshot, job: Job, folder: Path
) -> tuple[ExportFiles, ParityReport]:
    """Export, prove parity with PyTorch, and record golden rows.

    Args:
        model: In eval mode, on CPU.
        encoding: How rows become the model's inputs; travels in the file.
        snapshot: Gives held-out rows, for parity and golden rows.
        job: Gives the digests that travel in the file.
        folder: Where the files go.

    Raises:
        GateError: The graph is not what was asked for, or differs from the model.
    """
    inputs = encoding.encode(snapshot.slice("holdout", 0, PARITY_ROWS))
    example = to_tensors({name: array[:EXAMPLE_ROWS] for name, array in inputs.items()})
    metadata = file_metadata(model, encoding, job)
    onnx_model = export_onnx(model, example, opset=OPSET, metadata=metadata)
    report = check_parity(model, onnx_model, inputs, seed=job.seed)
    files = ExportFiles(folder / "model.onnx", folder / "golden.npz", folder / "parity_report.json")
    write_atomic(files.parity, report.model_dump_json(indent=1).encode())
    require_parity(report)
    write_atomic(files.onnx, onnx_model)
    golden = {name: np.array(array[:GOLDEN_ROWS]) for name, array in inputs.items()}
    write_golden(files.golden, golden, TorchPredictor(model).predict(golden))
    return files, report


def file_metadata(model: Model, encoding: Encoding, job: Job) -> Mapping[str, str]:
    """What the ONNX file says of itself: no paths, no times, so equal weights give equal bytes."""
    return {
        METADATA_KEY: model.get_model_metadata().model_dump_json(),
        ENCODING_KEY: encoding.model_dump_json(),
        "assay.version": version("assay"),
        "assay.pipeline": job.pipeline,
        "assay.data_fingerprint": job.data_fingerprint,
        "assay.config_digest": job.config_digest,
        "assay.code_digest": job.code_digest,
    }
