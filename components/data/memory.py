"""Rows that a program already holds."""

from collections.abc import Iterator, Mapping
from datetime import date
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.contract import DataSource, Split
from components.data.cast import conform
from components.data.schema import RowSchema
from components.data.windows import require_rows
from components.errors import DataError

Rows: TypeAlias = pa.Table | Mapping[str, npt.NDArray[np.generic]]
"""An Arrow table, or arrays by column; one of two axes becomes a fixed-size list."""


@final
class ArraySource(DataSource):
    """Two given splits, the same at every date.

    Args:
        train: Rows to train on.
        holdout: Rows held out.
        schema: Columns, checks and key; the rows may have narrower types, and more columns.
    """

    def __init__(self, train: Rows, holdout: Rows, schema: RowSchema) -> None:
        self._rows: dict[Split, Rows] = {"train": train, "holdout": holdout}
        self._schema = schema

    def schema(self) -> RowSchema:
        """As declared."""
        return self._schema

    def prepare(self) -> None:
        """Nothing: the rows are there."""

    def window(self, as_of: date) -> str:
        """How many rows each split has."""
        train, held = (_table(split, rows).num_rows for split, rows in self._rows.items())
        return f"train {train} rows, hold out {held}"

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a split in their order."""
        where = f"the {split} rows given to ArraySource"
        table = _table(split, self._rows[split])
        found = (conform(batch, self._schema.arrow, where) for batch in table.to_batches())
        yield from require_rows(found, split, where)

    def excluded(self, as_of: date) -> Mapping[str, int]:
        """Every row is used."""
        return {}


def _table(split: Split, rows: Rows) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    lengths = {name: len(array) for name, array in rows.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"arrays of one split must have equally many rows; the {split} rows given to "
            f"ArraySource have {', '.join(f'{n}: {count}' for n, count in lengths.items())}. "
            "Give every column the same rows."
        )
    try:
        return pa.table({name: _array(array) for name, array in rows.items()})
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(
            f"arrays must hold numbers, text, dates or booleans; the {split} rows given to "
            f"ArraySource do not: {error}. Convert them, or give an Arrow table."
        ) from error


def _array(array: npt.NDArray[np.generic]) -> pa.Array:
    if array.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
    return pa.array(array)
