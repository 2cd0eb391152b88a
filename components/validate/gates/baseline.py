"""A model must beat the constant prediction of the label frequencies: it has to have learned.

Legend: B = held-out rows.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from components.bootstrap import compare
from components.data.encoding import Features, read_labels
from components.data.snapshot import Snapshot
from components.pipeline import Floats, Pipeline, Scored
from components.validate.gates.report import BaselineResult

Outputs = Mapping[str, npt.NDArray[np.generic]]


def check_baseline(
    pipeline: Pipeline, scored: Scored, metrics: Mapping[str, float], frequencies: Floats
) -> BaselineResult:
    """Compare the model with a constant one on the same rows, by the deciding metric.

    The lower end of the confidence interval of their difference must lie above zero. Where one of
    them cannot be scored, the gate fails and says why.

    Args:
        pipeline: Gives the metric, and the constant outputs where it must.
        scored: The held-out rows with the model's outputs.
        metrics: The pipeline's metrics of these.
        frequencies: Of the labels in training, (classes,).
    """
    value = metrics.get(pipeline.metric, math.nan)
    if not math.isfinite(value):
        return _failed(pipeline, None, f"the model's is {value}, so nothing can be compared")
    try:
        constant = Scored(
            rows=scored.rows,
            labels=scored.labels,
            outputs=_constant_outputs(pipeline, scored.outputs, frequencies, len(scored.labels)),
        )
        base = float(pipeline.metrics(constant)[pipeline.metric])
        if not math.isfinite(base):
            raise ValueError(f"it is {base}")
        interval = compare(pipeline, (scored, value), (constant, base))
    except Exception as error:  # noqa: BLE001  the pipeline's own code may raise anything
        what = f"the constant prediction cannot be scored: {type(error).__name__}: {error}"
        hint = "Give Pipeline.baseline, outputs of a constant model that metrics can score"
        return _failed(pipeline, value, f"{what}. {hint}")
    passed = interval.low is not None and interval.low > 0
    sentence = (
        f"{pipeline.metric} must be higher than that of a constant prediction of the training "
        f"labels' frequencies; on {interval.rows:,} held-out rows the model has {value!r}, the "
        f"constant {base!r}: {interval.difference:+.4f}, {interval}"
        f"{'' if passed else ', which does not lie above zero and fails'}."
    )
    return BaselineResult(
        metric=pipeline.metric,
        value=value,
        baseline=base,
        interval=interval,
        passed=passed,
        sentence=sentence,
    )


def label_frequencies(snapshot: Snapshot, features: Features) -> Floats:
    """Share of every class among the training rows, (classes,).

    Raises:
        DataError: The stored rows are damaged.
    """
    counts = np.zeros(features.classes, dtype=np.int64)
    for number in range(snapshot.chunks("train")):
        labels = read_labels(snapshot.chunk("train", number, [features.label]), features)
        counts += np.bincount(labels, minlength=features.classes)
    return np.asarray(counts / counts.sum())


def _constant_outputs(
    pipeline: Pipeline, outputs: Outputs, frequencies: Floats, rows: int
) -> Outputs:
    if pipeline.baseline is not None:
        return pipeline.baseline(frequencies, rows)
    return {
        name: np.repeat(_constant(name, output, frequencies)[np.newaxis], rows, axis=0)
        for name, output in outputs.items()
    }


def _constant(
    name: str, output: npt.NDArray[np.generic], frequencies: Floats
) -> npt.NDArray[np.generic]:
    """What a model that knows only the frequencies would say in one row."""
    if np.issubdtype(output.dtype, np.floating):
        if output.shape[1:] == () and len(frequencies) == 2:
            return np.asarray(frequencies[1], dtype=output.dtype)
        if output.shape[1:] == frequencies.shape:
            return frequencies.astype(output.dtype)
    elif output.shape[1:] == ():
        return np.asarray(frequencies.argmax(), dtype=output.dtype)
    raise ValueError(
        f"output {name!r} of shape {('batch', *output.shape[1:])} is neither the probability of "
        f"one of two classes nor the probabilities of all {len(frequencies)}"
    )


def _failed(pipeline: Pipeline, value: float | None, why: str) -> BaselineResult:
    return BaselineResult(
        metric=pipeline.metric,
        value=value,
        baseline=None,
        interval=None,
        passed=False,
        sentence=(
            f"{pipeline.metric} must be higher than that of a constant prediction of the training "
            f"labels' frequencies; {why}."
        ),
    )
