"""Loading rows and fingerprinting them: what must change the fingerprint, and what must not."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pytest

from components.contract import DataSource, Split
from components.data.encoding import Features
from components.data.flights import FlightsSource
from components.data.rows import load_dataset, load_rows
from components.data.schema import RowSchema
from components.errors import DataError

DAY = date(2014, 1, 1)
SCHEMA = pa.schema(
    [
        pa.field("word", pa.string()),
        pa.field("number", pa.float32()),
        pa.field("day", pa.date32(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
    ]
)
FEATURES = Features(label="label", classes=2, categorical=("word",), numeric=("number",))
Row = tuple[str | None, float | None, date, int | None]
ROWS: tuple[Row, ...] = tuple(
    (
        None if i % 7 == 0 else f"w{i % 5}",
        None if i % 11 == 0 else i / 3,
        date(2013, 1, 1 + i),
        i % 2,
    )
    for i in range(30)
)


@final
class Listed(DataSource):
    """Rows given as tuples, in batches of a chosen size, the first ``boundary`` for training."""

    def __init__(
        self,
        rows: Sequence[Row] = ROWS,
        *,
        boundary: int = 20,
        chunk: int = 100,
        schema: pa.Schema = SCHEMA,
        declared: pa.Schema = SCHEMA,
    ) -> None:
        self._rows = {"train": rows[:boundary], "holdout": rows[boundary:]}
        self._chunk, self._schema, self._declared = chunk, schema, declared

    def schema(self) -> RowSchema:
        return RowSchema(self._declared)

    def prepare(self) -> None:
        pass

    def window(self, as_of: date) -> str:
        return "the listed rows"

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        rows = self._rows[split]
        for start in range(0, len(rows), self._chunk):
            columns: list[Any] = list(zip(*rows[start : start + self._chunk], strict=True))
            arrays = [
                pa.array(column, field.type)
                for column, field in zip(columns, self._schema, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def excluded(self, as_of: date) -> Mapping[str, int]:
        return {}


def fingerprint(*args: Any, **kwargs: Any) -> str:
    return load_dataset(Listed(*args, **kwargs), DAY, FEATURES).fingerprint


def changed(place: int, column: int, value: object) -> list[Row]:
    """The rows with one value replaced."""
    rows: list[Any] = [list(row) for row in ROWS]
    assert rows[place][column] != value
    rows[place][column] = value
    return [tuple(row) for row in rows]


def test_a_dataset_holds_both_splits_in_order() -> None:
    data = load_dataset(Listed(chunk=7), DAY, FEATURES)
    assert data.train.num_rows == 20
    assert data.holdout.column("day").to_pylist() == [row[2] for row in ROWS[20:]]


@pytest.mark.parametrize("chunk", [1, 3, 7, 19, 20])
def test_the_fingerprint_does_not_see_batches(chunk: int) -> None:
    assert fingerprint(chunk=chunk) == fingerprint()


@pytest.mark.parametrize(
    "rows",
    [
        changed(3, 0, "w9"),
        changed(3, 0, None),
        changed(0, 0, ""),  # was missing: an empty word is not a missing one
        changed(29, 1, 9.6666),
        changed(0, 1, 0.0),  # was missing: zero is not missing
        changed(5, 2, date(2012, 1, 1)),
        changed(29, 3, 0),
        [ROWS[1], ROWS[0], *ROWS[2:]],
        [*ROWS[:-2], ROWS[-1], ROWS[-2]],
        ROWS[:-1],
        [*ROWS, ROWS[-1]],
    ],
    ids=lambda rows: None,
)
def test_the_fingerprint_sees_every_value_and_the_order(rows: list[Row]) -> None:
    assert fingerprint(rows) != fingerprint()


def test_the_fingerprint_sees_the_boundary_between_the_splits() -> None:
    assert len({fingerprint(boundary=boundary) for boundary in (19, 20, 21)}) == 3


def test_the_fingerprint_sees_where_a_word_ends() -> None:
    words = [(ROWS[0][:0] + ("ab",) + ROWS[0][1:]), (("c",) + ROWS[1][1:]), *ROWS[2:]]
    other = [(("a",) + ROWS[0][1:]), (("bc",) + ROWS[1][1:]), *ROWS[2:]]
    assert fingerprint(words) != fingerprint(other)


def test_the_fingerprint_sees_names_and_types() -> None:
    renamed = SCHEMA.set(0, SCHEMA.field(0).with_name("name"))
    wider = SCHEMA.set(3, SCHEMA.field(3).with_type(pa.int16()))
    features = Features(label="label", classes=2)
    known = {
        load_dataset(Listed(schema=schema, declared=schema), DAY, features).fingerprint
        for schema in (SCHEMA, renamed, wider)
    }
    assert len(known) == 3


def test_a_second_preparation_gives_the_same_fingerprint(
    sampled: Path, sampled_origin: Path, tmp_path: Path
) -> None:
    features = Features(label="late", classes=2, categorical=("carrier",), numeric=("temp",))
    first = load_dataset(FlightsSource(sampled), DAY, features)
    second = load_dataset(FlightsSource(tmp_path / "flights", sampled_origin), DAY, features)
    assert first.fingerprint == second.fingerprint
    assert first.train.equals(second.train)
    earlier = load_dataset(FlightsSource(sampled), date(2013, 7, 1), features)
    assert earlier.fingerprint != first.fingerprint


def test_a_changed_origin_changes_the_fingerprint(
    sampled: Path, origin: Path, tmp_path: Path, edit_flights: Callable[[Path, bytes, bytes], None]
) -> None:
    features = Features(label="late", classes=2)
    edit_flights(origin, b",EWR,", b",JFK,")
    changed = load_dataset(FlightsSource(tmp_path / "flights", origin), DAY, features)
    assert changed.fingerprint != load_dataset(FlightsSource(sampled), DAY, features).fingerprint


def test_a_dataset_is_prepared_when_it_is_loaded(sampled_origin: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flights"
    load_dataset(FlightsSource(folder, sampled_origin), DAY, Features(label="late", classes=2))
    shutil.rmtree(folder)


def test_missing_feature_columns_are_named_together() -> None:
    features = Features(label="verdict", classes=2, categorical=("word", "colour"))
    with pytest.raises(DataError, match=r"missing: colour, verdict; present: word, number"):
        load_rows(Listed(), "train", DAY, features)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (SCHEMA.set(1, pa.field("number", pa.float64())), "'number' must be float; got double"),
        (SCHEMA.set(1, pa.field("weight", pa.float32())), "'weight' is not declared"),
        (SCHEMA.set(3, pa.field("label", pa.int8())), "nullability or order differs"),
    ],
)
def test_rows_of_another_schema_are_refused(schema: pa.Schema, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_rows(Listed(schema=schema), "train", DAY, FEATURES)


def test_columns_in_another_order_are_refused() -> None:
    rows: list[Any] = [row[::-1] for row in ROWS]
    with pytest.raises(DataError, match="nullability or order differs"):
        load_rows(Listed(rows, schema=pa.schema(list(SCHEMA)[::-1])), "train", DAY, FEATURES)


def test_a_null_where_none_is_allowed_is_counted() -> None:
    rows = changed(2, 3, None)
    with pytest.raises(DataError, match="label: 1 of 20 missing"):
        load_rows(Listed(rows), "train", DAY, FEATURES)
    assert load_rows(Listed(rows), "holdout", DAY, FEATURES).num_rows == 10


@pytest.mark.parametrize("boundary", [0, len(ROWS)])
def test_an_empty_split_is_refused(boundary: int) -> None:
    split = "holdout" if boundary else "train"
    with pytest.raises(DataError, match=f"the {split} split of the listed rows must have rows"):
        load_dataset(Listed(boundary=boundary), DAY, FEATURES)
