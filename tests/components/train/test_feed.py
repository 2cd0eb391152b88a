"""Batches: the rows of every step, from memory or streamed, from any step on."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.training_lab import CPU, change, order_of
from torch import Tensor

from components.train import order as module
from components.train.feed import Feed, resident_feed
from components.train.order import Order, Partition, Rows

ROWS = 103


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of at most four rows, three to a window."""
    Partition.held_rows.cache_clear()
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(module, "WINDOW_BLOCKS", 3)
    yield
    Partition.held_rows.cache_clear()


def order(batch_size: int = 10, shards: int = 1) -> Order:
    return order_of(ROWS, change(batch_size=batch_size, shards=shards))


def numbered(rows: Rows) -> list[Tensor]:
    """Each row is its number, once as an input (B, 2) and once as the label."""
    numbers = torch.from_numpy(rows)
    return [torch.stack([numbers, -numbers], dim=1).float(), numbers]


def resident(order: Order, shards: range) -> Feed:
    return resident_feed(numbered(np.arange(ROWS)), order, CPU, shards)


def streamed(order: Order, shards: range) -> Feed:
    return Feed(order, numbered, CPU, shards, ahead=True)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


@pytest.mark.parametrize("make", [resident, streamed])
@pytest.mark.parametrize(("batch_size", "shards"), [(1, 1), (10, 1), (50, 1), (200, 1), (10, 3)])
def test_batches_are_the_rows_of_the_order(make: object, batch_size: int, shards: int) -> None:
    here = order(batch_size, shards)
    feed = make(here, range(shards))
    for epoch in (1, 2):
        batches = list(feed.batches(epoch, 0))
        assert len(batches) == here.steps
        assert [len(labels) for _, labels in batches] == here.epoch(epoch).sizes()
        for step, (inputs, labels) in enumerate(batches):
            rows = np.concatenate(here.epoch(epoch).step_rows(step))
            assert labels.tolist() == rows.tolist()
            assert torch.equal(inputs[:, 1], -labels.float())
    assert readers() == []


@pytest.mark.parametrize("make", [resident, streamed])
@pytest.mark.parametrize(("batch_size", "shards"), [(7, 1), (60, 1), (10, 3)])
def test_starting_anywhere_gives_the_batches_that_follow(
    make: object, batch_size: int, shards: int
) -> None:
    feed = make(order(batch_size, shards), range(shards))
    whole = [labels.tolist() for _, labels in feed.batches(2, 0)]
    for start in range(len(whole) + 1):
        assert [labels.tolist() for _, labels in feed.batches(2, start)] == whole[start:]


def test_processes_read_their_own_shards() -> None:
    here = order(10, 4)
    parts = [resident(here, shards).batches(1, 0) for shards in (range(2), range(2, 4))]
    whole = resident(here, range(4)).batches(1, 0)
    for one, two, both in zip(*parts, whole, strict=True):
        assert both[-1].tolist() == [*one[-1].tolist(), *two[-1].tolist()]


def test_the_held_rows_are_those_of_the_partition() -> None:
    here = order()
    held = np.concatenate([here.partition.held_rows(c) for c in range(here.partition.chunks)])
    for feed in (resident(here, range(1)), streamed(here, range(1))):
        assert feed.held[-1].tolist() == held.tolist()
        assert len(feed.held[0]) == len(held)


def test_a_shard_without_rows_gives_empty_batches() -> None:
    feed = resident_feed(numbered(np.arange(2)), order_of(2, change(shards=5)), CPU, range(5))
    ((inputs, labels),) = feed.batches(1, 0)
    assert (inputs.shape, len(labels)) == ((1, 2), 1)
    alone = resident_feed(numbered(np.arange(2)), order_of(2, change(shards=5)), CPU, range(4, 5))
    ((inputs, labels),) = alone.batches(1, 0)
    assert (inputs.shape, len(labels)) == ((0, 2), 0)


def test_the_next_window_is_read_meanwhile() -> None:
    calls: list[str] = []

    def read(rows: Rows) -> list[Tensor]:
        calls.append(threading.current_thread().name)
        return numbered(rows)

    feed = Feed(order(), read, CPU, range(1), ahead=True)
    calls.clear()
    with contextlib.closing(feed.batches(1, 0)) as batches:
        next(batches)
        deadline = time.monotonic() + 5
        while len(calls) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(calls) == 2, "one window is used, one is ready, and no more are read"
    assert all(name.startswith("feed") for name in calls)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_feed_that_is_closed_early_leaves_no_thread(shards: int) -> None:
    feed = streamed(order(10, shards), range(shards))
    batches = feed.batches(1, 0)
    for _ in itertools.islice(batches, 3):
        pass
    assert len(readers()) == shards
    batches.close()
    assert readers() == []


@pytest.mark.parametrize("broken", [1, 2, 5])
def test_what_the_reading_thread_raises_arrives(broken: int) -> None:
    reads = itertools.count()

    def read(rows: Rows) -> list[Tensor]:
        if next(reads) == broken:
            raise OSError("the page is torn")
        return numbered(rows)

    feed = Feed(order(), read, CPU, range(1), ahead=True)  # the held rows are read first
    with pytest.raises(OSError, match="the page is torn"):
        list(feed.batches(1, 0))
    assert readers() == []


def test_a_resident_feed_copies_no_more_than_a_window() -> None:
    """Batches may be changed by a model; the rows are used again in the next epoch."""
    feed = resident(order(), range(1))
    before = [labels.tolist() for _, labels in feed.batches(1, 0)]
    for inputs, labels in feed.batches(1, 0):
        inputs.zero_()
        labels.zero_()
    assert [labels.tolist() for _, labels in feed.batches(1, 0)] == before
