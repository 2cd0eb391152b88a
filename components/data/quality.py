"""Checks of rows while they stream by: types, missing values, pandera's checks, key and label.

Every broken rule is counted and its first rows are kept; they are refused together, once. A number
that is NaN counts as missing, here as in the encoding. Rows count from 0 within their split.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.contract import Split
from components.data.encoding import Features
from components.data.schema import RowSchema
from components.errors import DataError

MOST_SHOWN = 5
"""Offending rows that are shown per rule."""
_CHECKED_TOGETHER = 8
"""Chunks per call of pandera, whose own cost per call is that of many rows; fewer if large."""
_LARGE_BYTES = 1 << 26

Mask = npt.NDArray[np.bool_]


@dataclass
class _Fault:
    """A rule that rows of a split break."""

    rows: int = 0
    shown: list[str] = field(default_factory=list)


@final
class QualityCheck:
    """Gathers what is wrong with the rows of both splits.

    Args:
        schema: What the source promises.
        features: Columns that must be there, and the label's classes.

    Raises:
        DataError: A column of the features is not in the schema.
    """

    def __init__(self, schema: RowSchema, features: Features) -> None:
        _require_columns(schema, features)
        self._schema = schema
        self._features = features
        self._pandera = _pandera_schema(schema)
        self._faults: dict[tuple[Split, str], _Fault] = {}
        self._totals: dict[Split, int] = {}
        self._failures: list[str] = []
        self._unchecked: list[pa.Table] = []

    @property
    def passed(self) -> bool:
        """Whether no rule is broken so far."""
        return not self._faults and not self._failures

    def begin(self, split: Split, window: str) -> None:
        """Start a split; ``window`` names the rows in a message."""
        self._split, self._window = split, window
        self._totals[split] = 0
        self._last_key: pa.Table | None = None
        self._seen = np.zeros(self._features.classes, dtype=bool)
        self._cut = False

    def conforming(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Pass batches on up to the first that has other columns than declared."""
        rows = 0
        for batch in batches:
            if not batch.schema.equals(self._schema.arrow):
                what = _schema_difference(batch.schema, self._schema.arrow)
                self._failures.append(f"{self._split}, from row {rows:,}: {what}")
                self._cut = True
                return
            rows += batch.num_rows
            yield batch

    def check(self, chunk: pa.Table) -> None:
        """Check the next rows of the split."""
        start = self._totals[self._split]
        self._totals[self._split] += chunk.num_rows
        for item in self._schema.arrow:
            if not item.nullable:
                column = chunk.column(item.name)
                missing = _bools(pc.is_null(column, nan_is_null=True))
                self._note(f"{item.name!r} must have a value", missing, column, start)
        if self._pandera is not None:
            self._unchecked.append(chunk.select(list(self._schema.checks)))
            size = sum(rows.nbytes for rows in self._unchecked)
            if len(self._unchecked) == _CHECKED_TOGETHER or size > _LARGE_BYTES:
                self._check_values()
        if self._schema.key:
            self._check_key(chunk.select(list(self._schema.key)), start)
        self._check_label(chunk.column(self._features.label), start)

    def end(self) -> None:
        """End the split."""
        if self._unchecked:
            self._check_values()
        if self._cut:
            return
        if not self._totals[self._split]:
            self._failures.append(
                f"the {self._split} split of {self._window} must have rows; it is empty"
            )
        elif self._split == "train" and self._features.classes > 1 and self._seen.sum() == 1:
            self._failures.append(
                f"train: label {self._features.label!r} must have at least 2 of its "
                f"{self._features.classes} classes; every row has {int(self._seen.argmax())}"
            )

    def require_passed(self) -> None:
        """Refuse the rows if any rule is broken.

        Raises:
            DataError: With every broken rule, how many rows break it, and the first of them.
        """
        failures = [
            f"{split}: {rule}: {fault.rows:,} of {self._totals[split]:,} rows do not: "
            + ", ".join(fault.shown)
            + (", ..." if fault.rows > len(fault.shown) else "")
            for (split, rule), fault in self._faults.items()
        ]
        failures = [*self._failures, *failures]
        if failures:
            raise DataError(
                f"rows must keep what the source declares; {len(failures)} "
                f"{'rule is' if len(failures) == 1 else 'rules are'} broken: "
                + "; ".join(failures)
                + ". Rows count from 0. Mend the data or the source's schema, or choose another "
                "as_of."
            )

    def _note(self, rule: str, failing: Mask, column: pa.ChunkedArray, start: int) -> None:
        places = np.flatnonzero(failing)
        if not len(places):
            return
        fault = self._faults.setdefault((self._split, rule), _Fault())
        fault.rows += len(places)
        for place in places[: MOST_SHOWN - len(fault.shown)].tolist():
            fault.shown.append(f"row {start + place} has {_short(column[place].as_py())}")

    def _check_values(self) -> None:
        from pandera.errors import SchemaErrors

        chunk = pa.concat_tables(self._unchecked)
        self._unchecked = []
        start = self._totals[self._split] - len(chunk)
        rows = _without_nan(chunk)
        try:
            self._pandera.validate(rows, lazy=True)
        except SchemaErrors as errors:
            for error in errors.schema_errors:
                name = error.schema.name
                column = chunk.column(name)
                rule = f"{name!r} must pass {_name_of(error.check)}"
                failing = _failing_rows(error, rows)
                if failing is None:
                    self._faults.setdefault((self._split, rule), _Fault()).rows += chunk.num_rows
                else:
                    self._note(rule, failing & _bools(pc.is_valid(column)), column, start)

    def _check_key(self, keys: pa.Table, start: int) -> None:
        """Compare each row's key with that of the row before; the last key is kept."""
        known = keys if self._last_key is None else pa.concat_tables([self._last_key, keys])
        before, after = known.slice(0, len(known) - 1), known.slice(1)
        below, same = np.zeros(len(after), dtype=bool), np.ones(len(after), dtype=bool)
        for name in keys.column_names:
            left, right = _plain(before.column(name)), _plain(after.column(name))
            below |= same & _bools(pc.less(left, right))
            same &= _bools(pc.equal(left, right))
        first = start + (1 if self._last_key is None else 0)
        label = f"key ({', '.join(keys.column_names)})"
        shown = (
            pa.chunked_array(
                [
                    pa.StructArray.from_arrays(
                        [after.column(n).combine_chunks() for n in after.column_names],
                        after.column_names,
                    )
                ]
            )
            if not (below.all())
            else None
        )
        if shown is not None:
            self._note(f"{label} must be different in every row", same, shown, first)
            self._note(f"{label} must ascend", ~below & ~same, shown, first)
        self._last_key = keys.slice(len(keys) - 1)

    def _check_label(self, column: pa.ChunkedArray, start: int) -> None:
        classes = self._features.classes
        rule = f"label {self._features.label!r}"
        missing = _bools(pc.is_null(column, nan_is_null=True))
        if self._schema.arrow.field(self._features.label).nullable:  # otherwise noted already
            self._note(f"{rule} must have a value", missing, column, start)
        numbers = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan).to_numpy()
        good = (numbers >= 0) & (numbers < classes) & (numbers == np.floor(numbers))
        self._note(f"{rule} must be one of 0..{classes - 1}", ~good & ~missing, column, start)
        self._seen[np.unique(numbers[good].astype(np.int64))] = True


def _require_columns(schema: RowSchema, features: Features) -> None:
    missing = [name for name in features.columns if name not in schema.names]
    if missing:
        raise DataError(
            f"the data source must give every column of the features; missing: "
            f"{', '.join(missing)}; present: {', '.join(schema.names)}. Add them to the source, "
            "or take them from the pipeline's features."
        )
    kind = schema.arrow.field(features.label).type
    tests = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating, pa.types.is_decimal)
    if not any(test(kind) for test in tests):
        raise DataError(
            f"label {features.label!r} must hold whole numbers; it is declared as {kind}. Number "
            f"the classes from 0 to {features.classes - 1} in the data source."
        )


def _pandera_schema(schema: RowSchema) -> Any:
    """Pandera's schema of the checked columns; Arrow has settled types and missing values."""
    if not any(schema.checks.values()):
        return None
    from pandera.pyarrow import Column, DataFrameSchema

    return DataFrameSchema(
        {name: Column(checks=list(checks), nullable=True) for name, checks in schema.checks.items()}
    )


def _failing_rows(error: Any, rows: pa.Table) -> Mask | None:
    """Which rows fail a check, from its row-wise output; None if it judged them only together."""
    import narwhals.stable.v1 as nw
    from pandera.constants import CHECK_OUTPUT_KEY

    output = error.check_output
    if isinstance(output, nw.Expr):
        output = nw.from_native(rows).lazy().select(output.alias(CHECK_OUTPUT_KEY))
    if isinstance(output, nw.LazyFrame):
        output = output.collect()
    if isinstance(output, nw.DataFrame):
        output = nw.to_native(output)
    if not isinstance(output, pa.Table) or CHECK_OUTPUT_KEY not in output.column_names:
        return None
    passing = output.column(CHECK_OUTPUT_KEY)
    return None if len(passing) != len(rows) else ~_bools(pc.fill_null(passing, True))


def _name_of(check: Any) -> str:
    return str(getattr(check, "error", None) or getattr(check, "name", None) or check)


def _without_nan(rows: pa.Table) -> pa.Table:
    for place, item in enumerate(rows.schema):
        if pa.types.is_floating(item.type):
            column = rows.column(place)
            present = pc.if_else(pc.is_nan(column), pa.scalar(None, item.type), column)
            rows = rows.set_column(place, item.name, present)
    return rows


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    return column


def _bools(values: pa.Array | pa.ChunkedArray) -> Mask:
    found: Mask = np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=bool)
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _schema_difference(found: pa.Schema, expected: pa.Schema) -> str:
    have = {item.name: str(item.type) for item in found}
    want = {item.name: str(item.type) for item in expected}
    faults = [
        f"{n!r} must be {t}; got {have.get(n, 'nothing')}"
        for n, t in want.items()
        if have.get(n) != t
    ]
    faults += [f"{n!r} is not declared" for n in have if n not in want]
    return " and ".join(faults or ["nullability or order of columns differs from the declared"])
