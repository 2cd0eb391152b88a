"""Digests: the sha256 of files, of JSON values, of Arrow rows and of source code."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.errors import DataError

_CHUNK = 1 << 20


def digest_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces of 1 MiB."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def digest_json(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of key order and white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_sources(roots: Iterable[Path]) -> str:
    """Hex sha256 over names and bytes of the given files, and of all ``.py`` files below folders.

    Names count from the root's own, so another checkout of the same code has the same digest.
    """
    sha = hashlib.sha256()
    for root in sorted(set(roots), key=lambda path: (path.name, path)):
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            sha.update(f"{root.name}/{path.relative_to(root).as_posix()}\0".encode())
            sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


class RowDigest:
    """Digest of rows in order, the same however they are cut into batches or stored.

    Each column is hashed by itself: validity, then values with nulls as zero, so that neither
    chunking, nor dictionary encoding, nor what lies in a null slot can change the result.
    """

    def __init__(self) -> None:
        self._columns: dict[str, tuple[str, Any, Any, Any]] = {}
        self._marks: list[int] = []
        self.rows = 0

    def mark(self) -> None:
        """Start a new part: moving a row from one part to the next changes the digest."""
        self._marks.append(self.rows)

    def update(self, batch: pa.RecordBatch) -> None:
        """Add a batch; every batch must have the same columns.

        Raises:
            DataError: A column is of a type that has no digest.
        """
        self.rows += batch.num_rows
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            self._update_column(name, column)

    def _update_column(self, name: str, column: pa.Array) -> None:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if name not in self._columns:
            kind = str(column.type).replace("large_", "")
            parts = (hashlib.sha256(), hashlib.sha256(), hashlib.sha256())
            self._columns[name] = (kind, *parts)
        _, validity, lengths, values = self._columns[name]
        validity.update(pc.is_valid(column).cast(pa.uint8()).to_numpy(zero_copy_only=False))
        if _is_text(column.type):
            sizes, content = _text(column)
            lengths.update(sizes)
            values.update(content)
        elif pa.types.is_fixed_size_list(column.type):
            self._update_column(f"{name}[]", column.flatten())
        elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            sizes = pc.fill_null(pc.list_value_length(column).cast(pa.int64()), 0)
            lengths.update(sizes.to_numpy(zero_copy_only=False))
            self._update_column(f"{name}[]", column.flatten())
        else:
            values.update(_fixed_width(name, column))

    def hexdigest(self) -> str:
        """Hex sha256 of all rows seen so far."""
        columns = [
            [name, kind, validity.hexdigest(), lengths.hexdigest(), values.hexdigest()]
            for name, (kind, validity, lengths, values) in self._columns.items()
        ]
        return digest_json([self.rows, self._marks, columns])


def _is_text(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    return any(test(kind) for test in tests)


def _text(column: pa.Array) -> tuple[npt.NDArray[np.int64], memoryview]:
    """Lengths and bytes of all values in a row, straight from Arrow's buffers."""
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    if column.null_count:  # the slot of a missing value may hold bytes
        column = pc.fill_null(column, pa.scalar("").cast(column.type))
    if not len(column):
        return np.empty(0, np.int64), memoryview(b"")
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int64 if large else np.int32, len(column) + 1 + column.offset)
    ends = ends[column.offset :].astype(np.int64)
    return np.diff(ends), memoryview(content or b"")[int(ends[0]) : int(ends[-1])]


def _fixed_width(name: str, column: pa.Array) -> Any:
    """Values of one width, each missing one as zero."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column, kind = column.cast(pa.uint8()), pa.uint8()
    try:
        width = kind.bit_width // 8
    except ValueError:
        raise DataError(
            f"column {name!r} must be of a type whose rows can be digested: numbers, text, times "
            f"or lists of these; got {kind}. Change it in the data source."
        ) from None
    if not len(column):
        return b""
    start = column.offset * width
    content = memoryview(column.buffers()[1])[start : start + len(column) * width]
    if not column.null_count:
        return content
    rows = np.frombuffer(content, np.uint8).reshape(len(column), width).copy()
    rows[pc.is_null(column).to_numpy(zero_copy_only=False)] = 0
    return rows
