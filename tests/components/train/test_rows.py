"""A snapshot's rows as tensors: in memory and streamed they train to the same bytes."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.training_lab import (
    CPU,
    PIPELINE,
    Stop,
    change,
    in_pieces,
    make_table,
    sha256,
    snapshot_of,
)

from components.data.chunks import CHUNK_ROWS
from components.data.encoding import fit_encoding, read_labels
from components.data.snapshot import Snapshot
from components.errors import DataError
from components.storage import Storage
from components.train import loop
from components.train import order as order_module
from components.train.checkpoint import Checkpoints
from components.train.config import TrainConfig
from components.train.loop import Reports, Trained
from components.train.parallel import ALONE
from components.train.rows import ChunkReader, open_feed
from components.train.run import run_training

ROWS = 2 * CHUNK_ROWS + 500
CONFIG = change(batch_size=4096, epochs=2)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return snapshot_of(make_table(ROWS), tmp_path_factory.mktemp("snapshots"), PIPELINE)


@pytest.fixture(autouse=True)
def _window_of_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "WINDOW_BLOCKS", 1)


def streamed(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"memory_rows": ROWS - 1})


def reader(snapshot: Snapshot) -> ChunkReader:
    return ChunkReader(
        snapshot, PIPELINE.features, fit_encoding(PIPELINE.features, snapshot.statistics)
    )


def test_rows_by_number_are_those_of_the_table(snapshot: Snapshot) -> None:
    table = snapshot.table("train")
    encoding = fit_encoding(PIPELINE.features, snapshot.statistics)
    rows = np.random.default_rng(0).permutation(ROWS)[:1000]
    edges = np.array([ROWS - 1, 0, CHUNK_ROWS, CHUNK_ROWS - 1, 2 * CHUNK_ROWS])
    for chosen in (rows, edges, edges[:1]):
        part = table.take(chosen)
        expected = [*encoding.encode(part).values(), read_labels(part, PIPELINE.features)]
        found = reader(snapshot).read(chosen)
        assert len(found) == len(expected) == 3
        for tensor, array in zip(found, expected, strict=True):
            assert np.array_equal(tensor.numpy(), array)


def test_everything_is_every_row(snapshot: Snapshot) -> None:
    found = reader(snapshot).everything()
    again = reader(snapshot).read(np.arange(ROWS))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("shards", [1, 3])
def test_both_feeds_give_the_same_batches(snapshot: Snapshot, shards: int) -> None:
    config = CONFIG.model_copy(update={"shards": shards})
    encoding = fit_encoding(PIPELINE.features, snapshot.statistics)
    feeds = [
        open_feed(snapshot, PIPELINE.features, encoding, which, CPU, ALONE)
        for which in (config, streamed(config))
    ]
    assert [feed._ahead for feed in feeds] == [False, True]
    assert len(feeds[0].order.epoch(1).windows[0]) == 3 if shards == 1 else True
    assert all(torch.equal(a, b) for a, b in zip(feeds[0].held, feeds[1].held, strict=True))
    pairs = list(zip(feeds[0].batches(2, 3), feeds[1].batches(2, 3), strict=True))
    assert len(pairs) == feeds[0].order.steps - 3
    for one, other in pairs:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def train(snapshot: Snapshot, config: TrainConfig, **more: object) -> Trained:
    return run_training(PIPELINE, config, snapshot, **more)[0]


@pytest.mark.parametrize("shards", [1, 3])
def test_both_feeds_train_to_the_same_bytes(snapshot: Snapshot, shards: int) -> None:
    config = CONFIG.model_copy(update={"shards": shards})
    one, other = train(snapshot, config), train(snapshot, streamed(config))
    assert sha256(one) == sha256(other)
    assert one.history == other.history


def test_streamed_training_in_pieces_comes_to_the_same_bytes(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LOOK_S", 0.0)

    def run(stop: Stop) -> Trained:
        kept = Checkpoints(Storage(tmp_path), "key", print)
        reports = Reports(stop=stop)
        return train(snapshot, streamed(CONFIG), checkpoints=kept, reports=reports)

    trained, pieces = in_pieces(run, 1, most=20)
    assert pieces >= 2
    assert sha256(trained) == sha256(train(snapshot, CONFIG))
    assert not [t for t in threading.enumerate() if t.name.startswith("feed")]


def test_a_stop_ends_the_reading_though_its_traceback_is_kept(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LOOK_S", 0.0)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(snapshot, streamed(CONFIG), reports=Reports(stop=Stop(3)))
    assert caught.tb
    assert not [t for t in threading.enumerate() if t.name.startswith("feed")]


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Snapshot]:
    """A snapshot whose last pages are spoiled after it was opened."""
    snapshot = snapshot_of(make_table(ROWS), tmp_path, PIPELINE)
    path = tmp_path / snapshot.fingerprint / "train.parquet"
    content = bytearray(path.read_bytes())
    middle = len(content) * 6 // 10
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    yield snapshot


def test_a_page_that_is_spoiled_while_training_is_told_as_damage(damaged: Snapshot) -> None:
    with pytest.raises(DataError):
        train(damaged, streamed(CONFIG))
    assert not [t for t in threading.enumerate() if t.name.startswith("feed")]


def test_shards_that_processes_cannot_share_are_not_dropped(snapshot: Snapshot) -> None:
    from components.train.parallel import Group

    encoding = fit_encoding(PIPELINE.features, snapshot.statistics)
    config = CONFIG.model_copy(update={"shards": 3})
    with pytest.raises(AssertionError, match="rows would be left out"):
        open_feed(snapshot, PIPELINE.features, encoding, config, CPU, Group(0, 2))
