"""Reading a snapshot: any part of it, from several threads, and never a byte that was changed."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.listed_rows import DAY, FEATURES, Listed, made_up

from components.data.chunks import CHUNK_ROWS, rechunk
from components.data.encoding import Features
from components.data.schema import RowSchema
from components.data.snapshot import Snapshot, open_snapshot
from components.data.take import take_snapshot
from components.errors import DataError
from components.storage import Storage

ROWS = 2 * CHUNK_ROWS + 100


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one snapshot; only read it."""
    folder = tmp_path_factory.mktemp("snapshots")
    take_snapshot(Listed(made_up(ROWS), made_up(50)), FEATURES, DAY, Storage(folder))
    return folder


def opened(folder: Path) -> Snapshot:
    (name,) = (path.name for path in folder.iterdir() if path.name != "locks")
    snapshot = open_snapshot(Storage(folder), name)
    assert snapshot is not None
    return snapshot


def test_chunks_are_the_rows_in_order(stored: Path) -> None:
    snapshot, rows = opened(stored), made_up(ROWS)
    assert (snapshot.chunks("train"), snapshot.chunks("holdout")) == (3, 1)
    for number in range(3):
        wanted = rows.slice(number * CHUNK_ROWS, CHUNK_ROWS)
        assert snapshot.chunk("train", number).equals(wanted)
    assert snapshot.chunk("train", 1, ["label", "id"]).equals(
        rows.slice(CHUNK_ROWS, CHUNK_ROWS).select(["label", "id"])
    )
    assert snapshot.table("train", ["number"]).equals(rows.select(["number"]))


@pytest.mark.parametrize(
    ("start", "count"),
    [
        (0, 5),
        (0, ROWS),
        (CHUNK_ROWS - 1, 1),
        (CHUNK_ROWS - 1, 2),
        (CHUNK_ROWS, 3),
        (5, CHUNK_ROWS),
        (CHUNK_ROWS - 2, CHUNK_ROWS + 4),
        (ROWS - 3, 3),
        (ROWS - 3, 10),
        (ROWS, 4),
        (ROWS + 10, 4),
        (7, 0),
    ],
)
def test_a_slice_is_that_of_the_table(stored: Path, start: int, count: int) -> None:
    found = opened(stored).slice("train", start, count)
    assert found.equals(made_up(ROWS).slice(start, count))


@pytest.mark.parametrize("size", [1, 3, 1000, CHUNK_ROWS, 3 * CHUNK_ROWS])
def test_chunks_have_one_size_whatever_the_batches(size: int) -> None:
    rows = made_up(ROWS if size > 3 else 50)
    chunks = list(rechunk(rows.to_batches(size), rows.schema))
    assert [len(chunk) for chunk in chunks[:-1]] == [CHUNK_ROWS] * (len(chunks) - 1)
    assert all(column.num_chunks == 1 for chunk in chunks for column in chunk.columns)
    assert pa.concat_tables(chunks).equals(rows)


def test_types_survive(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            pa.field("image", pa.list_(pa.float32(), 4), nullable=False),
            pa.field("word", pa.dictionary(pa.int8(), pa.string())),
            pa.field("long", pa.large_string()),
            pa.field("at", pa.timestamp("us", "UTC")),
            pa.field("day", pa.date32(), nullable=False),
            pa.field("price", pa.decimal128(10, 2)),
            pa.field("label", pa.bool_(), nullable=False),
        ]
    )
    values = [[[1.0, 2, 3, 4]] * 4, ["a", None, "b", "a"], ["x", None, "", "y"], [0, 1, None, 3]]
    values += [[0, 1, 2, 3], ["1.50", None, "2.25", "-3"], [True, False, True, False]]
    columns = [
        pa.array(column).cast(field.type) if "price" in field.name else pa.array(column, field.type)
        for column, field in zip(values, schema, strict=True)
    ]
    rows = pa.table(columns, schema=schema)
    source = Listed(rows, rows, schema=RowSchema(schema))
    features = Features(label="label", classes=2, tensors={"image": (2, 2)})
    snapshot = take_snapshot(source, features, DAY, Storage(tmp_path))
    assert snapshot.schema.equals(schema)
    assert snapshot.table("train").equals(rows)
    assert snapshot.slice("train", 9, 1).schema.equals(schema)


def test_a_background_thread_reads_while_another_does(stored: Path) -> None:
    snapshot, rows = opened(stored), made_up(ROWS)
    wrong: list[int] = []

    def read() -> None:
        for turn in range(20):
            number = turn % 3
            wanted = rows.slice(number * CHUNK_ROWS, CHUNK_ROWS)
            if not snapshot.chunk("train", number).equals(wanted):
                wrong.append(turn)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_reading_keeps_no_memory(stored: Path) -> None:
    snapshot = opened(stored)
    snapshot.chunk("train", 0)
    before = pa.total_allocated_bytes()
    for turn in range(30):
        snapshot.chunk("train", turn % 3)
    assert pa.total_allocated_bytes() - before < 100_000


def test_every_flipped_bit_is_refused_or_changes_nothing(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    path = next(folder.glob("*/train.parquet"))
    good, rows = path.read_bytes(), made_up(ROWS)
    refused = 0
    for place in np.linspace(0, len(good) - 1, 100).astype(int):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        try:
            found = opened(folder).table("train")
        except DataError:
            refused += 1
        else:
            assert found.equals(rows), f"byte {place}"
    assert refused > 90


def test_every_flipped_bit_of_the_manifest_is_refused(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    path = next(folder.glob("*/manifest.json"))
    good = path.read_bytes()
    for place in np.linspace(0, len(good) - 1, 100).astype(int):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 7)
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"manifest\.json"):
            opened(folder)


def test_damage_shows_when_the_chunk_is_read(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    path = next(folder.glob("*/train.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    snapshot = opened(folder)
    reads: tuple[Callable[[], object], ...] = (
        lambda: snapshot.table("train"),
        lambda: snapshot.chunk("train", 1),
    )
    for read in reads:
        with pytest.raises(DataError, match="Start the run again: planning takes the snapshot"):
            read()
    assert snapshot.chunk("train", 2).num_rows == 100
