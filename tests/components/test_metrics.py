"""Metrics against slow loops over pairs and rows."""

import math

import numpy as np
import pyarrow as pa
import pytest

from components.metrics import (
    MIN_GROUP_ROWS,
    binary_metrics,
    calibration_bins,
    class_metrics,
    expected_calibration_error,
    group_rows,
    resampled_accuracy,
    resampled_roc_auc,
)
from components.pipeline import Scored

ROWS = 300


@pytest.fixture
def scored() -> Scored:
    """Late flights of three airports; LGA is small, JFK never late."""
    rng = np.random.default_rng(0)
    origin = np.array(["EWR"] * 200 + ["JFK"] * 60 + ["LGA"] * 40)
    labels = rng.integers(0, 2, ROWS)
    labels[origin == "JFK"] = 0
    probability = np.clip(0.3 * labels + 0.6 * rng.random(ROWS), 0.01, 0.99).round(2)
    return Scored(
        rows=pa.table({"origin": origin.tolist()}),
        labels=labels,
        outputs={"probability": probability.astype(np.float32)},
    )


def slow_auc(labels: list[int], scores: list[float]) -> float:
    """Share of pairs in the right order, ties counting half."""
    late = [s for s, label in zip(scores, labels, strict=True) if label]
    timely = [s for s, label in zip(scores, labels, strict=True) if not label]
    wins = sum((a > b) + 0.5 * (a == b) for a in late for b in timely)
    return wins / (len(late) * len(timely))


def test_binary_metrics_agree_with_slow_loops(scored: Scored) -> None:
    metrics = binary_metrics(scored, "probability")
    labels = scored.labels.tolist()
    chances = [float(p) for p in scored.outputs["probability"]]
    pairs = list(zip(labels, chances, strict=True))
    assert metrics["roc_auc"] == pytest.approx(slow_auc(labels, chances))
    assert metrics["brier"] == pytest.approx(sum((p - y) ** 2 for y, p in pairs) / ROWS)
    loss = -sum(math.log(p if y else 1 - p) for y, p in pairs) / ROWS
    assert metrics["log_loss"] == pytest.approx(loss)
    assert metrics["positive_rate"] == pytest.approx(sum(labels) / ROWS)
    assert len(metrics) == 5


def test_a_group_has_a_score_if_it_is_large_and_has_both_labels(scored: Scored) -> None:
    metrics = binary_metrics(scored, "probability", groups=("origin",))
    assert [name for name in metrics if "/" in name] == ["roc_auc/origin/EWR"]
    chances = [float(p) for p in scored.outputs["probability"][:200]]
    expected = slow_auc(scored.labels[:200].tolist(), chances)
    assert metrics["roc_auc/origin/EWR"] == pytest.approx(expected)


@pytest.mark.parametrize(("rows", "known"), [(MIN_GROUP_ROWS - 1, False), (MIN_GROUP_ROWS, True)])
def test_the_smallest_group_with_a_score(rows: int, known: bool) -> None:
    labels = np.arange(rows) % 2
    scored = Scored(
        rows=pa.table({"origin": ["EWR"] * rows}), labels=labels, outputs={"p": labels * 0.8 + 0.1}
    )
    assert ("roc_auc/origin/EWR" in binary_metrics(scored, "p", groups=("origin",))) is known


def test_a_missing_group_is_no_group(scored: Scored) -> None:
    words: list[str | None] = scored.rows.column("origin").to_pylist()
    words[:60] = [None] * 60
    rows = pa.table({"origin": pa.array(words, pa.string())})
    assert list(group_rows(rows, "origin")) == ["EWR", "JFK", "LGA"]
    chosen = Scored(rows=rows, labels=scored.labels, outputs=scored.outputs)
    names = [n for n in binary_metrics(chosen, "probability", groups=("origin",)) if "/" in n]
    assert names == ["roc_auc/origin/EWR"]


def test_groups_list_their_rows_sorted_by_value() -> None:
    groups = group_rows(pa.table({"x": ["b", "a", "b", "c", "a"]}), "x")
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "a": [1, 4],
        "b": [0, 2],
        "c": [3],
    }


def test_class_metrics_agree_with_slow_loops() -> None:
    rng = np.random.default_rng(1)
    raw = rng.random((50, 4)) + 0.05
    labels = rng.integers(0, 3, 50)  # the last class never occurs
    probabilities = (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
    metrics = class_metrics(
        Scored(rows=pa.table({}), labels=labels, outputs={"p": probabilities}), "p"
    )
    right = sum(
        int(max(range(4), key=lambda c: row[c]) == y) for row, y in zip(raw, labels, strict=True)
    )
    assert metrics["accuracy"] == right / 50
    exact = raw / raw.sum(axis=1, keepdims=True)
    loss = -sum(math.log(row[y]) for row, y in zip(exact, labels, strict=True)) / 50
    assert metrics["log_loss"] == pytest.approx(loss, rel=1e-5)


def test_calibration_error_agrees_with_a_slow_loop() -> None:
    rng = np.random.default_rng(2)
    chances = rng.random(1000)
    happened = (rng.random(1000) < chances**2).astype(np.int64)
    ordered = sorted(zip(chances.tolist(), happened.tolist(), strict=True))
    bins = [ordered[start : start + 100] for start in range(0, 1000, 100)]
    slow = sum(abs(sum(p for p, _ in b) - sum(y for _, y in b)) for b in bins) / 1000
    assert expected_calibration_error(chances, happened) == pytest.approx(slow, abs=1e-3)
    assert expected_calibration_error(chances, happened) > 0.15
    honest = (rng.random(1000) < chances).astype(np.int64)
    assert expected_calibration_error(chances, honest) < 0.06


def test_equal_probabilities_share_a_bin_whatever_the_order_of_rows() -> None:
    chances = np.array([0.25] * 8 + [0.75] * 4)
    happened = np.array([1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0])
    assert expected_calibration_error(chances, happened) == 0.0
    turned = slice(None, None, -1)
    assert expected_calibration_error(chances[turned], happened[turned]) == 0.0
    bins = calibration_bins(chances, happened)
    assert bins.rows.tolist() == [8, 4]
    assert bins.predicted.tolist() == bins.observed.tolist() == [0.25, 0.75]


def test_a_probability_that_is_no_number_has_no_calibration() -> None:
    assert math.isnan(expected_calibration_error(np.array([0.5, math.nan]), np.array([0, 1])))


def test_the_top_label_is_what_is_calibrated() -> None:
    probabilities = np.array([[0.6, 0.3, 0.1]] * 10)
    labels = np.array([0] * 6 + [1] * 4)
    scored = Scored(rows=pa.table({}), labels=labels, outputs={"p": probabilities})
    assert class_metrics(scored, "p")["calibration_error"] == pytest.approx(0.0)
    wrong = Scored(rows=pa.table({}), labels=labels * 0 + 2, outputs={"p": probabilities})
    assert class_metrics(wrong, "p")["calibration_error"] == pytest.approx(0.6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_output_that_is_no_number_has_no_score(bad: float) -> None:
    """Not the score of the highest, which is how NaN is sorted."""
    labels, counts = np.array([0, 1, 1, 0]), np.ones(4, np.int64)
    chances = np.array([0.2, 0.7, bad, 0.4])
    scored = Scored(rows=pa.table({}), labels=labels, outputs={"p": chances})
    metrics = binary_metrics(scored, "p")
    assert metrics.pop("positive_rate") == 0.5
    assert all(math.isnan(value) for value in metrics.values())
    classes = np.stack([1 - chances, chances], axis=1)
    scored = Scored(rows=pa.table({}), labels=labels, outputs={"p": classes})
    assert all(math.isnan(value) for value in class_metrics(scored, "p").values())
    measure = resampled_accuracy("p")(scored)
    assert math.isnan(measure(counts)) and measure(np.array([1, 1, 0, 2])) == 1.0


def test_rows_without_a_score_count_only_where_they_are_drawn() -> None:
    scored = Scored(
        rows=pa.table({}),
        labels=np.array([0, 1, 1]),
        outputs={"p": np.array([0.2, 0.7, math.nan])},
    )
    measure = resampled_roc_auc("p")(scored)
    assert math.isnan(measure(np.ones(3, np.int64))) and measure(np.array([1, 2, 0])) == 1.0


def test_a_row_without_any_probability_has_no_score() -> None:
    scored = Scored(rows=pa.table({}), labels=np.array([0]), outputs={"p": np.zeros((1, 2))})
    assert math.isnan(class_metrics(scored, "p")["accuracy"])
