"""Rows that are given as tables or arrays."""

from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.data.memory import ArraySource
from components.data.schema import RowSchema
from components.errors import DataError

DAY = date(2014, 1, 1)
SCHEMA = RowSchema(
    pa.schema(
        [
            pa.field("x", pa.float64()),
            pa.field("word", pa.string()),
            pa.field("image", pa.list_(pa.float32(), 2)),
            pa.field("label", pa.int64(), nullable=False),
        ]
    )
)


def arrays(rows: int) -> dict[str, Any]:
    return {
        "x": np.linspace(0, 1, rows, dtype=np.float32),
        "label": np.arange(rows) % 2,
        "word": np.array(["a", "bc"] * rows)[:rows],
        "image": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2),
        "extra": np.zeros(rows),
    }


def test_arrays_become_the_declared_columns() -> None:
    source = ArraySource(arrays(6), arrays(3), SCHEMA)
    source.prepare()
    assert source.schema() is SCHEMA
    assert source.window(DAY) == "train 6 rows, hold out 3"
    assert source.excluded(DAY) == {}
    table = pa.Table.from_batches(source.batches("train", DAY))
    assert table.schema.equals(SCHEMA.arrow)
    assert table.column("word").to_pylist() == ["a", "bc"] * 3
    assert table.column("image").to_pylist() == [[2.0 * i, 2.0 * i + 1] for i in range(6)]
    np.testing.assert_array_equal(table.column("x").to_numpy(), arrays(6)["x"])


def test_a_table_gives_its_rows_at_every_date() -> None:
    table = pa.Table.from_pylist([{"x": None, "word": "é", "image": [1, 2], "label": 3}])
    table = table.set_column(2, "image", table.column("image").cast(pa.list_(pa.float32())))
    source = ArraySource(table, arrays(2), SCHEMA)
    for day in (DAY, date(1999, 1, 1)):
        (batch,) = source.batches("train", day)
        assert batch.to_pylist() == [{"x": None, "word": "é", "image": [1.0, 2.0], "label": 3}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": np.zeros(6, np.float32)}, "'label' must be int64; found float"),
        ({"label": np.zeros(5, np.int64)}, "equally many rows.*label: 5"),
        ({"x": np.zeros((6, 2, 2))}, "numbers, text, dates or booleans"),
        ({"word": np.array([1, "a", None, 2, 3, 4], object)}, "numbers, text, dates or booleans"),
        ({"image": np.zeros((6, 3), np.float32)}, "'image' must be"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    source = ArraySource({**arrays(6), **change}, arrays(3), SCHEMA)
    with pytest.raises(DataError, match=words) as caught:
        list(source.batches("train", DAY))
    assert "the train rows given to ArraySource" in str(caught.value)


def test_a_missing_column_is_named() -> None:
    rows = {name: array for name, array in arrays(3).items() if name != "x"}
    with pytest.raises(DataError, match="'x' is there 0 times"):
        list(ArraySource(arrays(6), rows, SCHEMA).batches("holdout", DAY))


def test_an_empty_split_is_refused() -> None:
    source = ArraySource(arrays(6), arrays(0), SCHEMA)
    with pytest.raises(DataError, match="the holdout split must have rows"):
        list(source.batches("holdout", DAY))
