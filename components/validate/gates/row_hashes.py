"""64-bit hashes of rows, equal for equal values, whatever chunk or Arrow type they come in.

Numbers are mixed by the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); text and
lists by BLAKE2b. Two different rows share a hash with a chance of 1 in 2^64.

Legend: B = rows.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Hashes = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MISSING = np.uint64(0x6A09E667F3BCC909)


def hash_rows(rows: pa.Table, columns: Sequence[str]) -> Hashes:
    """Hashes (B,) of the named columns together; the order of the columns counts.

    Integers and floats of one value are equal, as are 0 and -0, and every NaN; a missing value
    equals only a missing one.
    """
    found = np.zeros(rows.num_rows, dtype=np.uint64)
    for name in columns:
        column = rows.column(name).combine_chunks()
        if pa.types.is_dictionary(column.type):  # which may hold missing values too
            column = column.cast(column.type.value_type)
        hashed = _hash_column(column)
        if column.null_count:
            hashed = np.where(column.is_null().to_numpy(zero_copy_only=False), _MISSING, hashed)
        found = _mix(found * _STEP + hashed)
    return found


def _hash_column(column: pa.Array) -> Hashes:
    kind = column.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return _hash_lists(column)
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return _hash_numbers(column)
    return _hash_texts(column)


def _hash_numbers(column: pa.Array) -> Hashes:
    if pa.types.is_integer(column.type) and column.type.bit_width == 64:
        # Beyond 2^53 float64 would make neighbours equal; those of the same value stay equal.
        whole = column.fill_null(0).to_numpy(zero_copy_only=False)
        wide = np.abs(whole.astype(np.float64)) >= 2.0**53
        plain = _hash_floats(whole.astype(np.float64))
        return np.where(wide, _mix(whole.view(np.uint64)), plain)
    return _hash_floats(column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64))


def _hash_floats(values: npt.NDArray[np.float64]) -> Hashes:
    return _mix(_plain(values).view(np.uint64))


def _plain(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """With one NaN and one zero: -0.0 + 0.0 is 0.0."""
    return np.where(np.isnan(values), np.nan, values + 0.0)


def _hash_texts(column: pa.Array) -> Hashes:
    """Each distinct value is hashed once, as text."""
    coded = pc.dictionary_encode(column)
    words = coded.dictionary.cast(pa.string()).to_pylist()
    table = np.array([*map(_digest, map(str.encode, words)), 0], dtype=np.uint64)
    codes = coded.indices.fill_null(len(words)).to_numpy(zero_copy_only=False)
    return np.asarray(table[codes], dtype=np.uint64)


def _hash_lists(column: pa.Array) -> Hashes:
    if not pa.types.is_fixed_size_list(column.type):
        return np.array([_digest(repr(row).encode()) for row in column.to_pylist()], np.uint64)
    size = column.type.list_size
    filled = column.flatten() if not column.null_count else _without_nulls(column)
    numbers = _plain(filled.cast(pa.float64()).to_numpy(zero_copy_only=False)).reshape(-1, size)
    return np.array([_digest(row.tobytes()) for row in numbers], dtype=np.uint64)


def _without_nulls(column: pa.Array) -> pa.Array:
    """The values of a list column, missing lists as zeros."""
    size = column.type.list_size
    places = pc.if_else(column.is_valid(), 1, 0).to_numpy(zero_copy_only=False)
    table = np.zeros((len(column), size))
    table[places == 1] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
    return pa.array(table.ravel())


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _mix(values: Hashes) -> Hashes:
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
