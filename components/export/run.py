"""A validated model to files: the ONNX graphs, their golden rows, and the proof of parity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import TypeAdapter

from components.contract import Arrays, Model
from components.data.encoding import Encoding
from components.data.snapshot import Snapshot
from components.export.config import VariantKind
from components.export.golden import write_golden
from components.export.measures import any_by_row, decide_rows, threshold_of
from components.export.onnx_export import export_onnx
from components.export.onnx_file import ENCODING_KEY, METADATA_KEY
from components.export.parity import ParityReport, check_parity, require_parity
from components.export.predictors import TorchPredictor
from components.export.raw_columns import raw_columns
from components.export.raw_graph import LABEL, label_of, label_source
from components.export.raw_parity import Registered, check_raw_parity
from components.export.variant_report import VariantReport
from components.export.variants import MadeVariant, run_variants
from components.pipeline import Pipeline
from components.records import Job
from components.state import write_atomic
from components.train.run import to_tensors

Places = npt.NDArray[np.int64]

EXAMPLE_ROWS = 2
GOLDEN_ROWS = 64
PARITY_ROWS = 1024

_WITH_HOLES = 16
"""Golden rows that are taken for what is missing in them, where there are any."""
_CLEAR = 1e-3
"""How far a golden row's numbers must be from another class: engines round in their own ways."""


@dataclass(frozen=True)
class ExportFiles:
    """What the export stage leaves in a folder.

    ``onnx`` takes rows as they are, ``tensor`` is the network alone; each has its golden rows.
    ``variants`` are those that kept their bounds, by kind; ``variant_report`` tells of all.
    """

    onnx: Path
    golden: Path
    tensor: Path
    tensor_golden: Path
    parity: Path
    variants: Mapping[VariantKind, Path]
    variant_report: Path


@dataclass(frozen=True)
class Exported:
    """The files of an export, with the proof of parity and what was found of its variants."""

    files: ExportFiles
    parity: ParityReport
    variants: tuple[VariantReport, ...]


def run_export(
    pipeline: Pipeline,
    model: Model,
    encoding: Encoding,
    snapshot: Snapshot,
    job: Job,
    folder: Path,
) -> Exported:
    """Export, prove parity with PyTorch, record golden rows, and make the variants asked for.

    A variant that breaks its bounds is left out, and its report says why.

    Args:
        pipeline: Gives the operator set and the variants.
        model: In eval mode, on CPU.
        encoding: How rows become the model's inputs; travels in the file.
        snapshot: Gives held-out rows, for parity and golden rows.
        job: Gives the digests that travel in the file.
        folder: Where the files go.

    Raises:
        GateError: The graph is not what was asked for, or differs from the model.
    """
    release = pipeline.release
    files = ExportFiles(
        folder / "model.onnx",
        folder / "golden.npz",
        folder / "tensor.onnx",
        folder / "tensor_golden.npz",
        folder / "parity_report.json",
        {variant.kind: folder / f"model.{variant.kind}.onnx" for variant in release.variants},
        folder / "variant_report.json",
    )
    rows = snapshot.slice("holdout", 0, PARITY_ROWS)
    inputs = encoding.encode(rows)
    example = to_tensors({name: array[:EXAMPLE_ROWS] for name, array in inputs.items()})
    network = export_onnx(
        model, example, opset=release.opset, metadata=file_metadata(model, encoding, job)
    )
    registered = _registered(model, network, encoding, rows, gaps_of(snapshot))
    report = _joined(
        check_parity(model, network, inputs, seed=job.seed),
        check_raw_parity(model, registered, rows, seed=job.seed),
    )
    write_atomic(files.parity, report.model_dump_json(indent=1).encode())
    require_parity(report)
    write_atomic(files.tensor, network)
    write_atomic(files.onnx, registered.onnx)
    _write_golden(files, model, registered, rows)
    made = run_variants(release.variants, network, model, encoding, snapshot, pipeline)
    return Exported(_with_variants(files, made, registered), report, tuple(m.report for m in made))


def _with_variants(
    files: ExportFiles, made: Sequence[MadeVariant], registered: Registered
) -> ExportFiles:
    """Write the variants that passed; rows go into them as into the main file."""
    passed = {one.variant.kind: one.onnx for one in made if one.report.passed}
    for kind, network in passed.items():
        write_atomic(files.variants[kind], registered.around(network))
    report = TypeAdapter(list[VariantReport]).dump_json([m.report for m in made], indent=1)
    write_atomic(files.variant_report, report)
    return replace(files, variants={kind: files.variants[kind] for kind in passed})


def gaps_of(snapshot: Snapshot) -> set[str]:
    """Columns in which something is missing, in training or in the held-out rows."""
    both = (snapshot.statistics, snapshot.holdout_statistics)
    return {name for known in both for name, column in known.columns.items() if column.missing}


def _registered(
    model: Model, network: bytes, encoding: Encoding, rows: pa.Table, gaps: set[str]
) -> Registered:
    described = model.get_model_metadata()
    columns = raw_columns(encoding, rows.schema, gaps)
    source = label_source(described)
    threshold = 0.0
    if source is not None:
        answers = TorchPredictor(model).predict(encoding.encode(rows))[source.name]
        threshold = threshold_of(answers)
    return Registered.compose(network, described, encoding, columns, threshold)


def _joined(*reports: ParityReport) -> ParityReport:
    failures = [failure for report in reports for failure in report.failures]
    cases = [case for report in reports for case in report.cases]
    return ParityReport(passed=not failures, failures=tuple(failures), cases=tuple(cases))


def _write_golden(files: ExportFiles, model: Model, registered: Registered, rows: pa.Table) -> None:
    """The same rows for both files, with PyTorch's answers in float32."""
    inputs = registered.encoding.encode(rows)
    outputs = TorchPredictor(model).predict(inputs)
    places = golden_places(rows, outputs, registered)
    inputs, outputs = _taken(inputs, places), _taken(outputs, places)
    write_golden(files.tensor_golden, inputs, outputs)
    if registered.metadata.outputs[-1].dtype == "string":
        outputs |= {LABEL: label_of(registered.metadata, outputs, registered.threshold)}
    raw = registered.columns.encode(rows.take(pa.array(places)))
    write_golden(files.golden, raw, outputs)


def _taken(arrays: Arrays, places: Places) -> dict[str, npt.NDArray[np.generic]]:
    return {name: np.array(array[places]) for name, array in arrays.items()}


def golden_places(rows: pa.Table, outputs: Arrays, registered: Registered) -> Places:
    """Which rows become golden: the first ones, and some in which something is missing.

    Rows close to another class are passed over, as long as two others are left.
    """
    clear = np.ones(rows.num_rows, dtype=np.bool_)
    source = label_source(registered.metadata)
    if source is not None:
        numbers = outputs[source.name].astype(np.float64)
        _, margin = decide_rows(numbers, registered.threshold)
        clear = ~any_by_row(margin <= _CLEAR * max(1.0, float(np.abs(numbers).max(initial=0.0))))
    if clear.sum() < 2:
        clear[:] = True
    holes = np.zeros(rows.num_rows, dtype=np.bool_)
    for column in registered.columns.columns:
        holes |= rows.column(column.name).is_null().to_numpy()
    with_holes = np.flatnonzero(holes & clear)[:_WITH_HOLES]
    rest = np.setdiff1d(np.flatnonzero(clear), with_holes)[: GOLDEN_ROWS - len(with_holes)]
    places: Places = np.sort(np.concatenate([with_holes, rest]))
    return places


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
        "assay.code_revision": job.code_revision,
    }
