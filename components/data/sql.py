"""Rows from a database, streamed in the order of their key."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, final

import pyarrow as pa
from pydantic import SecretStr

from components.contract import DataSource, Split
from components.data.cast import from_rows
from components.data.schema import RowSchema
from components.data.sql_engine import describe_url, explain, is_passing, make_engine, parse_url
from components.data.windows import (
    Interval,
    Window,
    check_window,
    choose,
    midnight,
    require_rows,
)
from components.errors import ContractError, DataError

if TYPE_CHECKING:  # a machine that only trains may lack it
    import sqlalchemy as sa

_FETCH = 16_384
"""Rows that are asked for at a time."""

logger = logging.getLogger("assay")


@final
class SqlSource(DataSource):
    """The declared columns of a table or query in PostgreSQL or SQLite.

    A split is read by one statement in one read-only transaction, in which PostgreSQL shows the
    rows of one moment. A lost connection is made anew, and reading goes on after the last key.

    Args:
        url: SQLAlchemy's URL of the database, usually the context's ``database_url``.
        schema: Columns, checks and key; rows are read in the ascending order of the key.
        window: How ``as_of`` selects rows; a time column is compared by the database.
        table: The table or view, with its schema if need be: ``sales.orders``.
        query: A SELECT in place of a table.
        retries: How often in a row a lost connection is made anew.
        backoff_s: Seconds before the first of these; each later one waits twice as long.

    Raises:
        ConfigError: The URL is empty or not one of a supported database, or the driver is absent.
        ContractError: Not one of table and query is given, or key or time column do not fit.
    """

    def __init__(
        self,
        url: SecretStr,
        schema: RowSchema,
        window: Window,
        *,
        table: str = "",
        query: str = "",
        retries: int = 5,
        backoff_s: float = 0.5,
    ) -> None:
        if bool(table) == bool(query):
            raise ContractError(
                f"SqlSource reads a table or a query, one of them; got table={table!r} and "
                f"query={query!r}. Give one."
            )
        if not schema.key:
            raise ContractError(
                "SqlSource needs the schema's key: it gives rows an order, and a lost connection a "
                "place to go on. Declare the columns that tell rows apart: RowSchema(..., key=...)."
            )
        check_window(window, schema.arrow)
        self._url = parse_url(url)
        self._sqlite = self._url.get_backend_name() == "sqlite"
        zoned = [n for n in window.columns() if getattr(schema.arrow.field(n).type, "tz", None)]
        if self._sqlite and zoned:
            raise ContractError(
                f"SQLite cannot compare times with a time zone; got the time column {zoned[0]!r}. "
                "Store it in UTC without a zone, and declare it so."
            )
        self._schema, self._window = schema, window
        self._table, self._query = table, query
        self._retries, self._backoff_s = retries, backoff_s

    def schema(self) -> RowSchema:
        """As declared."""
        return self._schema

    def prepare(self) -> None:
        """Nothing: the rows are read where they are."""

    def window(self, as_of: date) -> str:
        """The window's words."""
        return self._window.words(as_of)

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        """Stream the rows of the split."""
        selection = self._window.select(split, as_of)
        interval = selection if isinstance(selection, Interval) else None
        found = self._rows(interval)
        chosen = found if interval else choose(found, selection)
        yield from require_rows(chosen, split, f"{self._name()} ({self.window(as_of)})")

    def excluded(self, as_of: date) -> Mapping[str, int]:
        """No row of a split is left out."""
        return {}

    def _name(self) -> str:
        return f"table {self._table}" if self._table else "the query of the source"

    def _rows(self, interval: Interval | None) -> Iterator[pa.RecordBatch]:
        """Every row of the interval, over as many connections as it takes."""
        from sqlalchemy.exc import DBAPIError

        engine = make_engine(self._url)
        last: tuple[Any, ...] | None = None
        number = failures = 0
        while True:
            try:
                for rows in self._stream(engine, interval, last):
                    where = f"rows {number + 1:,} to {number + len(rows):,} of {self._name()}"
                    batch = from_rows(rows, self._schema.arrow, where)
                    number, last, failures = number + len(rows), self._key(rows[-1]), 0
                    yield batch
                return
            except DBAPIError as error:
                progress = self._progress(last, number)
                if not is_passing(error) or failures == self._retries:
                    raise explain(error, self._url, self._name(), progress) from None
                logger.warning(
                    "the connection to %s was lost %s; trying again (%d of %d)",
                    describe_url(self._url),
                    progress,
                    failures + 1,
                    self._retries,
                )
            time.sleep(self._backoff_s * 2**failures)
            failures += 1

    def _progress(self, last: tuple[Any, ...] | None, number: int) -> str:
        if last is None:
            return "before the first row"
        pairs = zip(self._schema.key, last, strict=True)
        key = ", ".join(f"{name}={_text(value)}" for name, value in pairs)
        return f"after {number:,} rows, the last with the key {key}"

    def _key(self, row: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(row[self._schema.names.index(name)] for name in self._schema.key)

    def _stream(
        self, engine: "sa.Engine", interval: Interval | None, last: tuple[Any, ...] | None
    ) -> Iterator[list[Sequence[Any]]]:
        """Rows over one connection: all, or those after the last key."""
        statement = self._statement(interval, last)
        with (
            engine.connect() as connection,
            contextlib.closing(
                connection.execution_options(yield_per=_FETCH).execute(statement)
            ) as result,
        ):
            for part in result.partitions():
                rows: list[Sequence[Any]] = list(part)
                if last is not None:
                    self._require_same(rows.pop(0), last)
                    last = None
                if rows:
                    yield rows
        if last is not None:
            self._require_same(None, last)

    def _require_same(self, row: Sequence[Any] | None, last: tuple[Any, ...]) -> None:
        """Reading goes on with the row that it had come to, or not at all."""
        if row is None or self._key(row) != last:
            raise DataError(
                "rows must stay while they are read; after a lost connection the row with the key "
                f"{', '.join(map(_text, last))} was gone from {self._name()}. Run again when "
                "nobody deletes rows."
            )

    def _statement(
        self, interval: Interval | None, last: tuple[Any, ...] | None
    ) -> "sa.Select[tuple[Any, ...]]":
        import sqlalchemy as sa

        rows = self._selectable()
        keys = [self._ordered(rows, name) for name in self._schema.key]
        statement = sa.select(*[rows.c[name] for name in self._schema.names]).order_by(*keys)
        if interval is not None:
            column = rows.c[interval.column]
            inside = column < self._bound(interval, interval.end)
            if interval.start is not None:
                inside &= column >= self._bound(interval, interval.start)
            # A row without a time is somebody's mistake: it must be seen.
            statement = statement.where(inside | column.is_(None))
        if last is not None:
            after = sa.tuple_(*keys) >= sa.tuple_(*last) if len(last) > 1 else keys[0] >= last[0]
            statement = statement.where(after)
        return statement

    def _selectable(self) -> "sa.FromClause":
        import sqlalchemy as sa

        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in self._schema.names]
        if self._table:
            schema, _, name = self._table.rpartition(".")
            return sa.table(name, *columns, schema=schema or None)
        text = self._query.strip().rstrip(";").replace(":", "\\:")  # no colon is a parameter
        return sa.text(text).columns(*columns).subquery("source_rows")

    def _ordered(self, rows: "sa.FromClause", name: str) -> "sa.ColumnElement[Any]":
        """A column of the key; text is ordered by its bytes, as Arrow and files order it."""
        import sqlalchemy as sa

        if pa.types.is_string(self._schema.arrow.field(name).type):
            return sa.collate(rows.c[name], "BINARY" if self._sqlite else "C")
        return rows.c[name]

    def _bound(self, interval: Interval, day: date) -> date | str:
        """A day in the form that the column has; SQLite compares text."""
        if self._sqlite:
            return day.isoformat()
        return midnight(day, self._schema.arrow.field(interval.column).type)


def _text(value: object) -> str:
    return value.isoformat() if isinstance(value, date) else repr(value)
