"""Metrics of held-out rows, by scikit-learn."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.pipeline import Scored

Numbers = npt.NDArray[np.floating]
MIN_GROUP_ROWS = 50
"""Smaller groups get no metric: it would say more about chance than about the model."""


def binary_metrics(
    scored: Scored, output: str, *, groups: tuple[str, ...] = ()
) -> dict[str, float]:
    """ROC-AUC, log loss and Brier score of a probability, and ROC-AUC by group.

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
    metrics = {
        "roc_auc": float(roc_auc_score(labels, probability)),
        "log_loss": float(log_loss(labels, probability, labels=[0, 1])),
        "brier": float(brier_score_loss(labels, probability)),
        "positive_rate": float(labels.mean()),
    }
    for column in groups:
        for value, chosen in group_rows(scored.rows, column).items():
            if len(chosen) >= MIN_GROUP_ROWS and len(np.unique(labels[chosen])) == 2:
                score = roc_auc_score(labels[chosen], probability[chosen])
                metrics[f"roc_auc/{column}/{value}"] = float(score)
    return metrics


def class_metrics(scored: Scored, output: str) -> dict[str, float]:
    """Accuracy and log loss of class probabilities ``(B, C)``."""
    from sklearn.metrics import accuracy_score, log_loss

    probabilities = np.asarray(scored.outputs[output], dtype=np.float64)
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    classes = list(range(probabilities.shape[1]))
    return {
        "accuracy": float(accuracy_score(scored.labels, probabilities.argmax(axis=1))),
        "log_loss": float(log_loss(scored.labels, probabilities, labels=classes)),
    }


def group_rows(rows: pa.Table, column: str) -> dict[str, npt.NDArray[np.int64]]:
    """Row numbers of each value of a string column, values sorted; a missing value is none."""
    values = rows.column(column).to_numpy()
    known = sorted(set(rows.column(column).drop_null().to_pylist()))
    return {value: np.flatnonzero(values == value) for value in known}
