"""Confidence intervals of metrics: they hold the truth about as often as they say."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from components.metrics import resampled_accuracy
from components.pipeline import Pipeline, Scored, load_pipeline
from components.validate import intervals
from components.validate.intervals import FEW_ROWS, metric_intervals

TRUTH = 0.8


@pytest.fixture
def pipeline() -> Pipeline:
    return replace(load_pipeline("digits"), metrics=metrics, resampled=None, metric="accuracy")


def metrics(scored: Scored) -> dict[str, float]:
    right = scored.outputs["probabilities"].argmax(axis=1) == scored.labels
    return {"accuracy": float(right.mean()), "wrong": float(1 - right.mean()), "a/b": 0.5}


def scored(rows: int, seed: int = 0) -> Scored:
    """Answers that are right in :data:`TRUTH` of cases."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, rows)
    said = np.where(generator.random(rows) < TRUTH, labels, 1 - labels)
    return Scored(
        rows=pa.table({"n": np.arange(rows)}),
        labels=labels,
        outputs={"probabilities": np.eye(2, dtype=np.float32)[said]},
    )


@pytest.mark.parametrize("rows", [400, 4 * FEW_ROWS])
def test_intervals_hold_the_truth_as_often_as_they_say(
    pipeline: Pipeline, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, tries = 0, 100
    for seed in range(tries):
        given = scored(rows, seed)
        low, high = metric_intervals(pipeline, given, metrics(given))["wrong"]
        assert low < metrics(given)["wrong"] < high
        assert high - low < 12 * np.sqrt(TRUTH * (1 - TRUTH) / rows)
        held += low < 1 - TRUTH < high
    assert 88 <= held <= 100


@pytest.mark.parametrize("rows", [300, 2 * FEW_ROWS])
def test_the_deciding_metric_is_resampled_quickly(pipeline: Pipeline, rows: int) -> None:
    given = scored(rows)
    quick = replace(pipeline, resampled=resampled_accuracy("probabilities"))
    found = metric_intervals(quick, given, metrics(given))
    assert set(found) == {"accuracy", "wrong"}, "a slice has none"
    low, high = found["accuracy"]
    assert low < metrics(given)["accuracy"] < high
    assert metric_intervals(quick, given, metrics(given)) == found


@pytest.mark.parametrize("rows", [5, 2 * FEW_ROWS])
@pytest.mark.parametrize("broken", [lambda scored: {}, lambda scored: {"wrong": float("nan")}])
def test_what_cannot_be_measured_on_parts_has_no_interval(
    pipeline: Pipeline, rows: int, broken: Callable[[Scored], dict[str, float]]
) -> None:
    given = scored(rows)
    assert metric_intervals(replace(pipeline, metrics=broken), given, metrics(given)) == {}


def test_metrics_that_raise_on_parts_cost_the_intervals_only(pipeline: Pipeline) -> None:
    def broken(scored: Scored) -> dict[str, float]:
        raise RuntimeError("too few rows")

    given = scored(50)
    assert metric_intervals(replace(pipeline, metrics=broken), given, metrics(given)) == {}


def test_a_metric_that_is_not_finite_has_none(pipeline: Pipeline) -> None:
    found = metric_intervals(pipeline, scored(50), {"accuracy": float("nan"), "wrong": 0.2})
    assert set(found) == {"wrong"}
    assert intervals.PARTS == 10
