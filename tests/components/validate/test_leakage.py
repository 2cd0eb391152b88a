"""Leakage: what is found, what is passed over with a reason, and that rows are streamed."""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.data import chunks, snapshot_files
from components.data.encoding import Features
from components.data.memory import ArraySource
from components.data.schema import RowSchema
from components.data.snapshot import Snapshot
from components.data.take import take_snapshot
from components.pipeline import LeakageAlarms
from components.pipelines.digits import pipeline as digits
from components.storage import Storage
from components.validate.gates import leakage
from components.validate.gates.leakage import LeakageReport, check_leakage
from components.validate.gates.row_hashes import hash_rows
from components.validate.gates.single_features import ELEMENTS, score_features


def stored(folder: Path, train: dict[str, Any], holdout: dict[str, Any], key: str) -> Snapshot:
    tables = [pa.table(rows) for rows in (train, holdout)]
    fields = [field.with_nullable(field.name != key) for field in tables[0].schema]
    schema = RowSchema(pa.schema(fields), key=(key,) if key else ())
    features = Features(label="label", classes=2, numeric=("x",))
    return take_snapshot(
        ArraySource(*tables, schema), features, date(2014, 1, 1), Storage(str(folder))
    )


def check(
    folder: Path,
    train: dict[str, Any],
    holdout: dict[str, Any],
    *,
    key: str = "",
    features: Features | None = None,
    **alarms: Any,
) -> LeakageReport:
    from dataclasses import replace

    found = features or Features(label="label", classes=2, numeric=("x",))
    pipeline = replace(digits, features=found, leakage=LeakageAlarms(**alarms))
    return check_leakage(pipeline, stored(folder, train, holdout, key), (key,) if key else ())


def numbers(count: int, seed: int, first: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, count).astype(np.int8)
    return {"id": np.arange(first, first + count), "x": rng.normal(size=count), "label": label}


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    report = check(tmp_path, numbers(400, 0), numbers(200, 1, 400), key="id")
    assert report.passed and report.failures == ()
    assert report.keys is not None and report.keys.rows == report.duplicates.rows == 0
    (feature,) = report.features
    assert feature.roc_auc is not None and 0.3 < feature.roc_auc < 0.7
    assert LeakageReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(("repeated", "passed"), [(2, True), (3, False)])
def test_identical_rows_are_counted_and_the_share_is_judged(
    tmp_path: Path, repeated: int, passed: bool
) -> None:
    train, holdout = numbers(400, 0), numbers(200, 1, 400)
    for name in ("x", "label"):
        holdout[name][50 : 50 + repeated] = train[name][300 : 300 + repeated]
    report = check(tmp_path, train, holdout, key="id")
    assert report.passed is passed
    assert report.duplicates.rows == repeated
    assert report.duplicates.first == (50, 51, 52)[:repeated]
    strict = check(tmp_path / "strict", train, holdout, duplicate_share=0.0)
    assert f"{repeated} ({repeated / 200:.2%}, allowed none)" in strict.failures[0]
    assert "or raise LeakageAlarms.duplicate_share" in strict.failures[0]


def test_a_row_with_another_label_is_another_row(tmp_path: Path) -> None:
    train, holdout = numbers(400, 0), numbers(200, 1)
    holdout["x"][:100] = train["x"][:100]
    holdout["label"][:100] = 1 - train["label"][:100]
    assert check(tmp_path, train, holdout).duplicates.rows == 0


def test_one_key_in_both_splits_is_one_too_many(tmp_path: Path) -> None:
    report = check(tmp_path, numbers(400, 0), numbers(200, 1, 399), key="id")
    assert report.keys is not None and (report.keys.rows, report.keys.first) == (1, (0,))
    assert len(report.failures) == 1 and "have the key (id) of a training row" in report.failures[0]


def test_rows_of_every_chunk_are_seen_and_the_sample_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (chunks, snapshot_files, leakage):
        monkeypatch.setattr(module, "CHUNK_ROWS", 64)
    monkeypatch.setattr("components.data.statistics.CHUNK_ROWS", 64)
    monkeypatch.setattr("components.data.snapshot.CHUNK_ROWS", 64)
    monkeypatch.setattr(leakage, "SAMPLE_ROWS", 100)
    train, holdout = numbers(400, 0), numbers(200, 1, 400)
    for place in (0, 199):
        for name in ("x", "label"):
            holdout[name][place] = train[name][2 * place]
    report = check(tmp_path, train, holdout)
    assert report.duplicates.first == (0, 199)
    assert report.sample_rows == 100


def leaky(count: int, seed: int) -> dict[str, Any]:
    rows = numbers(count, seed)
    rng = np.random.default_rng(seed + 10)
    label = rows["label"]
    return {
        **rows,
        "near": label + 0.1 * rng.normal(size=count),
        "word": np.where(label == 1, *rng.choice(list("abcdefgh"), (2, count))),
        "code": np.where(label == 1, *(rng.choice(list(s), count) for s in ("aceg", "bdfh"))),
        "gap": np.where(label == 1, np.nan, rng.normal(size=count)),
        "outside": np.where(label == 1, rng.choice([-2.5, 2.5], count), 0) + rng.normal(size=count),
    }


def test_a_feature_that_knows_the_label_is_named_whatever_its_kind(tmp_path: Path) -> None:
    features = Features(
        label="label",
        classes=2,
        categorical=("word", "code"),
        numeric=("x", "near", "gap", "outside"),
    )
    report = check(tmp_path, leaky(600, 0), leaky(200, 1), features=features)
    scores = {one.column: one.roc_auc or 0.0 for one in report.features}
    assert scores["word"] < 0.7 and scores["x"] < 0.7
    assert min(scores["near"], scores["code"], scores["gap"]) > 0.99
    assert 0.8 < scores["outside"] < 0.99, "a tree sees what no order shows"
    assert [failure.split("'")[1] for failure in report.failures] == ["code", "near", "gap"]
    allowed = {"code": "known at booking", "near": "a", "gap": "b"}
    excused = check(tmp_path, leaky(600, 0), leaky(200, 1), features=features, allowed=allowed)
    assert excused.passed
    assert {one.column: one.allowed for one in excused.features if one.allowed} == allowed
    lower = check(tmp_path, leaky(600, 0), leaky(200, 1), features=features, single_feature_auc=0.8)
    assert len(lower.failures) == 4


def test_of_several_classes_all_must_be_known() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 1000).astype(np.int8)
    rows = pa.table({"all": label * 1.5, "one": (label == 3) * 1.0, "label": label})
    features = Features(label="label", classes=5, numeric=("all", "one"))
    scores, skipped = score_features(rows, features)
    assert scores["all"] == ("all", 1.0)
    assert scores["one"][1] < 0.8
    assert not skipped


def test_an_identity_is_no_knowledge() -> None:
    """Every value is new in the other half."""
    rows = pa.table(
        {"id": [f"row {n}" for n in range(400)], "label": pa.array(np.arange(400) // 2 % 2)}
    )
    scores, _ = score_features(rows, Features(label="label", classes=2, categorical=("id",)))
    assert scores["id"] == ("id", 0.5)


@pytest.mark.parametrize(("elements", "known"), [(ELEMENTS, True), (ELEMENTS + 1, False)])
def test_elements_of_tensors_are_features_unless_there_are_too_many(
    elements: int, known: bool
) -> None:
    label = np.arange(60) % 2
    values = np.random.default_rng(0).normal(size=(60, elements)).astype(np.float32)
    values[:, 200] = label
    image = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), elements)
    rows = pa.table({"image": image, "label": label})
    features = Features(label="label", classes=2, tensors={"image": (elements,)})
    scores, skipped = score_features(rows, features)
    if known:
        assert scores == {"image": ("image[200]", 1.0)} and skipped == {}
    else:
        assert scores == {} and skipped == {"image": "it has 257 elements, more than 256"}


def test_a_sample_of_one_label_is_said_to_be_none() -> None:
    rows = pa.table({"x": np.arange(10.0), "label": np.zeros(10, np.int8)})
    scores, skipped = score_features(rows, Features(label="label", classes=2, numeric=("x",)))
    assert scores == {} and "no class stands in both halves" in skipped["x"]


def test_a_rare_class_is_in_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature that knows it is found, though a fair sample would hold no row of it."""
    monkeypatch.setattr(leakage, "SAMPLE_ROWS", 500)
    train, holdout = numbers(20_000, 0), numbers(100, 1, 20_000)
    train["label"][:] = np.arange(20_000) % 2_000 == 7
    train["x"] += 9 * train["label"]
    report = check(tmp_path, train, holdout)
    assert report.sample_rows == 500
    assert "'x' does, with ROC-AUC" in report.failures[0]


def test_where_no_feature_can_be_scored_the_alarm_fails(tmp_path: Path) -> None:
    """The one row of the rare class stands in one half."""
    train, holdout = numbers(40, 0), numbers(40, 1, 40)
    train["label"][:] = np.arange(40) == 3
    report = check(tmp_path, train, holdout)
    (failure,) = report.failures
    assert not report.passed and "x cannot be looked at: of 40 training rows no class" in failure
    allowed = {"x": "looked at by hand"}
    assert check(tmp_path / "allowed", train, holdout, allowed=allowed).passed


def test_infinite_values_are_values() -> None:
    label = np.arange(40) % 2
    rows = pa.table({"x": np.where(label == 1, np.inf, -np.inf), "label": label})
    scores, _ = score_features(rows, Features(label="label", classes=2, numeric=("x",)))
    assert scores["x"] == ("x", 1.0)


EQUAL = [
    (pa.array([1, 2, None], pa.int32()), pa.array([1.0, 2.0, None], pa.float64())),
    (pa.array([1, 2], pa.int64()), pa.array([1.0, 2.0], pa.float32())),
    (pa.array([0.0, np.nan]), pa.array([-0.0, -np.nan])),
    (pa.array(["a", None, "b"]), pa.array(["a", None, "b"]).dictionary_encode()),
    (pa.array([7, None, 9]), pa.DictionaryArray.from_arrays([1, 0, 2], pa.array([None, 7, 9]))),
    (pa.array(["a", "b"]), pa.array(["a", "b"], pa.large_string()).dictionary_encode()),
    (pa.array([True, False]), pa.array([1, 0], pa.int8())),
    (pa.array([[1, 2]], pa.list_(pa.float32(), 2)), pa.array([[1, 2]], pa.list_(pa.float64(), 2))),
]


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=lambda array: str(array.type))
def test_equal_values_have_equal_hashes(one: pa.Array, other: pa.Array) -> None:
    first, second = (hash_rows(pa.table({"c": array}), ["c"]) for array in (one, other))
    assert first.tolist() == second.tolist()
    assert len(set(first.tolist())) == len(first)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**60 + n for n in range(50)], pa.int64()),
        pa.array([*range(-25, 25)], pa.int8()),
        pa.array([None, 0.0, 1.0, 2.0**-1074, np.inf, -np.inf, np.nan]),
        pa.array([None, "", "0", "1", "null", "\u0000"]),
        pa.array([date(2014, 1, day) for day in range(1, 32)]),
        pa.array([None, [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], pa.list_(pa.float32(), 2)),
        pa.array([None, [], [0], [0, 0]], pa.list_(pa.int8())),
    ],
    ids=lambda array: str(array.type),
)
def test_different_values_have_different_hashes(values: pa.Array) -> None:
    hashes = hash_rows(pa.table({"c": values}), ["c"])
    assert len(set(hashes.tolist())) == len(values)


def test_the_place_of_a_value_counts() -> None:
    rows = pa.table({"a": [1, 2, 1], "b": [2, 1, 2]})
    one, other, again = hash_rows(rows, ["a", "b"]).tolist()
    assert one == again != other
    assert hash_rows(rows, ["b", "a"]).tolist()[0] != one


@pytest.mark.parametrize(
    ("alarms", "words"),
    [
        ({"single_feature_auc": 0.5}, "above 0.5 and at most 1, got 0.5"),
        ({"single_feature_auc": 1.01}, "above 0.5 and at most 1, got 1.01"),
        ({"duplicate_share": 1.0}, "below 1, got 1.0"),
        ({"duplicate_share": -0.1}, r">= 0 and below 1, got -0\.1"),
        ({"allowed": {"image": " "}}, "must give a reason; image has none"),
    ],
)
def test_alarms_that_cannot_go_off_are_refused(alarms: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LeakageAlarms(**alarms)


def test_an_allowance_for_a_column_that_is_not_read_is_refused() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="'digits': leakage.allowed must name features; got lost"):
        replace(digits, leakage=LeakageAlarms(allowed={"lost": "it was there once"}))
