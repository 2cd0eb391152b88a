"""Metrics of held-out rows, by scikit-learn."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.pipeline import Floats, Resampled, Scored

MIN_GROUP_ROWS = 50
"""Smaller groups get no metric: it would say more about chance than about the model."""
CALIBRATION_BINS = 10
"""Bins of the calibration error, with equally many rows each."""


def binary_metrics(
    scored: Scored, output: str, *, groups: tuple[str, ...] = ()
) -> dict[str, float]:
    """ROC-AUC, log loss, Brier score and calibration error of a probability; ROC-AUC by group.

    A probability that is NaN or infinite makes the first four NaN, which no gate lets pass.

    Args:
        scored: Labels 0 or 1, and an output ``(B,)`` holding the probability of 1.
        output: The output's name.
        groups: String columns; each value with at least :data:`MIN_GROUP_ROWS` rows and both labels
            gives a metric ``roc_auc/<column>/<value>``.
    """
    from sklearn.metrics import (
        brier_score_loss,
        log_loss,
        roc_auc_score,
    )

    labels = scored.labels
    probability = np.asarray(scored.outputs[output], dtype=np.float64)
    if not np.isfinite(probability).all():
        unknown = dict.fromkeys(("roc_auc", "log_loss", "brier", "calibration_error"), math.nan)
        return {**unknown, "positive_rate": float(labels.mean())}
    metrics = {
        "roc_auc": float(roc_auc_score(labels, probability)),
        "log_loss": float(log_loss(labels, probability, labels=[0, 1])),
        "brier": float(brier_score_loss(labels, probability)),
        "calibration_error": expected_calibration_error(probability, labels),
        "positive_rate": float(labels.mean()),
    }
    for column in groups:
        for value, chosen in group_rows(scored.rows, column).items():
            if len(chosen) >= MIN_GROUP_ROWS and len(np.unique(labels[chosen])) == 2:
                score = roc_auc_score(labels[chosen], probability[chosen])
                metrics[f"roc_auc/{column}/{value}"] = float(score)
    return metrics


def class_metrics(scored: Scored, output: str) -> dict[str, float]:
    """Accuracy, log loss and top-label calibration error of class probabilities ``(B, C)``.

    All are NaN, which no gate lets pass, where a probability is, or where a row has none.
    """
    from sklearn.metrics import accuracy_score, log_loss

    probabilities = np.asarray(scored.outputs[output], dtype=np.float64)
    known = np.isfinite(probabilities).all() and probabilities.any(axis=1).all()
    if not known:
        return dict.fromkeys(("accuracy", "log_loss", "calibration_error"), math.nan)
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    classes = list(range(probabilities.shape[1]))
    chosen = probabilities.argmax(axis=1)
    right = (chosen == scored.labels).astype(np.int64)
    return {
        "accuracy": float(accuracy_score(scored.labels, chosen)),
        "log_loss": float(log_loss(scored.labels, probabilities, labels=classes)),
        "calibration_error": expected_calibration_error(probabilities.max(axis=1), right),
    }


class CalibrationBins(NamedTuple):
    """Mean probability, share of rows in which it came true, and rows, of each bin that has any."""

    predicted: Floats
    observed: Floats
    rows: npt.NDArray[np.int64]


def calibration_bins(probability: Floats, happened: npt.NDArray[np.int64]) -> CalibrationBins:
    """Rows in bins of equal mass, by quantiles of the probability; equal ones share a bin.

    Args:
        probability: Of an event, (B,).
        happened: 1 where it happened, else 0, (B,).
    """
    inner = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    edges = np.quantile(probability, inner)
    place = np.searchsorted(edges, probability, side="left")
    rows = np.bincount(place, minlength=CALIBRATION_BINS)
    filled = rows > 0
    sums = [
        np.bincount(place, weights=v, minlength=CALIBRATION_BINS) for v in (probability, happened)
    ]
    predicted, observed = (total[filled] / rows[filled] for total in sums)
    return CalibrationBins(predicted, observed, rows[filled])


def expected_calibration_error(probability: Floats, happened: npt.NDArray[np.int64]) -> float:
    """Mean distance of probability and frequency over bins of equal mass, from 0 to 1.

    Expected calibration error (Naeini, Cooper and Hauskrecht, AAAI 2015) with the adaptive bins of
    Nguyen and O'Connor (EMNLP 2015, https://arxiv.org/abs/1508.05154). For several classes it is
    taken of the top label (Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599). Chance alone
    makes it positive: by up to 0.4 / sqrt(rows per bin) for a calibrated model.
    """
    if not np.isfinite(probability).all():
        return math.nan
    bins = calibration_bins(probability, happened)
    return float(np.average(np.abs(bins.predicted - bins.observed), weights=bins.rows))


def resampled_roc_auc(output: str) -> Callable[[Scored], Resampled]:
    """ROC-AUC of resampled rows, for ``Pipeline.resampled``: rows are sorted once.

    Args:
        output: The name of an output (B,), the probability of label 1.
    """

    def prepare(scored: Scored) -> Resampled:
        return sorted_roc_auc(scored.labels == 1, np.asarray(scored.outputs[output], np.float64))

    return prepare


def sorted_roc_auc(positive: npt.NDArray[np.bool_], score: Floats) -> Resampled:
    """ROC-AUC of (B,) rows by how often each counts: the share of pairs in the right order.

    The scores are sorted once, so that each call takes linear time. NaN where a label is missing,
    or where a row that counts has no score.
    """
    unknown = np.isnan(score)
    order = np.argsort(score, kind="stable")
    ordered, event = score[order], positive[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])

    def roc_auc(counts: npt.NDArray[np.int64]) -> float:
        if counts[unknown].any():
            return math.nan
        drawn = counts[order]
        ones = np.add.reduceat(np.where(event, drawn, 0), starts)
        zeros = np.add.reduceat(np.where(event, 0, drawn), starts)
        pairs = int(ones.sum()) * int(zeros.sum())
        below = np.cumsum(zeros) - zeros
        won = 2 * int(np.dot(ones, below)) + int(np.dot(ones, zeros))  # a tie is half a pair
        return won / (2 * pairs) if pairs else math.nan

    return roc_auc


def resampled_accuracy(output: str) -> Callable[[Scored], Resampled]:
    """Accuracy of resampled rows, for ``Pipeline.resampled``.

    NaN where a row that counts has a probability that is not finite.

    Args:
        output: The name of an output (B, C), the probabilities of the classes.
    """

    def prepare(scored: Scored) -> Resampled:
        found = scored.outputs[output]
        unknown = ~np.isfinite(found).all(axis=1)
        right = (found.argmax(axis=1) == scored.labels).astype(np.int64)

        def accuracy(counts: npt.NDArray[np.int64]) -> float:
            if counts[unknown].any():
                return math.nan
            return float(np.dot(right, counts) / counts.sum())

        return accuracy

    return prepare


def group_rows(rows: pa.Table, column: str) -> dict[str, npt.NDArray[np.int64]]:
    """Row numbers of each value of a string column, values sorted; a missing value is none."""
    values = rows.column(column).to_numpy()
    known = sorted(set(rows.column(column).drop_null().to_pylist()))
    return {value: np.flatnonzero(values == value) for value in known}
