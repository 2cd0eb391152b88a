"""The order of rows: each once per epoch, by seed, epoch and step alone."""

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from components.data.chunks import CHUNK_ROWS
from components.train import order as module
from components.train.order import WINDOW_BLOCKS, Order, Partition

SMALL = [(n, b, s) for n in (2, 3, 31, 200) for b in (5, 16, 1000) for s in (1, 2, 3, 5)]
LARGE = [
    (CHUNK_ROWS - 1, 8192, 1),
    (CHUNK_ROWS, 8192, 2),
    (CHUNK_ROWS + 1, 8192, 1),
    (3 * CHUNK_ROWS + 5, 20_000, 3),
    (WINDOW_BLOCKS * CHUNK_ROWS + 7, 300_000, 1),  # one block more than a window
    (WINDOW_BLOCKS * CHUNK_ROWS * 2 + 2 * CHUNK_ROWS, 400_000, 2),
]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """Validation rows are remembered by partition, and some tests change the size of chunks."""
    Partition.held_rows.cache_clear()
    yield
    Partition.held_rows.cache_clear()


def partition(rows: int, seed: int = 0, fraction: float = 0.1, limit: int = 131_072) -> Partition:
    return Partition(rows, seed, fraction, limit)


def held_rows(part: Partition) -> list[int]:
    return [int(row) for chunk in range(part.chunks) for row in part.held_rows(chunk)]


def steps_of(order: Order, epoch: int = 1) -> list[list[np.ndarray]]:
    return [order.epoch(epoch).step_rows(step) for step in range(order.steps)]


def flat(order: Order, epoch: int = 1) -> np.ndarray:
    return np.concatenate(list(itertools.chain(*steps_of(order, epoch))))


def check_epoch(order: Order, epoch: int) -> None:
    """Everything that holds of every epoch."""
    part, steps = order.partition, steps_of(order, epoch)
    seen = np.concatenate(list(itertools.chain(*steps)))
    held = held_rows(part)
    assert len(seen) == order.rows == part.rows - part.held
    assert np.array_equal(np.sort(np.concatenate([seen, held])), np.arange(part.rows))
    counts = np.array([[len(piece) for piece in step] for step in steps])
    assert counts.shape == (order.steps, order.shards)
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all(), "per shard, one row apart"
    found = order.epoch(epoch)
    assert found.sizes() == counts.sum(axis=1).tolist()
    for shard, step in itertools.product(range(order.shards), range(order.steps)):
        first, last = found.span(shard, step)
        assert last - first == counts[step, shard]
        assert first == counts[:step, shard].sum()
    assert [found.shard_rows(s) for s in range(order.shards)] == counts.sum(axis=0).tolist()


@pytest.mark.parametrize(("rows", "batch_size", "shards"), SMALL)
def test_every_training_row_comes_once(rows: int, batch_size: int, shards: int) -> None:
    order = Order(partition(rows), batch_size, shards)
    assert order.steps == -(-order.rows // batch_size)
    for epoch in (1, 2):
        check_epoch(order, epoch)
    assert max(order.epoch(1).sizes()) <= batch_size + shards - 1
    assert min(order.epoch(1).sizes()) >= 1


@pytest.mark.parametrize(("rows", "batch_size", "shards"), LARGE)
def test_every_training_row_comes_once_from_whole_chunks(
    rows: int, batch_size: int, shards: int
) -> None:
    check_epoch(Order(partition(rows), batch_size, shards), 1)


@pytest.mark.parametrize("chunk_rows", [1, 4, 7])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_training_row_comes_once_through_many_windows(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, fraction: float, shards: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(module, "WINDOW_BLOCKS", 3)
    order = Order(partition(203, 1, fraction), 29, shards)
    assert max(len(windows) for windows in order.epoch(1).windows) > 1
    for epoch in (1, 2):
        check_epoch(order, epoch)


@pytest.mark.parametrize("batch_size", [1, 16, 59, 180])
def test_without_shards_batches_are_no_larger_than_asked_and_one_row_apart(
    batch_size: int,
) -> None:
    sizes = Order(partition(200), batch_size).epoch(1).sizes()
    assert sum(sizes) == 180
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_no_step_is_empty_while_a_batch_has_a_row_for_every_shard() -> None:
    for rows, shards in itertools.product(range(2, 32), range(1, 6)):
        order = Order(partition(rows), shards, shards)
        assert all(min(order.epoch(epoch).sizes()) for epoch in (1, 2)), (rows, shards)


def test_epochs_and_seeds_shuffle_anew_and_equal_seeds_alike() -> None:
    orders = [Order(partition(200, seed), 16, 2) for seed in (0, 0, 1)]
    first, again, other = (flat(order).tolist() for order in orders)
    assert first == again
    assert first != other
    assert held_rows(orders[0].partition) != held_rows(orders[2].partition)
    assert first != flat(orders[0], 2).tolist()
    assert first != sorted(first)


def test_the_validation_rows_are_the_same_whatever_the_batches_and_shards() -> None:
    parts = [Order(partition(200), b, s).partition for b, s in ((16, 1), (7, 1), (16, 4))]
    assert len({tuple(held_rows(part)) for part in parts}) == 1


def test_a_window_mixes_all_its_rows() -> None:
    """The rows of one window are not sorted by block, nor a block by row."""
    rows = flat(Order(partition(3200), 3200))
    apart = np.abs(np.diff(rows))
    assert 0.25 < apart.mean() / len(rows) < 0.42, "a random permutation has a third"
    assert np.abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.1


def test_shards_get_nearly_equal_parts() -> None:
    for rows, shards in ((200, 5), (3 * CHUNK_ROWS + 5, 3), (10_000, 4)):
        epoch = Order(partition(rows), 64, shards).epoch(1)
        counts = [epoch.shard_rows(shard) for shard in range(shards)]
        assert max(counts) - min(counts) <= 0.2 * sum(counts) / shards + 2, counts


@pytest.mark.parametrize(
    ("rows", "fraction", "limit", "held"),
    [(2, 0.1, 9, 1), (2, 0.99, 9, 1), (100, 0.3, 99, 30), (100, 0.3, 12, 12), (5, 0.99, 9, 4)],
)
def test_as_many_rows_are_held_as_asked(rows: int, fraction: float, limit: int, held: int) -> None:
    part = partition(rows, 0, fraction, limit)
    found = held_rows(part)
    assert len(found) == part.held == held
    assert found == sorted(set(found))


def test_every_chunk_gives_its_share_of_validation_rows() -> None:
    part = partition(5 * CHUNK_ROWS + 100, fraction=0.25)
    counts = [len(part.held_rows(chunk)) for chunk in range(part.chunks)]
    assert counts[:5] == [CHUNK_ROWS // 4] * 5
    assert counts[5] == 25


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 rows, got {rows}"):
        partition(rows)


def test_the_order_is_this_one() -> None:
    """If this fails, checkpoints and results of earlier versions are void: say so."""
    order = Order(partition(24, seed=5, fraction=0.25), 6, 2)
    assert held_rows(order.partition) == GOLDEN_HELD
    found = [[piece.tolist() for piece in step] for step in steps_of(order, 3)]
    assert found == GOLDEN_STEPS


def test_the_order_through_several_windows_is_this_one() -> None:
    order = Order(partition(18 * CHUNK_ROWS), 200_000)
    rows = flat(order, 2).astype("<i8")
    assert hashlib.sha256(rows.tobytes()).hexdigest() == GOLDEN_DIGEST


GOLDEN_HELD = [2, 3, 11, 15, 17, 18]
GOLDEN_STEPS = [[[4, 23, 12], [6, 7]], [[5, 20, 13], [10, 9, 16]], [[0, 14, 19, 21], [1, 8, 22]]]
GOLDEN_DIGEST = "168192e0633827a2fc2e016c1f3cb59b37c48556d5cac6ba71f400574a7dc1db"
