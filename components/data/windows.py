"""Which rows a run at ``as_of`` trains on, and which it holds out.

A window turns a split into a selection: a half-open interval of dates on a time column, which a
source may push down to its storage, or a rule on row numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from fractions import Fraction as Ratio
from typing import final
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.contract import Split
from components.errors import ContractError, DataError

_DAY = timedelta(days=1)


@final
@dataclass(frozen=True)
class Interval:
    """Rows whose ``column`` lies from ``start`` up to, not including, ``end``.

    Args:
        column: A date or a timestamp; days begin at midnight of the column's time zone.
        start: The first day; None takes everything before ``end``.
        end: The day after the last.
    """

    column: str
    start: date | None
    end: date

    def bounds(self, kind: pa.DataType) -> tuple[pa.Scalar | None, pa.Scalar]:
        """Both ends as scalars of the column's type."""
        start = None if self.start is None else pa.scalar(midnight(self.start, kind), kind)
        return start, pa.scalar(midnight(self.end, kind), kind)

    def expression(self, kind: pa.DataType) -> pc.Expression:
        """The rows, and those whose time is missing: these are somebody's mistake, not nobody's."""
        field, (start, end) = pc.field(self.column), self.bounds(kind)
        inside = field < end
        if start is not None:
            inside &= field >= start
        return inside | field.is_null()

    def overlaps(self, first: date, after: date) -> bool:
        """Whether a day from ``first`` up to, not including, ``after`` is inside."""
        return first < self.end and (self.start is None or after > self.start)


@final
@dataclass(frozen=True)
class Numbered:
    """Rows by number, from 0: ``of`` rows of every ``every`` are held out, evenly spread."""

    held: bool
    of: int
    every: int

    def mask(self, first: int, count: int) -> pa.Array:
        """Which of ``count`` rows are chosen, beginning with row number ``first``."""
        numbers = np.arange(first, first + count + 1, dtype=np.int64)
        steps = np.diff(numbers * self.of // self.every)
        return pa.array((steps > 0) == self.held)


Selection = Interval | Numbered


class Window(ABC):
    """The rule by which ``as_of`` selects the rows of both splits."""

    @abstractmethod
    def select(self, split: Split, as_of: date) -> Selection:
        """The rows of a split."""

    @abstractmethod
    def words(self, as_of: date) -> str:
        """Both splits, for people."""

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The time column, if there is one."""


@final
@dataclass(frozen=True)
class Months(Window):
    """Hold out the last complete months before ``as_of``, train on those before.

    Args:
        column: The time column.
        holdout: Months held out.
        train: Months trained on; None takes all.
    """

    column: str
    holdout: int = 1
    train: int | None = None

    def __post_init__(self) -> None:
        """Refuse a window without months."""
        _require_positive("months", self.holdout, self.train)

    def select(self, split: Split, as_of: date) -> Interval:
        """Whole months of the time column."""
        held = _months_before(as_of, self.holdout)
        if split == "holdout":
            return Interval(self.column, held, as_of.replace(day=1))
        start = None if self.train is None else _months_before(held, self.train)
        return Interval(self.column, start, held)

    def words(self, as_of: date) -> str:
        """First and last month of both splits."""
        return _words(self, as_of, "%Y-%m")

    def columns(self) -> tuple[str, ...]:
        """The time column."""
        return (self.column,)


@final
@dataclass(frozen=True)
class Days(Window):
    """Hold out the last complete days before ``as_of``, train on those before.

    Args:
        column: The time column.
        holdout: Days held out.
        train: Days trained on; None takes all.
    """

    column: str
    holdout: int = 1
    train: int | None = None

    def __post_init__(self) -> None:
        """Refuse a window without days."""
        _require_positive("days", self.holdout, self.train)

    def select(self, split: Split, as_of: date) -> Interval:
        """Whole days of the time column."""
        held = as_of - self.holdout * _DAY
        if split == "holdout":
            return Interval(self.column, held, as_of)
        return Interval(self.column, None if self.train is None else held - self.train * _DAY, held)

    def words(self, as_of: date) -> str:
        """First and last day of both splits."""
        return _words(self, as_of, "%Y-%m-%d")

    def columns(self) -> tuple[str, ...]:
        """The time column."""
        return (self.column,)


@final
@dataclass(frozen=True)
class Fraction(Window):
    """Hold out a share of the rows by their number, the same at every date.

    Args:
        holdout: The share held out, to three decimals; 0.2 holds out every fifth row.
    """

    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Refuse a share that leaves one split empty."""
        if not 0.001 <= self.holdout <= 0.999:
            raise ValueError(
                f"the share held out must lie between 0.001 and 0.999; got {self.holdout}"
            )

    def select(self, split: Split, as_of: date) -> Numbered:
        """Rows by number."""
        share = self._share()
        return Numbered(split == "holdout", share.numerator, share.denominator)

    def words(self, as_of: date) -> str:
        """How many of how many rows are held out."""
        share = self._share()
        return f"hold out {share.numerator} of every {share.denominator} rows, train on the others"

    def columns(self) -> tuple[str, ...]:
        """None."""
        return ()

    def _share(self) -> Ratio:
        return Ratio(str(self.holdout)).limit_denominator(1000)


def check_window(window: Window, schema: pa.Schema) -> None:
    """Compare a window with the columns that a source declares.

    Raises:
        ContractError: The time column is not declared, is no date or timestamp, or is nullable.
    """
    for name in window.columns():
        if name not in schema.names:
            raise ContractError(
                f"a window's time column must be declared in the source's schema; got {name!r}, "
                f"present: {', '.join(schema.names)}. Add it to the schema, or name another."
            )
        field = schema.field(name)
        timed = pa.types.is_date32(field.type) or pa.types.is_timestamp(field.type)
        if not timed or field.nullable:
            raise ContractError(
                "a window's time column must be declared as date32 or a timestamp, and not "
                f"nullable; got {name!r}: {field.type}{', nullable' if field.nullable else ''}. "
                "A row without a time belongs to no split."
            )


def midnight(day: date, kind: pa.DataType) -> date:
    """A day as a value of a date or timestamp type, in the type's time zone."""
    if pa.types.is_date32(kind):
        return day
    zone = None if kind.tz is None else ZoneInfo(kind.tz)
    return datetime(day.year, day.month, day.day, tzinfo=zone)


def choose(
    batches: Iterable[pa.RecordBatch], selection: Selection, first: int = 0
) -> Iterator[pa.RecordBatch]:
    """Yield the selected rows of batches that begin with row number ``first``."""
    for batch in batches:
        if isinstance(selection, Numbered):
            chosen = batch.filter(selection.mask(first, batch.num_rows))
        else:
            kind = batch.schema.field(selection.column).type
            chosen = batch.filter(selection.expression(kind))
        first += batch.num_rows
        if chosen.num_rows:
            yield chosen


def require_rows(
    batches: Iterable[pa.RecordBatch], split: Split, what: str
) -> Iterator[pa.RecordBatch]:
    """Pass batches through.

    Args:
        batches: Batches of a split.
        split: Which split that is.
        what: Window and origin of the rows, for the message.

    Raises:
        DataError: There was no row when the batches ended.
    """
    rows = 0
    for batch in batches:
        rows += batch.num_rows
        yield batch
    if not rows:
        raise DataError(
            f"the {split} split must have rows; there are none in {what}. Choose another as_of or "
            "another window, or mend the data."
        )


def _require_positive(unit: str, holdout: int, train: int | None) -> None:
    if holdout < 1 or (train is not None and train < 1):
        raise ValueError(
            f"a window must hold out and train on at least one of its {unit}; got "
            f"holdout={holdout}, train={train}"
        )


def _months_before(day: date, months: int) -> date:
    """The first day of the month that lies so many months before that of ``day``."""
    years, number = divmod(day.year * 12 + day.month - 1 - months, 12)
    return date(years, number + 1, 1)


def _words(window: Window, as_of: date, form: str) -> str:
    train, held = window.select("train", as_of), window.select("holdout", as_of)
    assert isinstance(train, Interval) and isinstance(held, Interval) and held.start is not None
    before = f"before {train.end.strftime(form)}"
    trained = before if train.start is None else _span(train.start, train.end, form)
    return f"train {trained}, hold out {_span(held.start, held.end, form)}"


def _span(start: date, end: date, form: str) -> str:
    first, last = start.strftime(form), (end - _DAY).strftime(form)
    return first if first == last else f"{first} to {last}"
