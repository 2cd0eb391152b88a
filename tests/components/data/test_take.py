"""Taking snapshots: what the fingerprint sees, what is left on disk, and what trouble does."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from support.listed_rows import DAY, FEATURES, SCHEMA, Listed, changed, made_up

from components.data.chunks import CHUNK_ROWS
from components.data.encoding import Features
from components.data.flights import FlightsSource
from components.data.schema import RowSchema
from components.data.snapshot import Snapshot, open_snapshot
from components.data.statistics import describe
from components.data.take import KEPT, take_snapshot
from components.errors import DataError, InfrastructureError
from components.storage import Storage

TRAIN, HOLDOUT = made_up(90), made_up(30, 90)


def taken(
    folder: Path | str, train: Any = TRAIN, holdout: Any = HOLDOUT, **kwargs: Any
) -> Snapshot:
    return take_snapshot(Listed(train, holdout, **kwargs), FEATURES, DAY, Storage(folder))


def fingerprint(tmp_path: Path, train: Any = TRAIN, holdout: Any = HOLDOUT, **kwargs: Any) -> str:
    return taken(tmp_path, train, holdout, **kwargs).fingerprint


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {"locks"}


def files_of(root: Path) -> Mapping[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(root)): (p.stat().st_ino, p.read_bytes())
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_a_snapshot_holds_the_rows_and_their_statistics(tmp_path: Path) -> None:
    train, holdout = made_up(2 * CHUNK_ROWS + 7), made_up(40)
    snapshot = taken(tmp_path, train, holdout)
    assert snapshot.rows == {"train": len(train), "holdout": 40}
    assert snapshot.table("train").equals(train)
    assert snapshot.table("holdout").equals(holdout)
    assert snapshot.statistics == describe(train)
    assert snapshot.holdout_statistics == describe(holdout)
    assert folders(tmp_path) == {snapshot.fingerprint}
    names = {path.name for path in (tmp_path / snapshot.fingerprint).iterdir()}
    assert names == {"train.parquet", "holdout.parquet", "manifest.json"}


@pytest.mark.parametrize("size", [1, 7, 89, 90])
def test_batches_change_neither_fingerprint_nor_bytes(tmp_path: Path, size: int) -> None:
    first, second = taken(tmp_path / "a"), taken(tmp_path / "b", size=size)
    assert first.fingerprint == second.fingerprint
    contents = [
        {name: content for name, (_, content) in files_of(tmp_path / x).items()} for x in "ab"
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("train", "holdout"),
    [
        (changed(TRAIN, "word", {3: "w9"}), HOLDOUT),
        (changed(TRAIN, "word", {3: None}), HOLDOUT),
        (changed(TRAIN, "word", {0: ""}), HOLDOUT),
        (changed(TRAIN, "number", {0: 0.0}), HOLDOUT),
        (TRAIN, changed(HOLDOUT, "label", {29: 0})),
        (TRAIN.take([1, 0, *range(2, 90)]), HOLDOUT),
        (TRAIN.slice(0, 89), HOLDOUT),
        (TRAIN, HOLDOUT.slice(1)),
        (made_up(89), made_up(31, 89)),
        (made_up(91), made_up(29, 91)),
    ],
    ids=lambda rows: None,
)
def test_the_fingerprint_sees_every_value_the_order_and_the_boundary(
    tmp_path: Path, train: pa.Table, holdout: pa.Table
) -> None:
    assert fingerprint(tmp_path, train, holdout) != fingerprint(tmp_path)


def test_the_fingerprint_sees_names_types_and_nullability(tmp_path: Path) -> None:
    features = Features(label="label", classes=2)
    schemas = (
        SCHEMA,
        SCHEMA.set(0, SCHEMA.field(0).with_name("key")),
        SCHEMA.set(0, SCHEMA.field(0).with_type(pa.int32())),
        SCHEMA.set(0, SCHEMA.field(0).with_nullable(True)),
    )
    found = set()
    for schema in schemas:
        rows = [t.rename_columns(schema.names).cast(schema) for t in (TRAIN, HOLDOUT)]
        source = Listed(*rows, schema=RowSchema(schema))
        found.add(take_snapshot(source, features, DAY, Storage(tmp_path)).fingerprint)
    assert len(found) == len(schemas)


def test_a_second_preparation_gives_the_same_fingerprint(
    sampled: Path, sampled_origin: Path, tmp_path: Path
) -> None:
    features = Features(label="late", classes=2, categorical=("carrier",), numeric=("temp",))
    again = FlightsSource(tmp_path / "flights", sampled_origin)
    again.prepare()
    prints = [
        take_snapshot(source, features, day, Storage(tmp_path / "kept")).fingerprint
        for source in (FlightsSource(sampled), again)
        for day in (DAY, date(2013, 7, 1))
    ]
    assert prints[:2] == prints[2:]
    assert prints[0] != prints[1]


def test_rows_that_are_known_are_not_written_again(tmp_path: Path) -> None:
    rows = made_up(2 * CHUNK_ROWS + 7)
    first = taken(tmp_path, rows)
    before = files_of(tmp_path)
    source = Listed(rows, HOLDOUT)
    second = take_snapshot(source, FEATURES, DAY, Storage(tmp_path))
    assert source.readings == ["train", "holdout"], "the source is read once"
    assert second.fingerprint == first.fingerprint
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("train", "holdout"),
    [
        (made_up(3 * CHUNK_ROWS), made_up(CHUNK_ROWS + 5)),
        (made_up(2 * CHUNK_ROWS), made_up(CHUNK_ROWS + 5)),
        (made_up(2 * CHUNK_ROWS + 7), made_up(CHUNK_ROWS)),
        (made_up(2 * CHUNK_ROWS + 7), made_up(CHUNK_ROWS + 6)),
        (changed(made_up(2 * CHUNK_ROWS + 7), "word", {CHUNK_ROWS: "?"}), made_up(CHUNK_ROWS + 5)),
        (made_up(2 * CHUNK_ROWS + 7), changed(made_up(CHUNK_ROWS + 5), "word", {0: "?"})),
    ],
    ids=["more", "fewer", "fewer held", "more held", "changed", "changed held"],
)
def test_rows_that_begin_like_known_ones_give_what_they_give_alone(
    tmp_path: Path, train: pa.Table, holdout: pa.Table
) -> None:
    taken(tmp_path / "a", made_up(2 * CHUNK_ROWS + 7), made_up(CHUNK_ROWS + 5))
    after, alone = (taken(tmp_path / x, train, holdout) for x in "ab")
    assert after.manifest == alone.manifest
    assert after.table("train").equals(train)
    assert after.table("holdout").equals(holdout)


def test_checks_are_made_though_the_rows_are_known(tmp_path: Path) -> None:
    import pandera.pyarrow as pandera

    taken(tmp_path)
    strict = RowSchema(SCHEMA, checks={"number": [pandera.Check.lt(50)]})
    with pytest.raises(DataError, match="'number' must pass less_than"):
        taken(tmp_path, schema=strict)


def test_the_newest_snapshots_are_kept(tmp_path: Path) -> None:
    prints = []
    for count in range(KEPT + 3):
        prints.append(fingerprint(tmp_path, made_up(20 + count)))
        os.utime(tmp_path / prints[-1] / "manifest.json", ns=(0, count * 10**9))
        if count == KEPT:  # opening counts as use
            assert open_snapshot(Storage(tmp_path), prints[2]) is not None
    assert folders(tmp_path) == {prints[2], *prints[-KEPT + 1 :]}


DAMAGE: Mapping[str, Callable[[Path], object]] = {
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "no file": lambda f: (f / "train.parquet").unlink(),
    "empty file": lambda f: (f / "holdout.parquet").write_bytes(b""),
    "cut file": lambda f: os.truncate(f / "train.parquet", 500),
    "exchanged": lambda f: shutil.copy(f / "train.parquet", f / "holdout.parquet"),
    "other manifest": lambda f: (f / "manifest.json").write_text("{}"),
    "flipped byte": lambda f: flip(f / "train.parquet", 600),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_snapshot_is_replaced(tmp_path: Path, damage: str) -> None:
    first = taken(tmp_path)
    folder = tmp_path / first.fingerprint
    good = {name: content for name, (_, content) in files_of(tmp_path).items()}
    DAMAGE[damage](folder)
    assert {n: c for n, (_, c) in files_of(tmp_path).items()} != good
    assert taken(tmp_path).fingerprint == first.fingerprint
    assert {n: c for n, (_, c) in files_of(tmp_path).items()} == good


@pytest.mark.parametrize("damage", sorted(set(DAMAGE) - {"no manifest", "flipped byte"}))
def test_a_damaged_snapshot_is_not_opened(tmp_path: Path, damage: str) -> None:
    first = taken(tmp_path)
    DAMAGE[damage](tmp_path / first.fingerprint)
    with pytest.raises(DataError, match="Start the run again: planning takes the snapshot anew"):
        open_snapshot(Storage(tmp_path), first.fingerprint)


@pytest.mark.parametrize("fail_after", [0, 1, 2])
def test_a_source_that_breaks_leaves_nothing(tmp_path: Path, fail_after: int) -> None:
    rows = made_up(3 * CHUNK_ROWS)
    with pytest.raises(RuntimeError, match="the source broke"):
        taken(tmp_path, rows, rows, size=CHUNK_ROWS, fail_after=fail_after)
    assert folders(tmp_path) == set()
    with pytest.raises(RuntimeError):
        taken(tmp_path, HOLDOUT, rows, size=CHUNK_ROWS, fail_after=1)
    assert folders(tmp_path) == set()


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond the limit, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1000, 100_000, 500_000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, limit: int) -> None:
    rows = made_up(3 * CHUNK_ROWS)
    with small_disk(limit), pytest.raises(InfrastructureError, match="have space"):
        taken(tmp_path, rows)
    assert folders(tmp_path) == set()
    assert taken(tmp_path, rows).table("train").equals(rows)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    first = taken(tmp_path)
    before = files_of(tmp_path)
    with small_disk(1000), pytest.raises(InfrastructureError):
        taken(tmp_path, made_up(3 * CHUNK_ROWS))
    assert files_of(tmp_path) == before
    assert first.table("train").equals(TRAIN)


SCRIPT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from components.data.take import take_snapshot
    from components.storage import Storage
    from support.listed_rows import DAY, FEATURES, Listed, made_up

    class Slow(Listed):
        def batches(self, split, as_of):
            for batch in super().batches(split, as_of):
                Path(sys.argv[2]).touch()
                time.sleep(float(sys.argv[3]))
                yield batch

    rows = made_up(40_000)
    print(take_snapshot(Slow(rows, rows, size=20_000), FEATURES, DAY, Storage(sys.argv[1])).rows)
    """
).replace("class Slow(Listed)", "Listed.__final__ = False\nclass Slow(Listed)")


def start(root: Path, begun: Path, pause: float, checkout: Path) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(checkout), str(checkout / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(root), str(begun), str(pause)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_a_dead_process_left_is_swept(tmp_path: Path, checkout: Path) -> None:
    root, begun = tmp_path / "root", tmp_path / "begun"
    process = start(root, begun, 60.0, checkout)
    while not begun.exists() and process.poll() is None:
        time.sleep(0.02)
    assert any(name.startswith(".taking-") for name in folders(root))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any(name.startswith(".taking-") for name in folders(root))
    snapshot = taken(root)
    assert folders(root) == {snapshot.fingerprint}


def test_processes_that_take_at_once_do_not_hurt_each_other(tmp_path: Path, checkout: Path) -> None:
    processes = [start(tmp_path / "root", tmp_path / "begun", 0.05, checkout) for _ in range(3)]
    outputs = {process.communicate()[0] for process in processes}
    assert {process.returncode for process in processes} == {0}
    assert outputs == {"{'train': 40000, 'holdout': 40000}\n"}
    (name,) = folders(tmp_path / "root")
    snapshot = open_snapshot(Storage(tmp_path / "root"), name)
    assert snapshot is not None
    assert snapshot.table("train").equals(made_up(40_000))


@pytest.fixture
def remote() -> Iterator[str]:
    """The address of a store that is not on this disk."""
    yield "memory://assay-snapshots"
    fsspec.filesystem("memory").rm("/assay-snapshots", recursive=True)


def test_snapshots_may_lie_in_an_object_store(remote: str, tmp_path: Path) -> None:
    rows = made_up(CHUNK_ROWS + 7)
    snapshot = taken(remote, rows)
    assert snapshot.fingerprint == taken(tmp_path, rows).fingerprint
    opened = open_snapshot(Storage(remote), snapshot.fingerprint)
    assert opened is not None
    assert opened.table("train").equals(rows)
    assert opened.slice("train", CHUNK_ROWS - 2, 5).equals(rows.slice(CHUNK_ROWS - 2, 5))
    assert opened.statistics == describe(rows)
    assert open_snapshot(Storage(remote), "0" * 64) is None


def test_a_damaged_snapshot_in_an_object_store_is_replaced(remote: str) -> None:
    snapshot = taken(remote)
    storage = Storage(remote).below(snapshot.fingerprint)
    content = bytearray(storage.read("train.parquet"))
    content[600] ^= 1
    storage.write("train.parquet", bytes(content))
    assert taken(remote).table("train").equals(TRAIN)


def test_an_object_store_keeps_the_newest(remote: str) -> None:
    prints = [fingerprint(remote, made_up(20 + count)) for count in range(KEPT + 2)]
    found = {n for n in Storage(remote).names() if open_snapshot(Storage(remote), n) is not None}
    assert found == set(prints[-KEPT:])


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, checkout: Path) -> None:
    script = (
        "import resource, sys, numpy as np, pyarrow as pa\n"
        "from support.listed_rows import *\n"
        "from components.data.take import take_snapshot\n"
        "from components.storage import Storage\n"
        "chunk = made_up(32768).to_batches()[0]\n"
        "source = Listed([chunk] * int(sys.argv[2]), [chunk])\n"
        "take_snapshot(source, FEATURES, DAY, Storage(sys.argv[1]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    path = os.pathsep.join([str(checkout), str(checkout / "tests")])
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", script, str(tmp_path / str(count)), str(count)],
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for count in (20, 120)
    )
    assert many < 1.1 * few, "4 million rows of 30 bytes would be 120 MB"


def test_every_row_group_is_a_chunk(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    snapshot = taken(tmp_path, made_up(2 * CHUNK_ROWS + 7))
    file = pq.ParquetFile(tmp_path / snapshot.fingerprint / "train.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [CHUNK_ROWS, CHUNK_ROWS, 7]
