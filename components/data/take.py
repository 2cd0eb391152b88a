"""Taking a snapshot: one pass over the source that checks, digests, summarises and stores rows."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from components.contract import DataSource
from components.data.chunks import rechunk
from components.data.encoding import Features
from components.data.quality import QualityCheck
from components.data.snapshot import Snapshot, open_snapshot
from components.data.snapshot_files import (
    MANIFEST,
    SPLITS,
    Manifest,
    SnapshotWriter,
    file_name,
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
    with _workplace(storage) as work:
        manifest = _read(source, features, as_of, work)
        snapshot = _settle(storage, work, manifest)
        _prune(storage, snapshot.fingerprint)
    return snapshot


def _read(source: DataSource, features: Features, as_of: date, work: Path) -> Manifest:
    """Stream both splits into a folder."""
    schema = source.schema()
    quality = QualityCheck(schema, features)
    rows = RowDigest()
    with SnapshotWriter(work, schema.arrow) as writer:
        for split in SPLITS:
            rows.mark()
            quality.begin(split, source.window(as_of))
            batches = quality.conforming(source.batches(split, as_of))
            for chunk in rechunk(batches, schema.arrow):
                quality.check(chunk)
                for batch in chunk.to_batches():
                    rows.update(batch)
                if quality.passed:  # otherwise it is read on only to find every fault
                    writer.add(split, chunk, rows.hexdigest())
            quality.end()
        quality.require_passed()
        return writer.finish(rows.hexdigest())


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
    used = {}
    for name in storage.names():
        if _FINGERPRINT.fullmatch(name) and name != current:
            path = storage.below(name).path(MANIFEST)
            try:
                used[name] = storage.filesystem.modified(path)
            except FileNotFoundError:
                if storage.local is not None:
                    storage.below(name).clear()
    for name in sorted(used, key=lambda name: used[name], reverse=True)[KEPT - 1 :]:
        storage.below(name).delete(MANIFEST)
        storage.below(name).clear()
