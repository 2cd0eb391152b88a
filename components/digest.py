"""Digests: the sha256 of files, of JSON values, of Arrow rows and of source code."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

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
        """Add a batch; every batch must have the same columns."""
        self.rows += batch.num_rows
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            self._update_column(name, column)

    def _update_column(self, name: str, column: pa.Array) -> None:
        kind = str(column.type).replace("large_", "")
        if name not in self._columns:
            parts = (hashlib.sha256(), hashlib.sha256(), hashlib.sha256())
            self._columns[name] = (kind, *parts)
        _, validity, lengths, values = self._columns[name]
        validity.update(pc.is_valid(column).cast(pa.uint8()).to_numpy(zero_copy_only=False))
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            filled = column.fill_null("")
            lengths.update(pc.binary_length(filled).cast(pa.int64()).to_numpy())
            values.update("".join(filled.to_pylist()).encode())
        elif pa.types.is_fixed_size_list(column.type):
            values.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
        else:
            number = column.view(f"int{column.type.bit_width}") if _is_time(column.type) else column
            zero = pa.scalar(0).cast(number.type)
            values.update(number.fill_null(zero).to_numpy(zero_copy_only=False).tobytes())

    def hexdigest(self) -> str:
        """Hex sha256 of all rows seen so far."""
        columns = [
            [name, kind, validity.hexdigest(), lengths.hexdigest(), values.hexdigest()]
            for name, (kind, validity, lengths, values) in self._columns.items()
        ]
        return digest_json([self.rows, self._marks, columns])


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_temporal(kind))
