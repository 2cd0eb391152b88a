"""Rows from Parquet files; what lies outside of the window is not read."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from components.contract import DataSource, Split
from components.data.cast import check_types, conform
from components.data.files import DataFile, DataFiles, storage_answers
from components.data.schema import RowSchema
from components.data.windows import Interval, Window, check_window, choose, require_rows
from components.errors import ContractError, DataError

SUFFIXES = (".parquet", ".parq", ".pq")
_FORMAT = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
)
_DAY = timedelta(days=1)
_MISSING = "__HIVE_DEFAULT_PARTITION__"
_NO_PARTITIONS: Mapping[str, str] = MappingProxyType({})


@final
class ParquetSource(DataSource):
    """Parquet files, read as one in the order of their paths; hive partitions are columns.

    Args:
        path: A file, a folder or a glob; a path, or an fsspec URL.
        schema: Columns, checks and key.
        window: How ``as_of`` selects rows.
        partitioned_by: For folders such as ``month=2013-07``: by partition column, the strftime
            format of the window's time column that gives its values. Files of other times are not
            opened. Together the formats must name a year, a month or a day.

    Raises:
        ConfigError: Nothing installed can open the URL's protocol.
        ContractError: Window or partitions do not go with the schema.
    """

    def __init__(
        self,
        path: str | Path,
        schema: RowSchema,
        window: Window,
        *,
        partitioned_by: Mapping[str, str] = _NO_PARTITIONS,
    ) -> None:
        check_window(window, schema.arrow)
        self._files = DataFiles(path, SUFFIXES)
        self._schema, self._window = schema, window
        zoned = any(getattr(schema.arrow.field(n).type, "tz", None) for n in window.columns())
        self._partitions = _Partitions(dict(partitioned_by), _DAY if zoned else 0 * _DAY)
        if partitioned_by and not window.columns():
            raise ContractError(
                "partitioned_by goes with a window on a time column; got a window by row number. "
                "Leave it out, or choose Months or Days."
            )

    def schema(self) -> RowSchema:
        """As declared."""
        return self._schema

    def prepare(self) -> None:
        """Nothing: the files are read where they lie."""

    def window(self, as_of: date) -> str:
        """The window's words."""
        return self._window.words(as_of)

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        """Read the row groups that may hold rows of the split, and yield these rows."""
        selection = self._window.select(split, as_of)
        interval = selection if isinstance(selection, Interval) else None
        chosen = choose(self._rows(interval), selection)
        yield from require_rows(chosen, split, f"{self._files.url} ({self.window(as_of)})")

    def excluded(self, as_of: date) -> Mapping[str, int]:
        """No row of a split is left out."""
        return {}

    def _rows(self, interval: Interval | None) -> Iterator[pa.RecordBatch]:
        for file in self._files.found():
            period = self._partitions.period(file)
            if interval is None or period is None or interval.overlaps(period.first, period.after):
                with storage_answers(file.path):
                    yield from self._read(file, interval, period)

    def _read(
        self, file: DataFile, interval: Interval | None, period: "_Period | None"
    ) -> Iterator[pa.RecordBatch]:
        declared = self._schema.arrow
        try:
            fragment = _FORMAT.make_fragment(file.path, self._filesystem())
            found = fragment.physical_schema
            given = [name for name in declared.names if name not in found.names]
            constants = {n: file.partitions[n] for n in given if n in file.partitions}
            stored = pa.schema([f for f in declared if f.name not in constants])
            check_types(found, stored, file.path)
            scanner = fragment.scanner(
                schema=found,
                columns=stored.names,
                filter=_pushed_down(interval, found),
                batch_readahead=2,
                fragment_readahead=1,
            )
            for batch in scanner.to_batches():
                rows = conform(_add(batch, constants, declared), declared, file.path)
                if period is not None and interval is not None:
                    period.check(rows.column(interval.column), file.path)
                yield rows
        except pa.ArrowException as error:
            raise DataError(_unreadable(file, error)) from error
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError) or error.errno is not None:
                raise
            raise DataError(_unreadable(file, error)) from error  # Arrow's word for a bad page

    def _filesystem(self) -> pafs.FileSystem:
        if isinstance(self._files.filesystem, LocalFileSystem):
            return pafs.LocalFileSystem()
        return pafs.PyFileSystem(pafs.FSSpecHandler(self._files.filesystem))


def _pushed_down(interval: Interval | None, found: pa.Schema) -> pc.Expression | None:
    if interval is None or interval.column not in found.names:
        return None
    return interval.expression(found.field(interval.column).type)


def _add(
    batch: pa.RecordBatch, constants: Mapping[str, str], declared: pa.Schema
) -> pa.RecordBatch:
    """Add the columns that stand in the path only."""
    for name, text in constants.items():
        value = pa.scalar(None if text == _MISSING else text, pa.string())
        column = pa.repeat(value.cast(declared.field(name).type), batch.num_rows)
        batch = batch.append_column(name, column)
    return batch


def _unreadable(file: DataFile, error: Exception) -> str:
    return (
        f"a Parquet file must be readable and intact; {file.path} is not: {error}. Write the file "
        "again."
    )


@final
@dataclass(frozen=True)
class _Period:
    """The days that a partition holds, from ``first`` up to, not including, ``after``."""

    first: date
    after: date

    def check(self, times: pa.Array, where: str) -> None:
        """Refuse rows that another partition's name announces: they would be missed there."""
        ends = [value for value in pc.min_max(times).as_py().values() if value is not None]
        days = [value.date() if isinstance(value, datetime) else value for value in ends]
        if any(not self.first <= day < self.after for day in days):
            raise DataError(
                f"a partition must hold the times that its name says; {where} has rows from "
                f"{days[0]} to {days[-1]}. Mend the data, or partitioned_by of the source."
            )


@final
class _Partitions:
    """What the names of folders say about the time column.

    Args:
        formats: strftime's format by folder.
        slack: How far the names may be from the column's own days, because of its time zone.
    """

    def __init__(self, formats: Mapping[str, str], slack: timedelta) -> None:
        self._formats, self._slack = formats, slack
        signs = set(re.findall(r"%(.)", " ".join(formats.values())))
        known = signs <= {sign for unit in _SIGNS.values() for sign in unit}
        if formats and not (known and signs & _SIGNS["year"]):
            raise ContractError(
                "partitioned_by must give formats that name a day, a month or a year, and always "
                f"the year; got {', '.join(formats.values())}. Write them for strftime, for "
                "example '%Y-%m'."
            )
        self._unit = next((unit for unit in _SIGNS if signs & _SIGNS[unit]), "")

    def period(self, file: DataFile) -> _Period | None:
        """The days that a file may hold; None where nothing is declared.

        Raises:
            DataError: A folder is missing in the path, or its value is not of the format.
        """
        if not self._formats:
            return None
        try:
            values = " ".join(file.partitions[name] for name in self._formats)
            moment = datetime.strptime(values, " ".join(self._formats.values()))  # noqa: DTZ007
        except (KeyError, ValueError) as error:
            wanted = "/".join(f"{name}={form}" for name, form in self._formats.items())
            raise DataError(
                f"every file must lie in folders named {wanted}; {file.path} does not: {error}. "
                "Move it, or mend partitioned_by of the source."
            ) from error
        first = moment.date()
        days = {"hour": 1, "day": 1, "month": 31, "year": 366}[self._unit]
        after = first + days * _DAY
        if self._unit in ("month", "year"):  # the first day of the next
            after = after.replace(day=1)
        return _Period(first - self._slack, after + self._slack)


_SIGNS = {
    "hour": {"H", "M", "S"},
    "day": {"d", "j"},
    "month": {"m", "b", "B"},
    "year": {"Y", "y"},
}
