"""Turning what a file or a database gives into the declared Arrow types, without loss.

Files state their own types, so only a type that holds every value of theirs is accepted
(:func:`conform`). Databases and drivers are looser: text may be a date and a double a float32, so
there every value must be one of the declared type (:func:`from_rows`).
"""

import itertools
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from components.errors import DataError

_MANTISSA = {16: 11, 32: 24, 64: 53}
"""Bits of a float, by its width: integers of at most so many bits are exact."""


def widens(found: pa.DataType, declared: pa.DataType) -> bool:
    """Whether the declared type holds every value of the found one.

    A timestamp may have another unit and a list any length: values that do not fit are refused
    where they are cast.
    """
    kinds = pa.types
    if kinds.is_dictionary(found):
        return widens(found.value_type, declared)
    if found == declared or kinds.is_null(found):
        return True
    for family in (_is_text, _is_binary):
        if family(found) and family(declared):
            return True
    if kinds.is_integer(found) and kinds.is_integer(declared):
        return _holds_integers(found, declared)
    if kinds.is_integer(found) and kinds.is_floating(declared):
        sign = kinds.is_signed_integer(found)
        return bool(found.bit_width - sign <= _MANTISSA[declared.bit_width])
    if kinds.is_floating(found) and kinds.is_floating(declared):
        return bool(found.bit_width <= declared.bit_width)
    if kinds.is_decimal(found) and kinds.is_decimal(declared):
        whole = declared.precision - declared.scale >= found.precision - found.scale
        return bool(whole and declared.scale >= found.scale)
    if kinds.is_timestamp(found) and kinds.is_timestamp(declared):
        return (found.tz is None) == (declared.tz is None)
    if _is_list(found) and _is_list(declared):
        return widens(found.value_type, declared.value_type)
    return False


def _holds_integers(found: pa.DataType, declared: pa.DataType) -> bool:
    signed = pa.types.is_signed_integer
    if signed(found) == signed(declared):
        return bool(found.bit_width <= declared.bit_width)
    return bool(signed(declared) and found.bit_width < declared.bit_width)


def _is_text(kind: pa.DataType) -> bool:
    kinds = pa.types
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    kinds = pa.types
    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    kinds = pa.types
    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def check_types(found: pa.Schema, declared: pa.Schema, where: str) -> None:
    """Compare the columns that a file has with those declared; all differences are reported.

    Raises:
        DataError: A column is missing, there twice, or of a type that does not fit.
    """
    faults = []
    for field in declared:
        places = found.get_all_field_indices(field.name)
        if len(places) != 1:
            faults.append(f"{field.name!r} is there {len(places)} times")
        elif not widens(kind := found.field(places[0]).type, field.type):
            faults.append(f"{field.name!r} must be {field.type}; found {kind}")
    if faults:
        raise DataError(
            f"columns must have their declared types; in {where}: {'; '.join(faults)}. Write the "
            "data again with the declared types, or change the source's schema."
        )


def conform(batch: pa.RecordBatch, declared: pa.Schema, where: str) -> pa.RecordBatch:
    """Take the declared columns of a batch, in their order, as the declared types.

    Raises:
        DataError: A column is missing or of another type, or a value does not fit.
    """
    if batch.schema.equals(declared):
        return batch.replace_schema_metadata(declared.metadata)
    check_types(batch.schema, declared, where)
    columns, faults = [], []
    for field in declared:
        try:
            columns.append(_exact(batch.column(field.name), field.type))
        except pa.ArrowException as error:
            faults.append(f"{field.name!r} must be {field.type}: {error}")
    _raise_values(faults, where)
    return pa.RecordBatch.from_arrays(columns, schema=declared)


def _exact(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if column.type == kind else column.cast(kind)


def from_rows(rows: Sequence[Sequence[Any]], declared: pa.Schema, where: str) -> pa.RecordBatch:
    """Build a batch of Python values, None where missing, one row after the other.

    Integers fit where their value does, 0 and 1 are booleans, a number becomes the nearest float,
    and text in ISO 8601 is a date or a timestamp.

    Raises:
        DataError: A value is not one of the declared type.
    """
    columns, faults = [], []
    values = zip(*rows, strict=True) if rows else itertools.repeat((), len(declared))
    for field, column in zip(declared, values, strict=not rows):
        try:
            columns.append(_column(column, field.type))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            faults.append(f"{field.name!r} must be {field.type}: {_reason(column, error)}")
    _raise_values(faults, where)
    return pa.RecordBatch.from_arrays(columns, schema=declared)


def _raise_values(faults: list[str], where: str) -> None:
    if faults:
        raise DataError(
            f"values must be of their declared types; in {where}: {'; '.join(faults)}. Mend the "
            "data, or declare in the source's schema the type that it has."
        )


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if Decimal in kinds and pa.types.is_floating(kind):
        values = [float(value) if isinstance(value, Decimal) else value for value in values]
        kinds = kinds - {Decimal} | {float}
    if len(kinds) > 1 and not kinds <= {int, float}:
        raise TypeError  # Arrow would make dates of dates and times
    found = pa.array(values, kind if _is_list(kind) else None)
    if pa.types.is_boolean(kind) and pa.types.is_integer(found.type):
        return _booleans(found)
    if pa.types.is_floating(kind) and _is_number(found.type):
        return _floats(found, kind)
    if not (widens(found.type, kind) or _may_fit(found.type, kind)):
        raise TypeError
    return found.cast(kind)


def _may_fit(found: pa.DataType, declared: pa.DataType) -> bool:
    """Whether Arrow's cast takes the values that fit, and refuses the others."""
    if _is_text(found):
        return bool(pa.types.is_date32(declared) or pa.types.is_timestamp(declared))
    families = (pa.types.is_integer, pa.types.is_decimal)
    return any(family(found) and family(declared) for family in families)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _booleans(found: pa.Array) -> pa.Array:
    if not pc.all(pc.is_in(found, pa.array([0, 1, None], found.type))).as_py():
        raise ValueError("only 0 and 1 are booleans")
    return found.cast(pa.bool_())


def _floats(found: pa.Array, kind: pa.DataType) -> pa.Array:
    """The nearest floats; integers must be exact, and nothing may become infinite."""
    nearest = found.cast(kind, safe=False)
    if pa.types.is_integer(found.type):
        again = nearest.cast(pa.float64()).cast(found.type, safe=False)
        if pc.all(pc.equal(again, found)).as_py() is False:
            raise ValueError("an integer is too long to be exact")
    elif pc.all(pc.equal(pc.is_inf(nearest), pc.is_inf(found))).as_py() is False:
        raise ValueError("a number is too large")
    return nearest


def _reason(values: Sequence[Any], error: Exception) -> str:
    """What is there: Python's types with an example each, or Arrow's complaint."""
    examples: dict[str, Any] = {}
    for value in values:
        if value is not None:
            examples.setdefault(type(value).__name__, value)
    text = str(error) or "another type"
    found = ", ".join(f"{name} such as {_short(value)}" for name, value in examples.items())
    return f"found {found} ({text})"


def _short(value: object) -> str:
    text = value.isoformat() if isinstance(value, date | datetime) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
