"""The constant prediction: how it is formed, and that it must be beaten for certain."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.data.encoding import Features
from components.data.memory import ArraySource
from components.data.schema import RowSchema
from components.data.take import take_snapshot
from components.metrics import binary_metrics, class_metrics, resampled_accuracy, resampled_roc_auc
from components.pipeline import Pipeline, Scored
from components.pipelines.digits import pipeline as digits
from components.storage import Storage
from components.validate.gates.baseline import check_baseline, label_frequencies

ROWS = 120
FEW = np.array([0.75, 0.25])
BINARY = replace(
    digits,
    features=replace(digits.features, classes=2),
    metrics=lambda scored: binary_metrics(scored, "p"),
    metric="roc_auc",
    resampled=resampled_roc_auc("p"),
)


def scored(outputs: Mapping[str, Any], labels: Any = None) -> Scored:
    found = np.arange(ROWS) % 2 if labels is None else labels
    return Scored(rows=pa.table({"x": np.arange(ROWS)}), labels=found, outputs=outputs)


def test_a_model_that_ranks_is_better_than_a_constant() -> None:
    given = scored({"p": np.linspace(0.1, 0.5, ROWS) + 0.3 * (np.arange(ROWS) % 2)})
    result = check_baseline(BINARY, given, BINARY.metrics(given), FEW)
    assert result.passed and result.baseline == 0.5
    assert result.interval is not None and result.interval.low is not None
    assert 0 < result.interval.low < result.interval.difference


def test_a_model_that_guesses_is_not() -> None:
    """It is better on these rows, by luck."""
    rng = np.random.default_rng(6)
    given = scored({"p": rng.random(ROWS)})
    metrics = BINARY.metrics(given)
    assert 0.5 < metrics["roc_auc"] < 0.6
    result = check_baseline(BINARY, given, metrics, FEW)
    assert not result.passed
    assert repr(metrics["roc_auc"]) in result.sentence
    assert "the constant 0.5: +0.0" in result.sentence
    assert result.sentence.endswith("which does not lie above zero and fails.")


def test_of_several_classes_the_constant_names_the_most_frequent() -> None:
    labels = np.arange(ROWS) % 4
    labels[labels == 3] = 1
    right = np.eye(3)[labels]
    pipeline = replace(
        BINARY,
        features=replace(digits.features, classes=3),
        metrics=lambda s: class_metrics(s, "p"),
        metric="accuracy",
        resampled=resampled_accuracy("p"),
    )
    result = check_baseline(pipeline, scored({"p": right}, labels), {"accuracy": 1.0}, np.ones(3))
    assert result.baseline == 0.25  # of equal frequencies, the first class
    shares = np.array([0.2, 0.5, 0.3])
    result = check_baseline(pipeline, scored({"p": right}, labels), {"accuracy": 1.0}, shares)
    assert result.baseline == 0.5


def test_a_whole_number_is_the_most_frequent_class() -> None:
    pipeline = replace(
        BINARY,
        metrics=lambda s: {"roc_auc": float((s.outputs["class"] == s.labels).mean())},
        resampled=None,
    )
    given = scored({"class": np.arange(ROWS) % 2})
    assert check_baseline(pipeline, given, {"roc_auc": 1.0}, FEW).baseline == 0.5
    rare = scored({"class": np.arange(ROWS) % 2}, np.ones(ROWS, np.int64))
    assert check_baseline(pipeline, rare, {"roc_auc": 0.5}, FEW).baseline == 0.0


@pytest.mark.parametrize(
    ("output", "change", "words"),
    [
        (np.zeros((ROWS, 3)), {}, r"output 'p' of shape \('batch', 3\) is neither"),
        (np.zeros(ROWS), {"features": digits.features}, "neither the probability of one of two"),
        (np.zeros(ROWS), {"metrics": lambda scored: {}}, "KeyError: 'roc_auc'"),
        (np.zeros(ROWS), {"metrics": lambda scored: {"roc_auc": np.nan}}, "it is nan"),
    ],
)
def test_where_the_constant_cannot_be_scored_the_gate_fails(
    output: Any, change: dict[str, Any], words: str
) -> None:
    shares = np.full(10, 0.1) if "features" in change else FEW
    result = check_baseline(
        replace(BINARY, **change), scored({"p": output}), {"roc_auc": 1}, shares
    )
    assert not result.passed
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(result.sentence)
    assert "Give Pipeline.baseline" in result.sentence


def test_a_pipeline_may_form_the_constant_itself() -> None:
    asked = []

    def constant(frequencies: Any, rows: int) -> dict[str, Any]:
        asked.append((frequencies.tolist(), rows))
        return {"p": np.full(rows, 0.5), "rest": np.zeros((rows, 7))}

    pipeline: Pipeline = replace(BINARY, baseline=constant)
    given = scored({"p": np.arange(ROWS) % 2 * 0.5, "rest": np.zeros((ROWS, 7))})
    assert check_baseline(pipeline, given, {"roc_auc": 1.0}, FEW).passed
    assert asked == [([0.75, 0.25], ROWS)]


@pytest.mark.parametrize("metrics", [{}, {"roc_auc": float("nan")}])
def test_a_model_without_a_score_fails(metrics: dict[str, float]) -> None:
    result = check_baseline(BINARY, scored({"p": np.zeros(ROWS)}), metrics, FEW)
    assert not result.passed and result.value is None
    assert "the model's is nan" in result.sentence


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([0, 0, 0, 1], pa.int8()),
        pa.array([False, False, False, True]),
        pa.array([0.0, 0.0, 0.0, 1.0], pa.float64()),
    ],
    ids=lambda labels: str(labels.type),
)
def test_frequencies_are_those_of_the_training_labels(labels: pa.Array, tmp_path: Path) -> None:
    features = Features(label="label", classes=2, numeric=("x",))
    train = pa.table({"x": np.arange(4.0), "label": labels})
    schema = RowSchema(pa.schema([f.with_nullable(True) for f in train.schema]), key=())
    source = ArraySource(train, train, schema)
    snapshot = take_snapshot(source, features, date(2014, 1, 1), Storage(str(tmp_path)))
    assert label_frequencies(snapshot, features).tolist() == [0.75, 0.25]
