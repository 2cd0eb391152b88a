"""Metrics against slow loops over pairs and rows."""

import math

import numpy as np
import pyarrow as pa
import pytest

from components.metrics import MIN_GROUP_ROWS, binary_metrics, class_metrics, group_rows
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
    assert len(metrics) == 4


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
