"""The rows of a recorded job, read anew from their source and compared with what is stored."""

from dataclasses import dataclass
from pathlib import Path

from components.contract import Split
from components.data.snapshot import Snapshot, open_snapshot
from components.data.snapshot_files import SPLITS, require_intact
from components.data.take import take_snapshot
from components.digest import RowDigest
from components.errors import DataError
from components.pipeline import Pipeline
from components.plan import open_snapshots, open_source
from components.records import Job
from components.reproduce import Check, compare
from components.settings import Settings
from components.storage import Storage


@dataclass(frozen=True)
class RowsAgain:
    """The rows to rebuild from, and what was found about them."""

    snapshot: Snapshot
    checks: tuple[Check, ...]
    notes: tuple[str, ...]


def read_rows_again(pipeline: Pipeline, settings: Settings, job: Job, folder: Path) -> RowsAgain:
    """Read the job's window from its source, and look at the snapshot that is stored, if any.

    Where the source no longer gives the recorded rows and a snapshot has them, that one is used.

    Args:
        pipeline: Names source and features.
        settings: Say where the snapshots lie.
        job: The recorded one.
        folder: Where the rows are kept meanwhile; what is stored stays as it is.

    Raises:
        DataError: The source cannot be read, or its rows break their schema, and no snapshot has
            the recorded ones.
    """
    wanted = job.data_fingerprint
    stored, state = _stored(pipeline, settings, job)
    notes = [f"snapshot: {state}"] if state else []
    found = "damaged" if state else "not stored"  # planning takes it anew: no reason to disagree
    kept = Check(what="snapshot", recorded=wanted, rebuilt=found, agrees=None)
    if stored is not None:
        kept = compare("snapshot", wanted, stored.fingerprint)
    try:
        source = open_source(pipeline, settings)
        source.prepare()
        taken = take_snapshot(source, pipeline.features, job.as_of, Storage(folder))
    except DataError as error:
        if stored is None:
            raise
        notes.append(f"data: the source no longer gives the rows of {job.window}: {error}")
        data = compare("data", wanted, "not readable")
        return RowsAgain(stored, (data, kept), tuple(notes))
    data = compare("data", wanted, taken.fingerprint)
    if not data.agrees:
        notes.append(
            f"data: the source gives other rows for {job.window}: {wanted} was recorded, "
            f"{taken.fingerprint} is read now; {_what_differs(job, stored, taken)}."
        )
        if stored is not None:
            notes.append("data: rebuilt from the stored snapshot, which has the recorded rows.")
    return RowsAgain(taken if data.agrees or stored is None else stored, (data, kept), tuple(notes))


def _stored(pipeline: Pipeline, settings: Settings, job: Job) -> tuple[Snapshot | None, str]:
    """The stored snapshot, if every byte of it is as it was written; else what is wrong with it."""
    storage = open_snapshots(pipeline, settings)
    try:
        stored = open_snapshot(storage, job.data_fingerprint)
        if stored is not None:
            require_intact(storage.below(job.data_fingerprint), stored.manifest)
    except DataError as error:
        return None, str(error)
    return stored, ""


def _what_differs(job: Job, stored: Snapshot | None, taken: Snapshot) -> str:
    rows = [
        f"{split} has {taken.rows[split]:,} rows instead of {job.rows[split]:,}"
        for split in SPLITS
        if taken.rows[split] != job.rows.get(split)
    ]
    if rows:
        return ", ".join(rows)
    if stored is None:
        return "there are as many, and no stored snapshot to compare them with"
    if not stored.schema.equals(taken.schema):
        return f"the columns were {stored.schema.names} and are {taken.schema.names}"
    columns = [
        f"{name} ({split})"
        for split in SPLITS
        for name in stored.schema.names
        if _digest(stored, split, name) != _digest(taken, split, name)
    ]
    return f"values differ in {', '.join(columns)}"


def _digest(snapshot: Snapshot, split: Split, column: str) -> str:
    """Digest of one column, read chunk by chunk."""
    digest = RowDigest()
    for number in range(snapshot.chunks(split)):
        for batch in snapshot.chunk(split, number, [column]).to_batches():
            digest.update(batch)
    return digest.hexdigest()
