"""Statistics in bounded memory, against numpy on all rows at once."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.listed_rows import DAY, made_up

from components.data import statistics as module
from components.data.chunks import CHUNK_ROWS
from components.data.encoding import Features, fit_encoding
from components.data.flights import FlightsSource
from components.data.statistics import (
    BINS,
    DISTINCT_VALUES,
    QUANTILES,
    SAMPLE_ROWS,
    Statistics,
    StatisticsBuilder,
    describe,
)
from components.errors import DataError


def described(values: Any, kind: pa.DataType | None = None) -> Any:
    array = values if isinstance(values, pa.Array) else pa.array(values, kind)
    return describe(pa.table({"x": array})).columns["x"]


def test_real_flights_agree_with_numpy(whole_year: Path) -> None:
    source = FlightsSource(whole_year)
    rows = pa.Table.from_batches(source.batches("train", DAY))
    found = describe(rows)
    numbers = [f.name for f in rows.schema if pa.types.is_float32(f.type)]
    assert len(numbers) > 10
    for name in numbers:
        column = rows.column(name)
        values = column.to_numpy().astype(np.float64)
        values = values[np.isfinite(values)]
        numeric = found.columns[name].numbers
        assert numeric is not None
        wanted = (values.mean(), values.std(), values.min(), values.max())
        got = (numeric.mean, numeric.std, numeric.minimum, numeric.maximum)
        np.testing.assert_allclose(got, wanted, rtol=1e-9)
        edges = np.unique(np.quantile(values, np.linspace(0, 1, QUANTILES)))
        assert set(edges) <= set(numeric.quantiles), name
        assert found.columns[name].missing == column.null_count
    names, counts = np.unique(rows.column("carrier").to_numpy(), return_counts=True)
    assert found.columns["carrier"].values == dict(zip(names, counts.tolist(), strict=True))


@pytest.mark.parametrize("size", [1, 999, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 10**6])
def test_batches_make_no_difference(size: int) -> None:
    rows = made_up(2 * CHUNK_ROWS + 5 if size > 1 else 300)
    cut = pa.Table.from_batches(rows.to_batches(size), schema=rows.schema)
    assert describe(cut) == describe(rows)


def test_the_parallel_update_keeps_its_digits() -> None:
    values = np.float32(1e6) + np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    numbers = described(values).numbers
    exact = values.astype(np.float64)
    np.testing.assert_allclose((numbers.mean, numbers.std), (exact.mean(), exact.std()), rtol=1e-12)


def test_what_is_missing_and_what_is_not_finite_is_counted() -> None:
    column = described([1.0, math.inf, 3.0, math.nan, None, -math.inf], pa.float32())
    assert (column.count, column.missing, column.non_finite) == (5, 1, 3)
    assert (column.numbers.mean, column.numbers.std) == (2.0, 1.0)
    assert described([None, math.nan], pa.float32()).numbers is None


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        (pa.array([3, 1, None, 3], pa.int64()), {"1": 1, "3": 2}),
        (pa.array([True, None, False, True]), {"false": 1, "true": 2}),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), {"a": 1, "b": 2}),
        (pa.array(["b", ""], pa.large_string()), {"": 1, "b": 1}),
        (pa.array([0, 1], pa.date32()), {"1970-01-01": 1, "1970-01-02": 1}),
        (pa.array([1.5, 2.5], pa.float32()), None),
        (pa.array([[1.0, 2.0]] * 2, pa.list_(pa.float32(), 2)), None),
    ],
)
def test_distinct_values_are_counted_as_strings(values: pa.Array, counts: Any) -> None:
    column = described(values)
    assert column.values == counts
    if counts:
        assert list(column.values) == sorted(counts)


def test_a_list_has_a_count_only() -> None:
    column = described([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    assert (column.count, column.missing, column.numbers, column.non_finite) == (1, 1, None, None)


def test_too_many_distinct_values_overflow() -> None:
    numbers = np.arange(DISTINCT_VALUES + 1)
    full = described(np.r_[numbers[:-1], numbers[:-1]])
    assert len(full.values) == DISTINCT_VALUES
    assert set(full.values.values()) == {2}
    assert not full.overflown
    over = described(numbers)
    assert (over.overflown, over.values) == (True, {})
    assert over.numbers is not None


def test_long_values_overflow_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISTINCT_BYTES", 10_000)
    assert described([f"{i:0200d}" for i in range(100)]).overflown
    assert not described(["x" * 200] * 1000).overflown


def test_quantiles_are_exact_up_to_the_limit_and_then_sampled() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=3 * SAMPLE_ROWS).astype(np.float32)
    shares = np.linspace(0, 1, QUANTILES)
    exact = described(values[:SAMPLE_ROWS]).numbers
    np.testing.assert_array_equal(
        exact.quantiles, np.quantile(values[:SAMPLE_ROWS].astype(np.float64), shares)
    )
    sampled = described(values).numbers
    assert (sampled.quantiles[0], sampled.quantiles[-1]) == (values.min(), values.max())
    ranks = np.searchsorted(np.sort(values), sampled.quantiles) / len(values)
    assert np.abs(ranks - shares).max() < 0.005, "within what a sample of 400,000 allows"
    assert not np.array_equal(sampled.quantiles, np.quantile(values.astype(np.float64), shares))
    assert described(values) == described(values)


def test_a_sample_is_uniform_and_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_ROWS", 1000)
    rows = pa.table({"x": np.arange(10 * CHUNK_ROWS, dtype=np.float32)})
    gathering = StatisticsBuilder(rows.schema)
    for start in range(0, len(rows), CHUNK_ROWS):
        gathering.add(rows.slice(start, CHUNK_ROWS))
        kept = gathering._sample.values("x")
        assert len(kept) <= 1000
    assert len(kept) > 400
    shares = np.histogram(kept, bins=10)[0] / len(kept)
    assert np.abs(shares - 0.1).max() < 0.05, "every chunk has its share"


def test_the_histogram_holds_every_value_once() -> None:
    values = np.r_[np.zeros(90), np.arange(10)].astype(np.float32)
    histogram = described(values).numbers.histogram
    np.testing.assert_allclose(histogram, np.histogram(values, BINS)[0] / 100)
    assert sum(described([5.0] * 3, pa.float32()).numbers.histogram) == pytest.approx(1)


def test_statistics_survive_json() -> None:
    found = describe(made_up(100))
    assert Statistics.model_validate_json(found.model_dump_json()) == found


def test_no_rows_have_statistics_too() -> None:
    found = describe(made_up(0))
    assert found.rows == 0
    assert found.columns["number"].numbers is None


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (Features(label="label", classes=2, categorical=("number",)), "'number' must hold strings"),
        (
            Features(label="label", classes=2, numeric=("word",)),
            "'word' must hold numbers; got str",
        ),
        (Features(label="label", classes=2, categorical=("id",)), "'id' must have at most 100,000"),
        (Features(label="label", classes=2, tensors={"x": (2,)}), "'x' must be present"),
    ],
)
def test_a_column_that_cannot_be_encoded_is_named(features: Features, words: str) -> None:
    rows = made_up(DISTINCT_VALUES + 1)
    with pytest.raises(DataError, match=words):
        fit_encoding(features, describe(rows))
