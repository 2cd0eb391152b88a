"""A source whose batches are given, and tables of made-up rows."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import final

import numpy as np
import pyarrow as pa

from components.contract import DataSource, Split
from components.data.encoding import Features
from components.data.schema import RowSchema

DAY = date(2014, 1, 1)
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("word", pa.string()),
        pa.field("number", pa.float32()),
        pa.field("label", pa.int8(), nullable=False),
    ]
)
FEATURES = Features(label="label", classes=2, categorical=("word",), numeric=("number",))


def made_up(count: int, first: int = 0) -> pa.Table:
    """Rows with consecutive ids from ``first`` on; each row depends on its id alone."""
    ids = np.arange(first, first + count)
    return pa.table(
        {
            "id": pa.array(ids),
            "word": pa.array([None if i % 7 == 0 else f"w{i % 5}" for i in ids.tolist()]),
            "number": pa.array(
                (ids * 2654435761 % 1000 / 7).astype(np.float32), mask=ids % 11 == 0
            ),
            "label": pa.array((ids % 2).astype(np.int8)),
        }
    ).cast(SCHEMA)


def changed(rows: pa.Table, column: str, places: Mapping[int, object]) -> pa.Table:
    """The rows with some values of a column replaced."""
    values = rows.column(column).to_pylist()
    for place, value in places.items():
        values[place] = value
    number = rows.schema.get_field_index(column)
    field = rows.schema.field(number)
    return rows.set_column(number, field, pa.array(values, field.type))


@final
class Listed(DataSource):
    """Gives two tables in batches of ``size`` rows; ``fail_after`` batches it raises."""

    def __init__(
        self,
        train: pa.Table | Sequence[pa.RecordBatch],
        holdout: pa.Table | Sequence[pa.RecordBatch],
        *,
        schema: RowSchema | None = None,
        size: int = 1000,
        fail_after: int | None = None,
    ) -> None:
        self._rows: Mapping[Split, pa.Table | Sequence[pa.RecordBatch]]
        self._rows = {"train": train, "holdout": holdout}
        self._schema = schema or RowSchema(SCHEMA)
        self._size = size
        self._fail_after = fail_after
        self.readings: list[Split] = []

    def schema(self) -> RowSchema:
        return self._schema

    def prepare(self) -> None:
        pass

    def window(self, as_of: date) -> str:
        return "the listed rows"

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        self.readings.append(split)
        rows = self._rows[split]
        batches = rows.to_batches(self._size) if isinstance(rows, pa.Table) else rows
        for number, batch in enumerate(batches):
            if number == self._fail_after:
                raise RuntimeError("the source broke")
            yield batch

    def excluded(self, as_of: date) -> Mapping[str, int]:
        return {}
