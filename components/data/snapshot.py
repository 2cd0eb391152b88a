"""The rows of a run, read once from the source and kept for every stage.

A snapshot is two Parquet files with a row group per chunk, found by the fingerprint of their rows.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq

from components.contract import Split
from components.data.chunks import CHUNK_ROWS, chunk_count
from components.data.snapshot_files import (
    MANIFEST,
    SPLITS,
    Manifest,
    columns_of,
    damaged,
    file_name,
    read_manifest,
)
from components.data.statistics import Statistics
from components.storage import Storage


@final
class Snapshot:
    """Rows of both splits, read chunk by chunk; nothing that was read is kept.

    Threads may read at the same time; they take turns at a file.

    Args:
        storage: The snapshot's own folder.
        manifest: What lies there.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage = storage
        self.manifest = manifest
        self._files = {split: _File(storage, split) for split in SPLITS}
        self.fingerprint = manifest.fingerprint
        self.rows: Mapping[Split, int] = {s: manifest.files[s].rows for s in SPLITS}
        self.schema: pa.Schema = self._files["train"].schema()
        if columns_of(self.schema) != manifest.columns:
            raise damaged(storage, file_name("train"), f"it has the columns {self.schema.names}")

    @property
    def statistics(self) -> Statistics:
        """Of the training rows."""
        return self.manifest.statistics["train"]

    @property
    def holdout_statistics(self) -> Statistics:
        """Of the held-out rows."""
        return self.manifest.statistics["holdout"]

    def trail(self, split: Split) -> tuple[str, ...]:
        """Digest of all rows up to the end of each chunk, those of earlier splits included."""
        return self.manifest.files[split].trail

    def chunks(self, split: Split) -> int:
        """How many chunks a split has; each but the last has ``CHUNK_ROWS`` rows."""
        return chunk_count(self.rows[split])

    def chunk(self, split: Split, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One chunk of a split, with all columns or the named ones in their order.

        Raises:
            DataError: The stored rows are damaged.
        """
        return self._files[split].read([number], self._names(columns))

    def table(self, split: Split, columns: Sequence[str] | None = None) -> pa.Table:
        """A split whole.

        Raises:
            DataError: The stored rows are damaged.
        """
        return self._files[split].read(range(self.chunks(split)), self._names(columns))

    def slice(
        self, split: Split, start: int, count: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """At most ``count`` rows from row ``start`` on; only their chunks are read.

        Raises:
            DataError: The stored rows are damaged.
        """
        stop = min(start + count, self.rows[split])
        numbers = range(start // CHUNK_ROWS, chunk_count(max(stop, start)))
        if start >= stop:
            return self.schema.empty_table().select(self._names(columns))
        rows = self._files[split].read(numbers, self._names(columns))
        return rows.slice(start - numbers[0] * CHUNK_ROWS, stop - start)

    def _names(self, columns: Sequence[str] | None) -> list[str]:
        return list(self.schema.names if columns is None else columns)


class _File:
    """One split's file, opened when it is first read."""

    def __init__(self, storage: Storage, split: Split) -> None:
        self._storage = storage
        self._name = file_name(split)
        self._lock = threading.Lock()
        self._opened: Any = None

    def schema(self) -> pa.Schema:
        with self._lock:
            return self._guarded(lambda: self._file().schema_arrow.remove_metadata())

    def read(self, chunks: Sequence[int], names: list[str]) -> pa.Table:
        with self._lock:
            return self._guarded(
                lambda: (
                    self._file()
                    .read_row_groups(list(chunks), columns=names, use_threads=False)
                    .select(names)
                )
            )

    def _guarded(self, read: Any) -> Any:
        try:
            return read()
        except (OSError, ValueError) as error:
            raise damaged(self._storage, self._name, str(error)) from error

    def _file(self) -> Any:
        if self._opened is None:
            local = self._storage.local
            path = self._storage.path(self._name)
            self._opened = pq.ParquetFile(
                path if local else self._storage.filesystem.open(path, "rb"),
                page_checksum_verification=True,
                pre_buffer=local is None,
            )
        return self._opened


def open_snapshot(storage: Storage, fingerprint: str) -> Snapshot | None:
    """A stored snapshot, which is noted as used; None where there is none.

    Args:
        storage: The folder of a pipeline's snapshots.
        fingerprint: That of the rows.

    Raises:
        DataError: It is damaged.
    """
    snapshot = look_at_snapshot(storage, fingerprint)
    if snapshot is not None:
        note_use(storage, fingerprint)
    return snapshot


def look_at_snapshot(storage: Storage, fingerprint: str) -> Snapshot | None:
    """As :func:`open_snapshot`, but it does not count as used."""
    folder = storage.below(fingerprint)
    manifest = read_manifest(folder, fingerprint)
    return None if manifest is None else Snapshot(folder, manifest)


def note_use(storage: Storage, fingerprint: str) -> None:
    """Note that a snapshot was used: the one whose use is longest ago is deleted first."""
    folder = storage.below(fingerprint)
    if folder.local is not None:
        os.utime(folder.local / MANIFEST)
    else:
        folder.write(MANIFEST, folder.read(MANIFEST))
