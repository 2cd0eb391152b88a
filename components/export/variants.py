"""Smaller forms of a model, held against the module and against the main file.

A variant is an offer beside the model, so one that breaks its bounds does not end the run: it is
left out, and its report says why.

Legend: B = batch.
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx.defs import SchemaError
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError

from components.contract import Arrays, Model, TensorSpec
from components.data.encoding import Encoding, read_labels
from components.data.snapshot import Snapshot
from components.errors import ContractError
from components.evaluate import measure
from components.export.config import Variant
from components.export.measures import Run
from components.export.onnx_file import graph_failures
from components.export.predictors import open_session, run_session
from components.export.smaller import make_variant
from components.export.variant_report import Speed, VariantReport
from components.pipeline import Pipeline, Scored

if TYPE_CHECKING:
    import onnxruntime as ort

Array = npt.NDArray[np.generic]

BATCH = 1024
"""Rows of a large batch: what throughput is measured with, and what answers are asked for in."""

SMALL_BATCHES = (1, 7)
"""Batches that the first rows are asked for in too: int8 quantises by the range of a batch."""

HALF_ROWS = 256
"""Rows that fp16 is also asked for in true half precision, by the slow reference evaluator of ONNX:
onnxruntime has no such kernels on a CPU, and computes in float32 without a word."""

_SMALL_ROWS = 70
_ROUNDS = 8
_CALLS = 50
_WARM_UPS = 20


@dataclass(frozen=True)
class MadeVariant:
    """A variant's graph of tensors with its report; empty bytes where it could not be made."""

    variant: Variant
    onnx: bytes
    report: VariantReport


@dataclass(frozen=True)
class Reference:
    """What variants are held against, computed once for all of them.

    ``inputs`` are all held-out rows, ``float64`` and ``float32`` the module's outputs, ``main``
    those of the main file, in the order of ``specs``.
    """

    pipeline: Pipeline
    specs: tuple[TensorSpec, ...]
    onnx: bytes
    scored: Scored
    inputs: Arrays
    float64: list[Array]
    float32: list[Array]
    metric: float

    def measure(self, outputs: Sequence[Array]) -> float:
        """The deciding metric of other outputs for the same rows."""
        named = {spec.name: array for spec, array in zip(self.specs, outputs, strict=True)}
        scored = Scored(rows=self.scored.rows, labels=self.scored.labels, outputs=named)
        return measure(self.pipeline, scored).get(self.pipeline.metric, math.nan)


def run_variants(
    variants: Sequence[Variant],
    tensor_onnx: bytes,
    model: Model,
    encoding: Encoding,
    snapshot: Snapshot,
    pipeline: Pipeline,
) -> list[MadeVariant]:
    """Make every variant of a graph of tensors, and judge it on the held-out rows.

    Args:
        variants: Which, with their bounds.
        tensor_onnx: The network as exported, equal to the model.
        model: In eval mode, on the CPU.
        encoding: How rows become its inputs.
        snapshot: Gives the held-out rows.
        pipeline: Gives label and metrics.

    Raises:
        ContractError: The main file or the module cannot answer the held-out rows.
    """
    if not variants:
        return []
    reference = make_reference(tensor_onnx, model, encoding, snapshot, pipeline)
    return [_make(variant, model, reference) for variant in variants]


def make_reference(
    tensor_onnx: bytes, model: Model, encoding: Encoding, snapshot: Snapshot, pipeline: Pipeline
) -> Reference:
    """Answer the held-out rows with the module, in both precisions, and with the main file.

    Raises:
        ContractError: One of them cannot.
    """
    rows = snapshot.table("holdout")
    inputs = encoding.encode(rows)
    specs = model.get_model_metadata().outputs
    main = _answer(open_session(tensor_onnx), inputs)
    scored = Scored(
        rows=rows,
        labels=read_labels(rows, pipeline.features),
        outputs={spec.name: array for spec, array in zip(specs, main, strict=True)},
    )
    return Reference(
        pipeline=pipeline,
        specs=specs,
        onnx=tensor_onnx,
        scored=scored,
        inputs=inputs,
        float64=_answer_module(copy.deepcopy(model).double(), inputs, widen=True),
        float32=_answer_module(model, inputs, widen=False),
        metric=measure(pipeline, scored).get(pipeline.metric, math.nan),
    )


def _make(variant: Variant, model: Model, reference: Reference) -> MadeVariant:
    try:
        data = make_variant(variant.kind, reference.onnx)
    except (ContractError, InferenceError, SchemaError) as error:
        report = _report(variant, reference, [f"{type(error).__name__}: {error}"])
        return MadeVariant(variant, b"", report)
    failures = graph_failures(data, model.get_model_metadata())
    if failures:
        return MadeVariant(variant, data, _report(variant, reference, failures))
    return MadeVariant(variant, data, check_variant(variant, data, reference))


def check_variant(variant: Variant, data: bytes, reference: Reference) -> VariantReport:
    """Compare a variant with the module in float64, and with the main file on the held-out rows.

    All bounds are looked at; the failures are in the report, and nothing is raised for them.
    """
    try:
        session = open_session(data)
        outputs = _answer(session, reference.inputs)
        answers = [outputs, *_small_answers(session, reference.inputs)]
        if variant.kind == "fp16":
            answers.append(_answer_in_half(data, reference.inputs))
        differences = dict(_differences(answers, reference))
    except ContractError as error:
        return _report(variant, reference, [str(error)], size_bytes=len(data))
    value = reference.measure(outputs)
    speed, main_speed = _time(session, open_session(reference.onnx), reference.inputs)
    failures = [
        *_size_failures(len(data), len(reference.onnx)),
        *_difference_failures(variant, differences, reference.specs),
        *_metric_failures(variant, reference, value),
    ]
    return _report(
        variant,
        reference,
        failures,
        size_bytes=len(data),
        differences=differences,
        metric_value=value,
        metric_difference=value - reference.metric,
        speed=speed,
        main_speed=main_speed,
    )


def _report(
    variant: Variant, reference: Reference, failures: Sequence[str], **measured: object
) -> VariantReport:
    return VariantReport.model_validate(
        {
            "kind": variant.kind,
            "passed": not failures,
            "failures": tuple(failures),
            "main_size_bytes": len(reference.onnx),
            "rows": reference.scored.rows.num_rows,
            "tolerance": variant.tolerance,
            "metric": reference.pipeline.metric,
            "metric_drop": variant.metric_drop,
            **measured,
        }
    )


def _small_answers(session: "ort.InferenceSession", inputs: Arrays) -> Iterator[list[Array]]:
    few = {name: array[:_SMALL_ROWS] for name, array in inputs.items()}
    for size in SMALL_BATCHES:
        yield _answer(session, few, size)


def _answer_in_half(data: bytes, inputs: Arrays) -> list[Array]:
    evaluator = ReferenceEvaluator(onnx.ModelProto.FromString(data))
    few = {name: np.array(array[:HALF_ROWS]) for name, array in inputs.items()}
    try:
        with np.errstate(all="ignore"):
            outputs = evaluator.run(None, few)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ContractError(
            "the reference evaluator of ONNX must be able to run fp16, as nothing else on a CPU "
            f"computes in half precision; got {type(error).__name__}: {error}. Leave the variant "
            "out."
        ) from error
    assert isinstance(outputs, list), "a run gives its outputs in order"
    return outputs


def _differences(
    answers: Sequence[list[Array]], reference: Reference
) -> Iterator[tuple[str, float]]:
    """Of each output, over answers to all rows or to the first of them."""
    for index, spec in enumerate(reference.specs):
        largest = 0.0
        for found in answers:
            count = found[index].shape[0]
            wide, single = (
                [array[:count] for array in side] for side in (reference.float64, reference.float32)
            )
            if spec.dtype == "int64":
                gap = float((wide[index] != found[index]).mean())
            else:
                run = Run("real", reference.inputs, wide, single)
                gap = float(run.differences(index, found).max(initial=0.0))
            largest = max(largest, gap)
        yield spec.name, largest


def _size_failures(size: int, main: int) -> Iterator[str]:
    if size >= main:
        yield (
            f"a variant must be smaller than the main file's {main:,} bytes; got {size:,}. Leave "
            "it out: the model has too few weights that it could make smaller"
        )


def _difference_failures(
    variant: Variant, differences: Mapping[str, float], specs: Sequence[TensorSpec]
) -> Iterator[str]:
    for spec in specs:
        if spec.dtype != "int64" and not differences[spec.name] <= variant.tolerance:
            yield (
                f"output {spec.name!r} must be within {variant.tolerance:.3g} of the module in "
                f"float64; got {differences[spec.name]:.3g}. Raise the tolerance if that is "
                "acceptable, or look for activations of very different sizes"
            )


def _metric_failures(variant: Variant, reference: Reference, value: float) -> Iterator[str]:
    drop = reference.metric - value
    if not drop <= variant.metric_drop:
        yield (
            f"{reference.pipeline.metric} must be at most {variant.metric_drop:.3g} worse than "
            f"the main file's {reference.metric:.4f}; got {value:.4f}. Raise metric_drop if that "
            "is acceptable, or leave the variant out"
        )


def _answer(session: "ort.InferenceSession", inputs: Arrays, size: int = BATCH) -> list[Array]:
    parts = [run_session(session, chunk) for chunk in _chunks(inputs, size)]
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _answer_module(model: Model, inputs: Arrays, *, widen: bool) -> list[Array]:
    parts = []
    for chunk in _chunks(inputs, BATCH):
        arrays = [chunk[spec.name] for spec in model.get_model_metadata().inputs]
        if widen:
            arrays = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]
        with torch.inference_mode():
            parts.append([o.numpy() for o in model.predict(*map(torch.from_numpy, arrays))])
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _chunks(inputs: Arrays, size: int) -> Iterator[Arrays]:
    rows = next(iter(inputs.values())).shape[0]
    for start in range(0, rows, size):
        # A copy: contiguous and writable, wherever the rows came from.
        yield {name: np.array(array[start : start + size]) for name, array in inputs.items()}


def _time(
    session: "ort.InferenceSession", main: "ort.InferenceSession", inputs: Arrays
) -> tuple[Speed, Speed]:
    """Both in turn within each round, so that a machine whose speed drifts treats them alike."""
    few = {name: array[:1] for name, array in inputs.items()}
    many = {name: np.resize(array, (BATCH, *array.shape[1:])) for name, array in inputs.items()}
    sessions = (session, main)
    single: tuple[list[float], ...] = ([], [])
    batched: tuple[list[float], ...] = ([], [])
    for each in sessions:
        _seconds(each, few, _WARM_UPS)
    for _ in range(_ROUNDS):
        for each, short, long in zip(sessions, single, batched, strict=True):
            short += _seconds(each, few, _CALLS)
            long += _seconds(each, many, 2)
    ours, theirs = map(_speed, single, batched)
    return ours, theirs


def _seconds(session: "ort.InferenceSession", inputs: Arrays, calls: int) -> list[float]:
    run = partial(session.run, None, dict(inputs))
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return found


def _speed(single: Sequence[float], batched: Sequence[float]) -> Speed:
    p50, p99 = np.quantile(single, [0.5, 0.99]) * 1e3
    return Speed(p50_ms=float(p50), p99_ms=float(p99), rows_per_s=BATCH / float(np.median(batched)))
