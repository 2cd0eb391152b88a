"""Rows as a registered graph takes them: each source column as it is, an input of its own.

A consumer in any language fills the inputs straight from its rows. Text is a string, and a missing
one is the empty string; numbers are float64, and a missing one is NaN; whole numbers and truth
values that are never missing are int64 and bool.

Legend: B = batch.
"""

import math
from collections.abc import Container

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.contract import Dtype, TensorSpec
from components.data.encoding import Encoding, Folded, fold_column, require_column
from components.data.statistics import Frozen
from components.errors import DataError, GateError

Array = npt.NDArray[np.generic]

MISSING_TEXT = ""
"""What stands for a missing text."""


class RawColumn(Frozen):
    """A source column, and the type of its input, which has the shape (B,).

    ``missing`` says whether rows lacked it when the model was trained or judged.
    """

    name: str
    dtype: Dtype
    missing: bool


class RawColumns(Frozen):
    """How a row becomes the named inputs of a registered graph: one per column.

    Folded columns, such as images, are float32 (B, *shape), as the network takes them.
    """

    columns: tuple[RawColumn, ...]
    folded: tuple[Folded, ...] = ()

    def specs(self) -> tuple[TensorSpec, ...]:
        """The inputs that :meth:`encode` gives, in the order of the graph."""
        plain = [TensorSpec(name=c.name, dtype=c.dtype, shape=("batch",)) for c in self.columns]
        lists = [
            TensorSpec(name=f.column, dtype="float32", shape=("batch", *f.shape))
            for f in self.folded
        ]
        return (*plain, *lists)

    def encode(self, rows: pa.RecordBatch | pa.Table) -> dict[str, Array]:
        """Take the columns from rows; they may stand in any order and others are ignored.

        Raises:
            DataError: A column is missing, of another kind, or lacks values that it must have.
        """
        inputs = {c.name: _values(c, _column(rows, c.name)) for c in self.columns}
        return inputs | {f.column: fold_column(f, _column(rows, f.column)) for f in self.folded}


def raw_columns(encoding: Encoding, schema: pa.Schema, gaps: Container[str] = ()) -> RawColumns:
    """The columns that an encoding reads, with the types that their source gives them.

    Args:
        encoding: Names the columns; one that is read twice is one input.
        schema: Of the source's rows; says what may be missing.
        gaps: Columns in which something is missing.

    Raises:
        GateError: A missing text could not be told from a category.
    """
    categorical = {c.column: c.vocabulary for c in encoding.categorical}
    names = dict.fromkeys([*categorical, *(c.column for c in encoding.numeric)])
    fields = [schema.field(name) for name in names]
    columns = [RawColumn(name=f.name, dtype=_dtype(f), missing=f.name in gaps) for f in fields]
    doubtful = [
        c.name
        for c in columns
        if c.dtype == "string"
        and schema.field(c.name).nullable
        and MISSING_TEXT in categorical[c.name]
    ]
    if doubtful:
        raise GateError(
            "export",
            [
                f"the empty text stands for a missing one, so it must not be a category too; it is "
                f"one in {', '.join(doubtful)}. Make it missing in the data source, or give it a "
                "name"
            ],
        )
    return RawColumns(columns=tuple(columns), folded=encoding.folded)


def _dtype(field: pa.Field) -> Dtype:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "float64"
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return "float64" if field.nullable else "int64"
    if pa.types.is_boolean(kind):
        return "float64" if field.nullable else "bool"
    return "float64" if kind == pa.uint64() else "string"  # dates and times as text, too


def _column(rows: pa.RecordBatch | pa.Table, name: str) -> pa.Array:
    require_column(name, tuple(rows.schema.names))
    column = rows.column(name)
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _values(column: RawColumn, values: pa.Array) -> Array:
    try:
        if column.dtype == "string":
            return np.asarray(
                values.cast(pa.string()).fill_null(MISSING_TEXT).to_pylist(), dtype=np.str_
            )
        if column.dtype == "float64":
            number = pc.cast(values, pa.uint8()) if pa.types.is_boolean(values.type) else values
            floats = number.cast(pa.float64(), safe=False).fill_null(math.nan)
            return np.array(floats.to_numpy(zero_copy_only=False))
        if values.null_count:
            raise pa.ArrowInvalid(f"{values.null_count} of {len(values)} values are missing")
        kind = pa.int64() if column.dtype == "int64" else pa.bool_()
        return np.array(values.cast(kind).to_numpy(zero_copy_only=False))
    except pa.ArrowException as error:
        raise DataError(
            f"column {column.name!r} must hold {column.dtype} values, as the rows did that the "
            f"model was trained on; got {values.type}: {error}. Mend the data source."
        ) from error
