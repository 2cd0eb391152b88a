"""How a snapshot lies on disk: its manifest, its writing, and the proof that it is intact."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from components.contract import Split
from components.data.chunks import CHUNK_ROWS
from components.data.statistics import Frozen, Statistics, StatisticsBuilder
from components.digest import digest_file, digest_json
from components.errors import DataError
from components.state import storage_errors, write_atomic
from components.storage import Storage

SPLITS: tuple[Split, ...] = ("train", "holdout")
MANIFEST = "manifest.json"
FORMAT = 1
"""Raise it when what is stored changes, or how statistics are computed."""
_TAIL = 8
"""Bytes at the end of a Parquet file: the length of its footer, and ``PAR1``."""


class ColumnEntry(Frozen):
    """A column of the stored rows."""

    name: str
    kind: str
    nullable: bool


class FileEntry(Frozen):
    """One split's file. ``trail`` is the rows' digest after each chunk, over both splits."""

    rows: int
    size: int
    sha256: str
    footer_sha256: str
    trail: tuple[str, ...]


class Manifest(Frozen):
    """What a snapshot holds; nothing in it depends on the time or the place of its taking."""

    format: int
    fingerprint: str
    chunk_rows: int
    columns: tuple[ColumnEntry, ...]
    files: Mapping[Split, FileEntry]
    statistics: Mapping[Split, Statistics]

    def seal(self) -> bytes:
        """JSON with the digest of its own bytes."""
        return _sealed(self.model_dump_json().encode())


def _sealed(content: bytes) -> bytes:
    sha256 = hashlib.sha256(content).hexdigest().encode()
    return b'{"sha256": "%s",\n"content": %s}\n' % (sha256, content)


def _unsealed(file: bytes) -> Manifest:
    start, end = len(_sealed(b"")) - len(b"}\n"), len(file) - len(b"}\n")
    content = file[start:end]
    if _sealed(content) != file:
        raise ValueError("its sha256 differs from the one in it")
    return Manifest.model_validate_json(content)


def file_name(split: Split) -> str:
    """The file of a split."""
    return f"{split}.parquet"


def columns_of(schema: pa.Schema) -> tuple[ColumnEntry, ...]:
    """Names, types and nullability, as they count for the fingerprint."""
    return tuple(
        ColumnEntry(name=field.name, kind=str(field.type), nullable=field.nullable)
        for field in schema
    )


def fingerprint_of(schema: pa.Schema, rows: str) -> str:
    """Digest of the columns, the chunk size and the digest of the rows."""
    columns = [column.model_dump() for column in columns_of(schema)]
    return digest_json([CHUNK_ROWS, columns, rows])


class SnapshotWriter:
    """Writes both splits below a local folder, chunk by chunk, and gathers their statistics.

    Use as a context manager; :meth:`finish` comes last.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder = folder
        self._schema = schema
        self._open = ExitStack()
        self._gathering = {split: StatisticsBuilder(schema) for split in SPLITS}
        self._trails: dict[Split, list[str]] = {split: [] for split in SPLITS}
        self._writers: dict[Split, Any] = {}

    def __enter__(self) -> "SnapshotWriter":
        """Nothing is made until rows come."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        with storage_errors(self._folder):
            self._open.close()

    def _writer(self, split: Split) -> Any:
        if split not in self._writers:
            writer = pq.ParquetWriter(
                self._folder / file_name(split),
                self._schema,
                compression="snappy",
                write_statistics=False,
                write_page_checksum=True,
                use_compliant_nested_type=False,  # or the elements of lists are renamed
            )
            self._writers[split] = self._open.enter_context(writer)
        return self._writers[split]

    def add(self, split: Split, chunk: pa.Table, digest: str) -> None:
        """Append a chunk as one row group; ``digest`` is the rows' digest after it."""
        self._gathering[split].add(chunk)
        self._trails[split].append(digest)
        with storage_errors(self._folder):
            self._writer(split).write_table(chunk, row_group_size=CHUNK_ROWS)

    def finish(self, rows: str) -> Manifest:
        """Close the files and seal the manifest beside them; ``rows`` is the digest of all rows."""
        statistics = {split: builder.finish() for split, builder in self._gathering.items()}
        with storage_errors(self._folder):
            self._open.close()
            manifest = Manifest(
                format=FORMAT,
                fingerprint=fingerprint_of(self._schema, rows),
                chunk_rows=CHUNK_ROWS,
                columns=columns_of(self._schema),
                files={split: self._entry(split, statistics[split].rows) for split in SPLITS},
                statistics=statistics,
            )
            write_atomic(self._folder / MANIFEST, manifest.seal())
        return manifest

    def _entry(self, split: Split, rows: int) -> FileEntry:
        path = self._folder / file_name(split)
        _sync(path)
        return FileEntry(
            rows=rows,
            size=path.stat().st_size,
            sha256=digest_file(path),
            footer_sha256=hashlib.sha256(_footer(Storage(self._folder), path.name)).hexdigest(),
            trail=tuple(self._trails[split]),
        )


def read_manifest(storage: Storage, fingerprint: str) -> Manifest | None:
    """The manifest of a stored snapshot, its seal and the ends of its files checked.

    Args:
        storage: The snapshot's own folder.
        fingerprint: What it must be of.

    Raises:
        DataError: The manifest is broken, or a file is missing, or was cut or replaced.
    """
    try:
        content = storage.read(MANIFEST)
    except FileNotFoundError:
        return None
    try:
        manifest = _unsealed(content)
        known = (FORMAT, fingerprint, CHUNK_ROWS)
        if (manifest.format, manifest.fingerprint, manifest.chunk_rows) != known:
            raise ValueError("it is of another snapshot, or of another version of assay")
    except ValidationError as error:
        raise damaged(storage, MANIFEST, f"{error.error_count()} of its fields differ") from error
    except ValueError as error:
        raise damaged(storage, MANIFEST, str(error)) from error
    for split, entry in manifest.files.items():
        _require_ends(storage, file_name(split), entry)
    return manifest


def require_intact(storage: Storage, manifest: Manifest) -> None:
    """Check every byte of a snapshot's files.

    Raises:
        DataError: A file is missing or changed.
    """
    for split, entry in manifest.files.items():
        name = file_name(split)
        sha = hashlib.sha256()
        try:
            with storage.open(name) as stream:
                while piece := stream.read(1 << 20):
                    sha.update(piece)
        except OSError as error:
            raise damaged(storage, name, str(error)) from error
        if sha.hexdigest() != entry.sha256:
            raise damaged(storage, name, "its sha256 differs from the manifest's")


def damaged(storage: Storage, name: str, what: str) -> DataError:
    """The refusal of a snapshot whose file is not as it was written."""
    return DataError(
        f"a snapshot must be as it was written; {storage.path(name)} is not: {what}. Start the run "
        f"again: planning takes the snapshot anew. Or delete {storage.shown}."
    )


def _require_ends(storage: Storage, name: str, entry: FileEntry) -> None:
    try:
        size = storage.filesystem.size(storage.path(name))
        if size != entry.size:
            raise damaged(storage, name, f"it has {size:,} bytes instead of {entry.size:,}")
        footer = _footer(storage, name)
    except (OSError, ValueError) as error:
        raise damaged(storage, name, str(error)) from error
    if hashlib.sha256(footer).hexdigest() != entry.footer_sha256:
        raise damaged(storage, name, "its footer differs from the manifest's")


def _footer(storage: Storage, name: str) -> bytes:
    """The part of a Parquet file that says where everything lies."""
    size = storage.filesystem.size(storage.path(name))
    with storage.open(name) as stream:
        stream.seek(max(0, size - _TAIL))
        tail: bytes = stream.read(_TAIL)
        start = size - _TAIL - int.from_bytes(tail[:4], "little")
        if start < 0:
            raise ValueError("it is no Parquet file")
        stream.seek(start)
        return bytes(stream.read(size - start))


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
