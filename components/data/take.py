"""Taking a snapshot: one pass over the source that checks, digests, summarises and stores rows."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa

from components.contract import DataSource, Split
from components.data.chunks import rechunk
from components.data.encoding import Features
from components.data.quality import QualityCheck
from components.data.snapshot import Snapshot, look_at_snapshot, note_use, open_snapshot
from components.data.snapshot_files import (
    MANIFEST,
    SPLITS,
    Manifest,
    SnapshotWriter,
    file_name,
    fingerprint_of,
    read_manifest,
    require_intact,
)
from components.digest import RowDigest
from components.errors import DataError
from components.state import exclusive, storage_errors
from components.storage import Storage

KEPT = 5
"""Snapshots that are kept per pipeline."""
_TAKING = ".taking-"
_FINGERPRINT = re.compile("[0-9a-f]{64}")


def take_snapshot(
    source: DataSource, features: Features, as_of: date, storage: Storage
) -> Snapshot:
    """Read the window's rows from their source and keep them.

    A snapshot with the same fingerprint is used again, if it is intact.

    Args:
        source: Prepared rows.
        features: Columns that must be there, and the label's classes.
        as_of: The date of the run.
        storage: The folder of the pipeline's snapshots.

    Raises:
        DataError: A column is missing, a split is empty, or rows break a rule of their schema; the
            message has every broken rule.
        InfrastructureError: The folder cannot be written, or the disk is full.
    """
    schema = source.schema()
    quality = QualityCheck(schema, features)
    rows = RowDigest()
    with _workplace(storage) as work, _Copying(storage, work, schema.arrow) as copying:
        for split in SPLITS:
            rows.mark()
            quality.begin(split, source.window(as_of))
            batches = quality.conforming(source.batches(split, as_of))
            for chunk in rechunk(batches, schema.arrow):
                quality.check(chunk)
                for batch in chunk.to_batches():
                    rows.update(batch)
                if quality.passed:  # otherwise it is read on only to find every fault
                    copying.add(split, chunk, rows.hexdigest())
            quality.end()
        quality.require_passed()
        snapshot = copying.finish(rows.hexdigest())
        _prune(storage, snapshot.fingerprint)
    return snapshot


class _Copying:
    """Stores the rows that pass by, unless the snapshot that was used last has the same.

    As long as they are the same, nothing is written. When they begin to differ, the rows that have
    passed are taken from that snapshot.
    """

    def __init__(self, storage: Storage, work: Path, schema: pa.Schema) -> None:
        self._storage = storage
        self._work = work
        self._schema = schema
        self._writer = SnapshotWriter(work, schema)
        self._alike: list[tuple[Split, int, str]] = []
        self._known = _last_used(storage, schema) if storage.local is not None else None

    def __enter__(self) -> "_Copying":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)

    def add(self, split: Split, chunk: pa.Table, digest: str) -> None:
        """Take the next chunk; ``digest`` is that of all rows up to its end."""
        if self._known is not None:
            number = sum(1 for other, _, _ in self._alike if other == split)
            if self._known.trail(split)[number : number + 1] == (digest,):
                self._alike.append((split, number, digest))
                return
            self._catch_up()
        self._writer.add(split, chunk, digest)

    def _catch_up(self) -> None:
        assert self._known is not None
        for split, number, digest in self._alike:
            self._writer.add(split, self._known.chunk(split, number), digest)
        self._known = None

    def finish(self, rows: str) -> Snapshot:
        """The snapshot of everything that passed."""
        if self._known is not None:
            if self._known.fingerprint == fingerprint_of(self._schema, rows):
                note_use(self._storage, self._known.fingerprint)
                return self._known
            self._catch_up()  # the known one has more rows
        manifest = self._writer.finish(rows)
        return _settle(self._storage, self._work, manifest)


def _last_used(storage: Storage, schema: pa.Schema) -> Snapshot | None:
    """The snapshot that was used last, if it is intact and has the same columns."""
    used = _use(storage)
    for name in sorted(used, key=lambda name: used[name], reverse=True)[:1]:
        with contextlib.suppress(DataError):
            snapshot = look_at_snapshot(storage, name)
            if snapshot is not None and snapshot.schema.equals(schema):
                require_intact(storage.below(name), snapshot.manifest)
                return snapshot
    return None


def _use(storage: Storage) -> dict[str, Any]:
    """When each stored snapshot was last used, by fingerprint."""
    used = {}
    for name in storage.names():
        if _FINGERPRINT.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                used[name] = storage.filesystem.modified(storage.below(name).path(MANIFEST))
    return used


@contextlib.contextmanager
def _workplace(storage: Storage) -> Iterator[Path]:
    """An empty local folder; where snapshots are local, processes take turns."""
    if storage.local is None:
        with tempfile.TemporaryDirectory(prefix="assay-snapshot-") as folder:
            yield Path(folder)
        return
    root = storage.local
    with exclusive(root, "take"):
        for left in root.glob(f"{_TAKING}*"):  # by a process that died
            shutil.rmtree(left, ignore_errors=True)
        with storage_errors(root):
            work = Path(tempfile.mkdtemp(dir=root, prefix=_TAKING))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _settle(storage: Storage, work: Path, manifest: Manifest) -> Snapshot:
    """Bring a finished snapshot to its place, unless an intact one is there."""
    folder = storage.below(manifest.fingerprint)
    if not _is_intact(folder, manifest.fingerprint):
        if storage.local is not None:
            target = storage.local / manifest.fingerprint
            with storage_errors(target):
                if target.exists():
                    shutil.rmtree(target)
                work.rename(target)
        else:
            _upload(folder, work)
    snapshot = open_snapshot(storage, manifest.fingerprint)
    assert snapshot is not None, "it was put there"
    return snapshot


def _is_intact(folder: Storage, fingerprint: str) -> bool:
    try:
        manifest = read_manifest(folder, fingerprint)
        if manifest is not None:
            require_intact(folder, manifest)
    except DataError:
        return False
    return manifest is not None


def _upload(folder: Storage, work: Path) -> None:
    """Copy files to another machine; the manifest comes last, so a snapshot is whole or absent."""
    folder.delete(MANIFEST)
    folder.filesystem.makedirs(str(folder.root), exist_ok=True)
    for split in SPLITS:
        name = file_name(split)
        folder.filesystem.put_file(str(work / name), folder.path(name))
    folder.write(MANIFEST, (work / MANIFEST).read_bytes())


def _prune(storage: Storage, current: str) -> None:
    """Delete snapshots beyond the newest few, and what lacks a manifest on this disk."""
    used = _use(storage)
    others = sorted(used.keys() - {current}, key=lambda name: used[name], reverse=True)
    for name in others[KEPT - 1 :]:
        storage.below(name).delete(MANIFEST)
        storage.below(name).clear()
    if storage.local is not None:
        for name in storage.names():
            if _FINGERPRINT.fullmatch(name) and name not in used:
                storage.below(name).clear()
