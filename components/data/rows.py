"""Rows of a split as one table, and the fingerprint of all rows that a run sees."""

from dataclasses import dataclass
from datetime import date

import pyarrow as pa

from components.contract import DataSource, Split
from components.data.encoding import Features
from components.digest import RowDigest
from components.errors import DataError

SPLITS: tuple[Split, ...] = ("train", "holdout")


@dataclass(frozen=True)
class Dataset:
    """Both splits of a window, with their common fingerprint."""

    train: pa.Table
    holdout: pa.Table
    fingerprint: str


def load_rows(source: DataSource, split: Split, as_of: date, features: Features) -> pa.Table:
    """Read a split whole, in the source's order.

    Raises:
        DataError: A column of the features is missing, or the split has no rows.
    """
    schema = source.schema()
    missing = [name for name in features.columns if name not in schema.names]
    if missing:
        raise DataError(
            f"the data source must give every column of the features; missing: "
            f"{', '.join(missing)}; present: {', '.join(schema.names)}. Add them to the source, "
            "or take them from the pipeline's features."
        )
    batches = list(source.batches(split, as_of))
    for batch in batches:
        if not batch.schema.equals(schema):
            raise DataError(_schema_difference(batch.schema, schema))
    table = pa.Table.from_batches(batches, schema=schema)
    if not table.num_rows:
        raise DataError(
            f"the {split} split of {source.window(as_of)} must have rows; it is empty. Choose "
            "another as_of, or mend the data source."
        )
    _require_values(table)
    return table


def load_dataset(source: DataSource, as_of: date, features: Features) -> Dataset:
    """Read both splits and digest every row of them.

    Raises:
        DataError: As :func:`load_rows`.
    """
    source.prepare()
    train, holdout = (load_rows(source, split, as_of, features) for split in SPLITS)
    rows = RowDigest()
    for table in (train, holdout):
        rows.mark()
        for batch in table.to_batches():
            rows.update(batch)
    return Dataset(train, holdout, rows.hexdigest())


def _require_values(table: pa.Table) -> None:
    faults = [
        f"{field.name}: {table.column(field.name).null_count} of {table.num_rows} missing"
        for field in table.schema
        if not field.nullable and table.column(field.name).null_count
    ]
    if faults:
        raise DataError(
            "a column that is declared not nullable must have a value in every row; got "
            + "; ".join(faults)
            + ". Drop these rows in the source, or declare the column nullable."
        )


def _schema_difference(found: pa.Schema, expected: pa.Schema) -> str:
    have = {field.name: str(field.type) for field in found}
    want = {field.name: str(field.type) for field in expected}
    faults = [
        f"{n!r} must be {t}; got {have.get(n, 'nothing')}"
        for n, t in want.items()
        if have.get(n) != t
    ]
    faults += [f"{n!r} is not declared" for n in have if n not in want]
    return (
        "rows must have the columns that the source declares: "
        + "; ".join(faults or ["nullability or order differs"])
        + ". Mend the data, or the source's schema."
    )
