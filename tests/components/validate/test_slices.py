"""Slice gates: every value is judged or listed as not judged, never passed in silence."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from components.metrics import resampled_accuracy
from components.pipeline import Pipeline, Scored, SliceGate
from components.pipelines.digits import pipeline as digits
from components.validate.gates.report import SliceResult
from components.validate.gates.slices import MISSING, MOST_VALUES, check_slices, slice_rows


def accuracy(scored: Scored) -> dict[str, float]:
    right = scored.outputs["p"].argmax(axis=1) == scored.labels
    return {"accuracy": float(right.mean()), "size": float(len(right)), "odd": math.nan}


PIPELINE = replace(
    digits,
    features=replace(digits.features, label="label", classes=2),
    metrics=accuracy,
    gates=(SliceGate(metric="accuracy", column="place", minimum=0.5),),
    resampled=resampled_accuracy("p"),
)
PLACES = ["a"] * 8 + ["b"] * 4 + ["c"] * 2 + ["d"] * 4
LABELS = np.array([0, 1] * 4 + [0, 1] * 2 + [0, 1] + [1] * 4)
RIGHT = np.array([1] * 8 + [1, 0, 0, 0] + [0, 0] + [0] * 4)


def check(gate: SliceGate, places: pa.Array, pipeline: Pipeline = PIPELINE) -> SliceResult:
    answers = np.where(RIGHT, LABELS, 1 - LABELS)
    rows = pa.table({"place": places, "label": pa.array(LABELS)})
    outputs = {"p": np.eye(2, dtype=np.float32)[answers]}
    return check_slices(pipeline, gate, Scored(rows=rows, labels=LABELS, outputs=outputs))


def gate(**changes: object) -> SliceGate:
    given = {"metric": "accuracy", "column": "place", "minimum": 0.5, "min_rows": 3, **changes}
    return SliceGate(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("pipeline", [PIPELINE, replace(PIPELINE, resampled=None)])
def test_a_failing_slice_is_named_with_rows_value_and_bound(pipeline: Pipeline) -> None:
    result = check(gate(), pa.array(PLACES), pipeline)
    assert not result.passed
    assert result.failures == (
        "accuracy must be at least 0.5 for every value of 'place'; 'b' (4 rows) has 0.25, which "
        "fails.",
    )
    found = [(one.value, one.rows, one.score, one.passed, one.note) for one in result.slices]
    assert found == [
        ("a", 8, 1.0, True, ""),
        ("b", 4, 0.25, False, ""),
        ("c", 2, None, None, "fewer than 3 rows"),
        ("d", 4, None, None, "one label only"),
    ]


def test_every_failing_slice_is_named() -> None:
    failures = check(gate(min_rows=1), pa.array(PLACES)).failures
    assert ["'b' (4 rows)" in failures[0], "'c' (2 rows)" in failures[1]] == [True, True]
    assert len(failures) == 2


def test_what_was_not_judged_is_said_where_the_rest_passes() -> None:
    result = check(gate(minimum=0.25), pa.array(PLACES))
    assert result.passed
    assert result.sentence == (
        "accuracy must be at least 0.25 for every value of 'place'; 2 of 4 keep it, the lowest is "
        "'b' (4 rows) with 0.25. Not judged: 'c' (2 rows, fewer than 3 rows), 'd' (4 rows, one "
        "label only)."
    )


def test_a_ceiling_is_kept_from_above() -> None:
    result = check(gate(minimum=-math.inf, maximum=0.9), pa.array(PLACES))
    assert "'a' (8 rows) has 1.0, which fails." in result.failures[0]
    passed = check(gate(minimum=-math.inf, maximum=1.0), pa.array(PLACES))
    assert passed.passed and "the highest is 'a' (8 rows) with 1.0" in passed.sentence


@pytest.mark.parametrize(
    "places",
    [
        pa.array([3] * 8 + [7] * 10, pa.int8()),
        pa.array([False] * 8 + [True] * 10),
        pa.array(["x"] * 8 + ["y"] * 10).dictionary_encode(),
        pa.DictionaryArray.from_arrays([0] * 5 + [2] * 3 + [1] * 10, ["x", "y", "x", "unused"]),
        pa.DictionaryArray.from_arrays([0] * 8 + [1] * 10, pa.array(["x", None])),
        pa.array(["x"] * 8 + [None] * 10),
        pa.array([4] * 8 + [None] * 10, pa.int32()),
    ],
    ids=lambda places: str(places.type),
)
def test_columns_of_other_types_and_missing_values_are_slices(places: pa.Array) -> None:
    result = check(gate(), places)
    assert [(one.rows, one.score) for one in result.slices] == [(8, 1.0), (10, 0.1)]
    assert len(result.failures) == 1
    assert (result.slices[1].value == MISSING) is (None in places.to_pylist())


def test_a_value_that_is_written_like_a_missing_one_keeps_its_rows() -> None:
    found = slice_rows(pa.table({"place": ["a", None, MISSING, "a"]}), "place")
    assert {name: rows.tolist() for name, rows in found.items()} == {"a": [0, 3], MISSING: [1, 2]}


def test_of_the_label_every_class_is_judged() -> None:
    result = check(gate(column="label"), pa.array(PLACES))
    assert [(one.value, one.rows, one.passed) for one in result.slices] == [
        ("0", 7, True),
        ("1", 11, False),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"column": "nowhere"}, "there is no such column, only place, label"),
        ({"min_rows": 9}, "none of its values could be judged: 'a' (8 rows, fewer than 9 rows)"),
    ],
)
def test_a_gate_that_cannot_be_evaluated_fails(changes: dict[str, object], words: str) -> None:
    result = check(gate(**changes), pa.array(PLACES))
    assert not result.passed
    assert f"the gate cannot be evaluated: {words}" in result.failures[0]


@pytest.mark.parametrize(
    ("metric", "words"),
    [("odd", "it is nan"), ("lost", "was not measured, only accuracy, size, odd")],
)
def test_a_metric_that_is_missing_or_not_finite_fails(metric: str, words: str) -> None:
    result = check(gate(metric=metric), pa.array(PLACES))
    assert len(result.failures) == 2
    assert f"cannot be judged: it {words.removeprefix('it ')}, which fails" in result.failures[0]


def test_a_metric_that_raises_fails_the_gate_and_not_the_run() -> None:
    def broken(scored: Scored) -> dict[str, float]:
        raise ZeroDivisionError("no rows")

    result = check(gate(), pa.array(PLACES), replace(PIPELINE, metrics=broken, resampled=None))
    assert "cannot be judged: ZeroDivisionError: no rows, which fails" in result.failures[0]

    def lacking(scored: Scored) -> dict[str, float]:
        return {"accuracy": scored.rows["no such column"]}

    result = check(gate(), pa.array(PLACES), replace(PIPELINE, metrics=lacking, resampled=None))
    assert "KeyError" in result.failures[0] and "no such column" in result.failures[0]

    def unready(scored: Scored) -> object:
        raise ZeroDivisionError("not prepared")

    result = check(gate(), pa.array(PLACES), replace(PIPELINE, resampled=unready))
    assert "cannot be evaluated: ZeroDivisionError: not prepared." in result.failures[0]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array(np.linspace(0, 1, 18)), "it holds double"),
        (pa.array([[1.0]] * 18), "it holds list"),
    ],
)
def test_a_column_that_has_no_values_to_slice_by_fails(column: pa.Array, words: str) -> None:
    assert words in check(gate(), column).failures[0]


def test_a_column_of_too_many_values_is_refused() -> None:
    rows = pa.table({"place": np.arange(MOST_VALUES + 1)})
    with pytest.raises(Exception, match="more than 1,000 distinct values"):
        slice_rows(rows, "place")
    assert len(slice_rows(rows.slice(1), "place")) == MOST_VALUES


def test_a_slice_gate_that_lets_everything_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="slice gate on 'auc' must set minimum or maximum"):
        SliceGate(metric="auc", column="x")
    with pytest.raises(ValueError, match=r"bounds that a number can keep; got 0\.9\.\.0\.5"):
        SliceGate(metric="auc", column="x", minimum=0.9, maximum=0.5)
    with pytest.raises(ValueError, match=r"bounds that a number can keep; got inf\.\.inf"):
        SliceGate(metric="auc", column="x", minimum=math.inf)
    with pytest.raises(ValueError, match=r"min_rows must be >= 1, got 0"):
        SliceGate(metric="auc", column="x", minimum=0.5, min_rows=0)
