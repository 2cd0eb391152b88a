"""Columns to tensors: vocabularies and statistics, fitted on training rows only.

The fitted :class:`Encoding` is plain JSON. The vocabulary part travels in the ONNX file's metadata,
so a consumer needs nothing of assay to encode a row; the statistics become buffers of the network.

Legend: B = batch, C = categorical columns, F = numeric columns.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.contract import TensorSpec
from components.data.statistics import (
    DISTINCT_VALUES,
    ColumnStatistics,
    Frozen,
    Statistics,
    as_floats,
)
from components.errors import DataError

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Features:
    """Which columns a pipeline reads, and how.

    Args:
        categorical: Columns whose values are looked up in a vocabulary, as strings.
        numeric: Columns taken as float32; a missing value becomes NaN.
        tensors: Fixed-size-list columns, with the shape that a row is folded to.
        label: The integer column to predict, from 0 to ``classes - 1``.
        min_count: Categories seen less often in training share index 0 with unknown ones.
    """

    label: str
    classes: int
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    min_count: int = 20

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read, the label last."""
        return (*self.categorical, *self.numeric, *self.tensors, self.label)


class Categorical(Frozen):
    """A column whose value ``vocabulary[i]`` is encoded as ``i + 1``; 0 is unknown or missing."""

    column: str
    vocabulary: tuple[str, ...]


class Numeric(Frozen):
    """A float32 column with its mean, standard deviation and quantiles over the training rows.

    ``quantiles`` are strictly increasing; a column with few distinct values has fewer of them, and
    a constant one has two.
    """

    column: str
    mean: float
    std: float
    quantiles: tuple[float, ...]


class Folded(Frozen):
    """A list column folded to ``shape``."""

    column: str
    shape: tuple[int, ...]


class Encoding(Frozen):
    """How a row becomes the named inputs of a graph.

    ``categorical`` is int64 (B, C), ``numeric`` float32 (B, F), and every folded column is an input
    of its own, float32 (B, *shape).
    """

    categorical: tuple[Categorical, ...] = ()
    numeric: tuple[Numeric, ...] = ()
    folded: tuple[Folded, ...] = ()

    def specs(self) -> tuple[TensorSpec, ...]:
        """The inputs that :meth:`encode` gives, in the order of the model's arguments."""
        specs = []
        if self.categorical:
            shape: tuple[Literal["batch"] | int, ...] = ("batch", len(self.categorical))
            specs.append(TensorSpec(name="categorical", dtype="int64", shape=shape))
        if self.numeric:
            specs.append(
                TensorSpec(name="numeric", dtype="float32", shape=("batch", len(self.numeric)))
            )
        for item in self.folded:
            specs.append(
                TensorSpec(name=item.column, dtype="float32", shape=("batch", *item.shape))
            )
        return tuple(specs)

    def encode(self, rows: pa.RecordBatch | pa.Table) -> dict[str, Array]:
        """Encode rows; the columns may stand in any order and others are ignored.

        Raises:
            DataError: A column is missing or of a type that cannot be encoded.
        """
        inputs: dict[str, Array] = {}
        if self.categorical:
            codes = [_codes(_column(rows, c.column), c.vocabulary) for c in self.categorical]
            inputs["categorical"] = np.stack(codes, axis=1)
        if self.numeric:
            numbers = [_floats(c.column, _column(rows, c.column)) for c in self.numeric]
            inputs["numeric"] = np.stack(numbers, axis=1)
        for item in self.folded:
            inputs[item.column] = fold_column(item, _column(rows, item.column))
        return inputs


def fit_encoding(features: Features, statistics: Statistics) -> Encoding:
    """Learn vocabularies, means, standard deviations and quantiles from the training rows.

    Vocabularies are sorted, so equal rows give an equal encoding whatever their order.

    Raises:
        DataError: A column is missing or of a kind that cannot be encoded, has too many distinct
            values for a vocabulary, or holds no finite value.
    """
    for name in features.columns:
        require_column(name, tuple(statistics.columns))
    columns = statistics.columns
    return Encoding(
        categorical=tuple(
            _vocabulary(c, columns[c], features.min_count) for c in features.categorical
        ),
        numeric=tuple(_numeric(c, columns[c]) for c in features.numeric),
        folded=tuple(Folded(column=c, shape=shape) for c, shape in features.tensors.items()),
    )


def read_labels(rows: pa.Table, features: Features) -> npt.NDArray[np.int64]:
    """Labels as int64 (B,), checked against the declared number of classes.

    Raises:
        DataError: A label is missing or outside its range.
    """
    column = _column(rows, features.label)
    if column.null_count:
        raise DataError(
            f"label {features.label!r} must be present in every row; {column.null_count} of "
            f"{len(column)} are missing. Drop these rows in the data source."
        )
    try:
        labels = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DataError(
            f"label {features.label!r} must hold whole numbers; got {column.type}: {error}. "
            "Mend the data source."
        ) from error
    outside = (labels < 0) | (labels >= features.classes)
    if outside.any():
        raise DataError(
            f"label {features.label!r} must lie in 0..{features.classes - 1}; "
            f"{int(outside.sum())} of {len(labels)} rows do not, the first with value "
            f"{labels[outside][0]}. Mend the data source or the pipeline's number of classes."
        )
    return np.array(labels)  # Arrow owns the other copy and forbids writing


def require_column(name: str, present: tuple[str, ...]) -> None:
    """Refuse a table without a column that is needed.

    Raises:
        DataError: The column is missing.
    """
    if name not in present:
        raise DataError(
            f"column {name!r} must be present; got {', '.join(present)}. "
            "Add it to the data source or take it from the pipeline's features."
        )


def _column(rows: pa.RecordBatch | pa.Table, name: str) -> pa.Array:
    require_column(name, tuple(rows.schema.names))
    column = rows.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _strings(column: pa.Array) -> pa.Array:
    return column if pa.types.is_string(column.type) else column.cast(pa.string())


def _vocabulary(name: str, column: ColumnStatistics, min_count: int) -> Categorical:
    if column.values is None:
        raise DataError(
            f"categorical column {name!r} must hold strings, whole numbers, booleans or dates; got "
            f"{column.kind}. Mend the data source, or read the column as a numeric feature."
        )
    if column.overflown:
        raise DataError(
            f"categorical column {name!r} must have at most {DISTINCT_VALUES:,} distinct values; "
            f"its {column.count:,} values have more. Group them in the data source, or take the "
            "column from the pipeline's features."
        )
    kept = sorted(value for value, count in column.values.items() if count >= min_count)
    return Categorical(column=name, vocabulary=tuple(kept))


def _numeric(name: str, column: ColumnStatistics) -> Numeric:
    if column.non_finite is None:
        raise DataError(
            f"numeric column {name!r} must hold numbers; got {column.kind}. Mend the data source "
            "or take the column from the pipeline's features."
        )
    if column.numbers is None:
        raise DataError(
            f"numeric column {name!r} must hold finite values; none of the "
            f"{column.count + column.missing:,} training rows has one. Mend the data source or "
            "take the column from the pipeline's features."
        )
    numbers = column.numbers
    std = numbers.std if numbers.std > 0 else 1.0
    return Numeric(column=name, mean=numbers.mean, std=std, quantiles=numbers.quantiles)


def _codes(column: pa.Array, vocabulary: Iterable[str]) -> npt.NDArray[np.int64]:
    found = pc.index_in(_strings(column), value_set=pa.array(list(vocabulary), pa.string()))
    codes: npt.NDArray[np.int64] = found.fill_null(-1).cast(pa.int64()).to_numpy()
    return codes + 1


def _floats(name: str, column: pa.Array) -> npt.NDArray[np.float32]:
    try:
        return as_floats(column)
    except pa.ArrowException as error:
        raise DataError(
            f"numeric column {name!r} must hold numbers; got {column.type}: {error}. Mend the data "
            "source or take the column from the pipeline's features."
        ) from error


def fold_column(item: Folded, column: pa.Array) -> npt.NDArray[np.float32]:
    """Lists as float32 (B, *shape).

    Raises:
        DataError: A list is missing, or has another length.
    """
    size = math.prod(item.shape)
    kind = column.type
    if not (pa.types.is_fixed_size_list(kind) and kind.list_size == size) or column.null_count:
        raise DataError(
            f"column {item.column!r} must hold a list of {size} numbers in every row, to be folded "
            f"to {item.shape}; got {kind} with {column.null_count} of {len(column)} missing. Mend "
            "the data source or the pipeline's features."
        )
    numbers = _floats(item.column, column.flatten())
    return np.array(numbers).reshape(-1, *item.shape)  # Arrow's own memory forbids writing
