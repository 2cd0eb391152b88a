"""Rows from CSV files, streamed and typed as declared."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.csv as pacsv

from components.contract import DataSource, Split
from components.data.cast import conform
from components.data.files import DataFile, DataFiles, storage_answers
from components.data.schema import RowSchema
from components.data.windows import Window, check_window, choose, require_rows
from components.errors import ContractError, DataError

SUFFIXES = (".csv", ".csv.gz", ".csv.bz2", ".csv.xz", ".csv.zst", ".tsv", ".tsv.gz")
_BLOCK = 4 << 20


@final
class CsvSource(DataSource):
    """CSV files with a header, read as one in the order of their paths.

    Dates and times stand in ISO 8601, missing values as one of ``null_values`` without quotes.
    Columns that are not declared are not read.

    Args:
        path: A file, a folder or a glob; a path, or an fsspec URL. Compression follows the suffix.
        schema: Columns, checks and key.
        window: How ``as_of`` selects rows.
        null_values: Texts that stand for a missing value.
        delimiter: The character between two values.

    Raises:
        ConfigError: Nothing installed can open the URL's protocol.
        ContractError: The window's time column is not declared, or a column is nested.
    """

    def __init__(
        self,
        path: str | Path,
        schema: RowSchema,
        window: Window,
        *,
        null_values: Sequence[str] = ("",),
        delimiter: str = ",",
    ) -> None:
        check_window(window, schema.arrow)
        nested = [field.name for field in schema.arrow if pa.types.is_nested(field.type)]
        if nested:
            raise ContractError(
                f"a CSV file holds single values; got nested columns {', '.join(nested)}. Store "
                "the rows as Parquet."
            )
        self._files = DataFiles(path, SUFFIXES)
        self._schema, self._window = schema, window
        self._nulls, self._delimiter = list(null_values), delimiter

    def schema(self) -> RowSchema:
        """As declared."""
        return self._schema

    def prepare(self) -> None:
        """Nothing: the files are read where they lie."""

    def window(self, as_of: date) -> str:
        """The window's words."""
        return self._window.words(as_of)

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        """Stream the files, and yield the rows of the split."""
        chosen = choose(self._rows(), self._window.select(split, as_of))
        yield from require_rows(chosen, split, f"{self._files.url} ({self.window(as_of)})")

    def excluded(self, as_of: date) -> Mapping[str, int]:
        """No row of a split is left out."""
        return {}

    def _rows(self) -> Iterator[pa.RecordBatch]:
        for file in self._files.found():
            with (
                storage_answers(file.path),
                self._files.filesystem.open(file.path, "rb", compression="infer") as stream,
            ):
                yield from self._read(file, stream)

    def _read(self, file: DataFile, stream: Any) -> Iterator[pa.RecordBatch]:
        header = self._header(file, stream)
        stream.seek(0)
        names = self._schema.names
        try:
            with pacsv.open_csv(
                stream,
                pacsv.ReadOptions(block_size=_BLOCK, use_threads=False),  # so errors name the row
                pacsv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
                pacsv.ConvertOptions(
                    column_types={field.name: field.type for field in self._schema.arrow},
                    include_columns=list(names),
                    null_values=self._nulls,
                    true_values=["1", "true", "True", "TRUE", "t"],
                    false_values=["0", "false", "False", "FALSE", "f"],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            ) as reader:
                for batch in reader:
                    yield conform(batch, self._schema.arrow, file.path)
        except (pa.ArrowException, EOFError) as error:
            raise DataError(self._message(file, self._fault(header, error))) from error

    def _header(self, file: DataFile, stream: Any) -> list[str]:
        try:
            line = stream.readline().decode("utf-8-sig")
            names = next(csv.reader([line], delimiter=self._delimiter), [])
        except (UnicodeDecodeError, EOFError, csv.Error) as error:
            raise DataError(self._message(file, f"its first line is not text: {error}")) from error
        counts = Counter(names)
        faults = [f"{n!r} is there {counts[n]} times" for n in self._schema.names if counts[n] != 1]
        if faults:
            what = f"its first line must name every declared column once; {', '.join(faults)}"
            raise DataError(self._message(file, what))
        return names

    def _fault(self, header: list[str], error: Exception) -> str:
        """Name the column, of which Arrow's complaint has the number."""
        found = re.fullmatch(r"In CSV column #(\d+): (.*)", str(error), flags=re.DOTALL)
        if found is None:
            return str(error)
        name = header[int(found[1])]
        kind = self._schema.arrow.field(name).type
        return f"column {name!r} must be {kind}: {found[2]} (the first line is row 1)"

    def _message(self, file: DataFile, what: str) -> str:
        return (
            f"a CSV file must hold the declared columns; {file.path}: {what}. Mend the file, or "
            "the schema, null_values or delimiter of the source."
        )
