"""Casting: what keeps every value is taken, everything else is refused by name."""

import math
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.data.cast import conform, from_rows, widens
from components.errors import DataError


def schema(kind: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field("x", kind)])


@pytest.mark.parametrize(
    ("found", "declared"),
    [
        (pa.int8(), pa.int64()),
        (pa.uint8(), pa.int16()),
        (pa.int16(), pa.float32()),
        (pa.int32(), pa.float64()),
        (pa.float32(), pa.float64()),
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string()),
        (pa.dictionary(pa.int32(), pa.int8()), pa.int16()),
        (pa.null(), pa.float32()),
        (pa.decimal128(5, 2), pa.decimal128(9, 3)),
        (pa.list_(pa.float32()), pa.list_(pa.float64(), 2)),
        (pa.timestamp("ms", "UTC"), pa.timestamp("us", "Europe/Berlin")),
    ],
    ids=str,
)
def test_a_type_that_holds_every_value_is_taken(found: pa.DataType, declared: pa.DataType) -> None:
    assert widens(found, declared)
    empty = pa.record_batch([pa.array([], found)], names=["x"])
    assert conform(empty, schema(declared), "here").schema.equals(schema(declared))


@pytest.mark.parametrize(
    ("found", "declared"),
    [
        (pa.int64(), pa.int32()),
        (pa.int8(), pa.uint8()),
        (pa.uint32(), pa.int32()),
        (pa.int32(), pa.float32()),
        (pa.int64(), pa.float64()),
        (pa.float64(), pa.float32()),
        (pa.float32(), pa.int32()),
        (pa.string(), pa.date32()),
        (pa.string(), pa.float32()),
        (pa.int8(), pa.string()),
        (pa.bool_(), pa.int8()),
        (pa.date32(), pa.timestamp("us")),
        (pa.timestamp("us"), pa.timestamp("us", "UTC")),
        (pa.decimal128(9, 3), pa.decimal128(9, 2)),
        (pa.dictionary(pa.int8(), pa.string()), pa.int8()),
        (pa.list_(pa.float64()), pa.list_(pa.float32(), 2)),
    ],
    ids=str,
)
def test_every_other_type_is_refused_with_both_named(
    found: pa.DataType, declared: pa.DataType
) -> None:
    empty = pa.record_batch([pa.array([], found)], names=["x"])
    with pytest.raises(DataError) as caught:
        conform(empty, schema(declared), "part-7.parquet")
    assert f"part-7.parquet: 'x' must be {declared}; found {found}" in str(caught.value)


def test_values_survive_and_columns_are_put_in_order() -> None:
    words = pa.array(["a", None, "b"]).dictionary_encode()
    batch = pa.record_batch(
        {"extra": [1, 2, 3], "w": words, "n": pa.array([1, None, 3], pa.int8())}
    )
    declared = pa.schema([pa.field("n", pa.float32()), pa.field("w", pa.string())])
    found = conform(batch, declared, "here")
    assert found.schema.equals(declared)
    assert found.to_pydict() == {"n": [1.0, None, 3.0], "w": ["a", None, "b"]}


def test_all_differences_are_told_at_once() -> None:
    batch = pa.record_batch([pa.array([1]), pa.array([1]), pa.array(["x"])], names=["a", "a", "b"])
    declared = pa.schema([pa.field(n, pa.int8()) for n in "abc"])
    with pytest.raises(DataError) as caught:
        conform(batch, declared, "here")
    message = str(caught.value)
    for words in ("'a' is there 2 times", "'b' must be int8; found string", "'c' is there 0 times"):
        assert words in message


@pytest.mark.parametrize(
    ("column", "declared"),
    [
        (pa.array([1_500], pa.timestamp("ms")), pa.timestamp("s")),
        (pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32())), pa.list_(pa.float32(), 2)),
    ],
)
def test_a_value_that_would_change_is_refused(column: pa.Array, declared: pa.DataType) -> None:
    with pytest.raises(DataError, match="in here: 'x' must be"):
        conform(pa.record_batch([column], names=["x"]), schema(declared), "here")


NOON = datetime(2013, 7, 1, 12, 30, 15, 250)  # noqa: DTZ001


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, 127], pa.int8(), [1, None, 127]),
        ([0, 1, None], pa.bool_(), [False, True, None]),
        ([True, None], pa.bool_(), [True, None]),
        ([3, None, -4], pa.float32(), [3.0, None, -4.0]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([20_000_000], pa.float32(), [2e7]),
        ([Decimal("2.50"), None, Decimal("NaN")], pa.float64(), [2.5, None, math.nan]),
        ([Decimal("2.50")], pa.decimal128(5, 3), [Decimal("2.500")]),
        (["2013-07-01", None], pa.date32(), [date(2013, 7, 1), None]),
        ([date(2013, 7, 1)], pa.date32(), [date(2013, 7, 1)]),
        (["2013-07-01 12:30:15.000250"], pa.timestamp("us"), [NOON]),
        ([NOON], pa.timestamp("us"), [NOON]),
        (["2013-07-01T12:30:15.000250Z"], pa.timestamp("us", "UTC"), [NOON.replace(tzinfo=UTC)]),
        (["a", "", None], pa.string(), ["a", "", None]),
        ([[1.0, 2.0], None], pa.list_(pa.float32(), 2), [[1.0, 2.0], None]),
        ([None, None], pa.float32(), [None, None]),
        ([b"\x00"], pa.binary(), [b"\x00"]),
    ],
)
def test_python_values_become_the_declared_type(
    values: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    batch = from_rows([(value,) for value in values], schema(kind), "here")
    assert batch.schema.equals(schema(kind))
    np.testing.assert_equal(batch.column("x").to_pylist(), expected)


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ([300], pa.int8(), "found int such as 300"),
        ([-1], pa.uint8(), "found int such as -1"),
        ([1.5], pa.int32(), "found float such as 1.5"),
        ([1.0], pa.int32(), "found float"),
        ([Decimal(1)], pa.int32(), "found Decimal"),
        ([2], pa.bool_(), "only 0 and 1"),
        ([True], pa.int8(), "found bool"),
        ([16_777_217], pa.float32(), "too long to be exact"),
        ([2**53 + 1], pa.float64(), "too long to be exact"),
        ([1e300], pa.float32(), "too large"),
        (["1"], pa.float32(), "found str such as '1'"),
        ([1], pa.string(), "found int"),
        ([1, "a"], pa.int32(), "found int such as 1, str such as 'a'"),
        (["7/1/2013"], pa.date32(), "Failed to parse string: '7/1/2013'"),
        (["2013-07-01 10:00:00"], pa.date32(), "Failed to parse"),
        ([NOON], pa.date32(), "found datetime such as 2013-07-01T12:30:15.000250"),
        ([date(2013, 7, 1), NOON], pa.date32(), "found date such as 2013-07-01, datetime"),
        ([NOON], pa.timestamp("s"), "would lose data"),
        ([NOON], pa.timestamp("us", "UTC"), "found datetime"),
        (["2013-07-01 10:00:00"], pa.timestamp("us", "UTC"), "expected a zone offset"),
        ([[1.0]], pa.list_(pa.float32(), 2), "found list"),
    ],
)
def test_other_python_values_are_refused(values: list[Any], kind: pa.DataType, words: str) -> None:
    with pytest.raises(DataError, match="in rows 1 to 9 of table t: 'x' must be") as caught:
        from_rows([(value,) for value in values], schema(kind), "rows 1 to 9 of table t")
    assert words in str(caught.value)


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(DataError) as caught:
        from_rows([("y" * 500,)], schema(pa.int8()), "here")
    assert "y" * 30 + "y" * 6 + "..." in str(caught.value)
    assert "y" * 50 not in str(caught.value)


def test_every_float32_survives_as_a_double() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    batch = from_rows([(float(x),) for x in numbers], schema(pa.float32()), "here")
    np.testing.assert_array_equal(batch.column("x").to_numpy(), numbers)


def test_no_rows_are_a_batch_without_rows() -> None:
    assert from_rows([], schema(pa.int8()), "here").num_rows == 0
