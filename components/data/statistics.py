"""Statistics of columns, gathered chunk by chunk in bounded memory.

Means and variances follow Chan, Golub and LeVeque's parallel update, in float64. Quantiles are
exact up to :data:`SAMPLE_ROWS` rows; beyond, they come from a uniform sample of rows: a row is kept
while its pseudo-random priority, a function of its place alone, lies below a threshold that halves
whenever the sample overflows. So equal rows give equal statistics, on every machine.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from components.data.chunks import CHUNK_ROWS, rechunk

QUANTILES = 9
"""Quantiles per numeric column, from the minimum to the maximum."""
BINS = 24
"""Bins of a histogram."""
SAMPLE_ROWS = 524_288
"""Rows up to which quantiles are exact, and at most so many make the sample beyond."""
DISTINCT_VALUES = 100_000
"""Distinct values that are counted per column."""
DISTINCT_BYTES = 1 << 26
"""Memory that the distinct values of a column may take."""

_RANKS = 1 << 32


class Frozen(BaseModel):
    """A frozen JSON value; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Numbers(Frozen):
    """Finite values of a column as float32, summed up in float64.

    ``std`` is that of the population. ``quantiles`` are strictly increasing; a column with few
    distinct values has fewer of them, and a constant one has two. ``histogram`` has the shares of
    values in bins of equal width from the minimum to the maximum.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    quantiles: tuple[float, ...]
    histogram: tuple[float, ...]


class ColumnStatistics(Frozen):
    """One column.

    Args:
        kind: Arrow's name of the type.
        count: Values that are there.
        missing: Values that are not.
        non_finite: Values that are NaN or infinite; None where the column holds no numbers.
        numbers: None where there is no finite value.
        values: How often each distinct value stands there, as a string; None where that is not
            counted, and empty where there are too many.
        overflown: Whether there are too many distinct values to count them.
    """

    kind: str
    count: int
    missing: int
    non_finite: int | None = None
    numbers: Numbers | None = None
    values: Mapping[str, int] | None = None
    overflown: bool = False


class Statistics(Frozen):
    """Columns of a split, by name."""

    rows: int
    columns: Mapping[str, ColumnStatistics]


def describe(table: pa.Table) -> Statistics:
    """Statistics of a table, the same however it is cut."""
    gathering = StatisticsBuilder(table.schema)
    for chunk in rechunk(table.to_batches(), table.schema):
        gathering.add(chunk)
    return gathering.finish()


class StatisticsBuilder:
    """Gathers statistics of consecutive chunks; each but the last has ``CHUNK_ROWS`` rows.

    Args:
        schema: Columns of every chunk.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows = 0
        self._missing = dict.fromkeys(schema.names, 0)
        self._moments = {f.name: _Moments() for f in schema if is_number(f.type)}
        self._distinct = {f.name: _Distinct() for f in schema if is_countable(f.type)}
        self._sample = _Sample(tuple(self._moments))

    def add(self, chunk: pa.Table) -> None:
        """Take in the next chunk."""
        assert self._rows % CHUNK_ROWS == 0, "only the last chunk may be short"
        numbers = {}
        for name in self._schema.names:
            column = chunk.column(name).combine_chunks()
            self._missing[name] += column.null_count
            if name in self._moments:
                numbers[name] = as_floats(column)
                self._moments[name].add(numbers[name], column.null_count)
            if name in self._distinct:
                self._distinct[name].add(column)
        self._sample.add(self._rows // CHUNK_ROWS, chunk.num_rows, numbers)
        self._rows += chunk.num_rows

    def finish(self) -> Statistics:
        """The statistics of all chunks so far."""
        return Statistics(
            rows=self._rows, columns={field.name: self._column(field) for field in self._schema}
        )

    def _column(self, field: pa.Field) -> ColumnStatistics:
        moments, distinct = self._moments.get(field.name), self._distinct.get(field.name)
        return ColumnStatistics(
            kind=str(field.type),
            count=self._rows - self._missing[field.name],
            missing=self._missing[field.name],
            non_finite=moments.non_finite if moments else None,
            numbers=moments.finish(self._sample.values(field.name)) if moments else None,
            values=distinct.finish() if distinct else None,
            overflown=distinct.overflown if distinct else False,
        )


def is_number(kind: pa.DataType) -> bool:
    """Whether values of a type can be summed up as numbers."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(test(kind) for test in tests)


def is_countable(kind: pa.DataType) -> bool:
    """Whether the distinct values of a type are counted."""
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_dictionary,
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_date,
    )
    return any(test(kind) for test in tests)


def as_floats(column: pa.Array) -> npt.NDArray[np.float32]:
    """Numbers as float32, rounded where they have more digits; a missing one is NaN.

    Raises:
        ArrowException: The column does not hold numbers.
    """
    floats = column.cast(pa.float32(), safe=False).fill_null(math.nan)
    numbers: npt.NDArray[np.float32] = floats.to_numpy(zero_copy_only=False)
    return numbers


class _Moments:
    """Count, mean, squared deviations, minimum and maximum of finite values."""

    def __init__(self) -> None:
        self.non_finite = 0
        self._count = 0
        self._mean = self._squares = 0.0
        self._minimum, self._maximum = math.inf, -math.inf

    def add(self, numbers: npt.NDArray[np.float32], missing: int) -> None:
        finite = numbers[np.isfinite(numbers)].astype(np.float64)
        self.non_finite += numbers.size - missing - finite.size
        if not finite.size:
            return
        mean = float(finite.mean())
        total, apart = self._count + finite.size, mean - self._mean
        self._squares += float(np.square(finite - mean).sum())
        self._squares += apart * apart * self._count * finite.size / total
        self._mean += apart * finite.size / total
        self._count = total
        self._minimum = min(self._minimum, float(finite.min()))
        self._maximum = max(self._maximum, float(finite.max()))

    def finish(self, sample: npt.NDArray[np.float32]) -> Numbers | None:
        if not self._count:
            return None
        ends = np.array([self._minimum, self._maximum])
        inside = sample[np.isfinite(sample)].astype(np.float64)
        if inside.size != self._count:  # a sample may lack the ends
            inside = np.r_[inside, ends]
        shares = np.histogram(inside, bins=BINS, range=tuple(ends))[0] / inside.size
        return Numbers(
            mean=self._mean,
            std=math.sqrt(self._squares / self._count),
            minimum=self._minimum,
            maximum=self._maximum,
            quantiles=strict_quantiles(inside),
            histogram=tuple(float(share) for share in shares),
        )


def strict_quantiles(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Strictly increasing quantiles of finite values, the first the minimum, the last the maximum.

    A constant column has two, its value and one more.
    """
    ordered = np.sort(values)
    shares = np.linspace(0, 1, QUANTILES)
    edges = np.unique(np.quantile(ordered, shares))
    if len(edges) < QUANTILES:  # ties: spread the edges over the distinct values instead
        distinct = ordered[np.r_[True, ordered[1:] != ordered[:-1]]]
        edges = np.unique(np.r_[edges, np.quantile(distinct, shares)])
    if len(edges) == 1:
        edges = np.r_[edges, edges + 1.0]
    return tuple(float(edge) for edge in edges)


class _Sample:
    """A uniform sample of rows, the numbers of each kept as float32."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._ranks: list[npt.NDArray[np.uint64]] = []
        self._kept: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
        self._rows = 0
        self._threshold = _RANKS

    def add(self, chunk: int, rows: int, numbers: Mapping[str, npt.NDArray[np.float32]]) -> None:
        if not numbers:
            return
        ranks = np.random.Philox(key=chunk).random_raw(rows) >> np.uint64(32)
        keep = np.flatnonzero(ranks < self._threshold)
        self._ranks.append(ranks[keep])
        for name, values in numbers.items():
            self._kept[name].append(values[keep])
        self._rows += len(keep)
        while self._rows > SAMPLE_ROWS:
            self._halve()

    def _halve(self) -> None:
        self._threshold //= 2
        ranks = np.concatenate(self._ranks)
        keep = np.flatnonzero(ranks < self._threshold)
        self._ranks, self._rows = [ranks[keep]], len(keep)
        for name, parts in self._kept.items():
            self._kept[name] = [np.concatenate(parts)[keep]]

    def values(self, name: str) -> npt.NDArray[np.float32]:
        parts = self._kept[name]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)


class _Distinct:
    """Counts of distinct values, until there are too many."""

    def __init__(self) -> None:
        self.overflown = False
        self._counts: list[pa.Table] = []

    def add(self, column: pa.Array) -> None:
        if self.overflown:
            return
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        counted = pc.value_counts(column.drop_null())
        self._counts.append(
            pa.table({"value": counted.field("values"), "count": counted.field("counts")})
        )
        if sum(len(part) for part in self._counts) > 2 * DISTINCT_VALUES or self._is_large():
            self._merge()

    def _is_large(self) -> bool:
        return bool(sum(part.nbytes for part in self._counts) > DISTINCT_BYTES)

    def _merge(self) -> None:
        merged = (
            pa.concat_tables(self._counts)
            .group_by("value", use_threads=False)
            .aggregate([("count", "sum")])
            .rename_columns(["value", "count"])
        )
        self._counts = [merged]
        if len(merged) > DISTINCT_VALUES or self._is_large():
            self.overflown, self._counts = True, []

    def finish(self) -> dict[str, int]:
        if self._counts:
            self._merge()
        if not self._counts:
            return {}
        (merged,) = self._counts
        words: list[Any] = merged.column("value").cast(pa.string()).to_pylist()
        return dict(sorted(zip(words, merged.column("count").to_pylist(), strict=True)))
