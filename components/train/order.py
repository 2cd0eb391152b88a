"""Which rows a step trains on: a function of seed, epoch and step, and of nothing else.

Rows lie in chunks of :data:`CHUNK_ROWS`, the unit of reading. Some rows of most chunks are kept for
validation. In every epoch the blocks of rows are shuffled and dealt to shards; a shard is read
through windows of :data:`WINDOW_BLOCKS` blocks, whose rows are shuffled together. So rows can be
streamed, or held in memory, in the very same order, and training goes on at any step without going
through the steps before it.

Legend: N = training rows, K = steps of an epoch.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import final

import numpy as np
import numpy.typing as npt

from components.data.chunks import CHUNK_ROWS

WINDOW_BLOCKS = 16
_GIVERS = 256
"""Chunks that give validation rows, unless more are needed."""
_REMEMBERED = 64
"""Chunks whose validation rows are remembered; few rows have no more."""
Rows = npt.NDArray[np.int64]

_HELD, _BLOCKS, _WINDOW, _GIVING = range(4)


def _generator(*key: int) -> np.random.Generator:
    """A generator of its own for every purpose, seed, epoch, shard and window."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@final
@dataclass(frozen=True)
class Partition:
    """Which rows validate and which train.

    Args:
        rows: Rows of the training split.
        seed: Chooses the rows that validate.
        fraction: Their share.
        limit: Their largest number.

    Raises:
        ValueError: There are fewer than two rows.
    """

    rows: int
    seed: int
    fraction: float
    limit: int

    def __post_init__(self) -> None:
        """Both sides need a row."""
        if self.rows < 2:
            raise ValueError(f"training needs at least 2 rows, got {self.rows}")

    @property
    def held(self) -> int:
        """Number of validation rows."""
        return min(max(1, round(self.rows * self.fraction)), self.limit, self.rows - 1)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.rows // CHUNK_ROWS)

    @functools.cached_property
    def givers(self) -> dict[int, tuple[int, int]]:
        """Chunks that give validation rows, with the first and last of these, counted over all.

        Of many chunks only some give any, so that reading them does not mean reading everything.
        """
        most = max(_GIVERS, -(-4 * self.held // CHUNK_ROWS))
        chosen = np.sort(_generator(_GIVING, self.seed).permutation(self.chunks)[:most])
        sizes = np.minimum((chosen + 1) * CHUNK_ROWS, self.rows) - chosen * CHUNK_ROWS
        edges = np.cumsum([0, *sizes]) * self.held // sizes.sum()
        return {int(c): (int(a), int(b)) for c, a, b in zip(chosen, edges, edges[1:], strict=False)}

    @functools.lru_cache(maxsize=_REMEMBERED)  # noqa: B019  bounded, and small
    def held_rows(self, chunk: int) -> Rows:
        """Validation rows of a chunk, ascending."""
        if chunk not in self.givers:
            return np.empty(0, np.int64)
        start, stop = chunk * CHUNK_ROWS, min((chunk + 1) * CHUNK_ROWS, self.rows)
        first, last = self.givers[chunk]
        chosen = _generator(_HELD, self.seed, chunk).permutation(stop - start)[: last - first]
        return np.sort(chosen) + start

    def training_rows(self, start: int, stop: int) -> Rows:
        """Training rows from ``start`` to before ``stop``, ascending."""
        free = np.ones(stop - start, dtype=bool)
        free[self._held_between(start, stop) - start] = False
        return np.flatnonzero(free) + start

    def training_count(self, start: int, stop: int) -> int:
        """How many there are."""
        return stop - start - len(self._held_between(start, stop))

    def _held_between(self, start: int, stop: int) -> Rows:
        chunks = range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS))
        held = np.concatenate([self.held_rows(chunk) for chunk in chunks])
        return held[(held >= start) & (held < stop)]


@final
class Order:
    """The order of the training rows in every epoch.

    Args:
        partition: Which rows train.
        batch_size: Most rows of a step.
        shards: Parts that the rows are dealt to.
    """

    def __init__(self, partition: Partition, batch_size: int, shards: int = 1) -> None:
        self.partition = partition
        self.shards = shards
        # Few rows are cut finer, so that every shard gets some.
        size = min(CHUNK_ROWS, -(-partition.rows // (shards * WINDOW_BLOCKS)))
        edges = [*range(0, partition.rows, size), partition.rows]
        self._blocks = list(pairwise(edges))
        self._counts = [partition.training_count(*block) for block in self._blocks]
        self.rows = sum(self._counts)
        self.steps = -(-self.rows // batch_size)

    def epoch(self, number: int) -> "EpochOrder":
        """The order of one epoch, counted from 1."""
        seed = self.partition.seed
        blocks = _generator(_BLOCKS, seed, number).permutation(len(self._blocks))
        dealt = [blocks[shard :: self.shards].tolist() for shard in range(self.shards)]
        return EpochOrder(self, number, tuple(tuple(_windows(part)) for part in dealt))

    def block(self, number: int) -> tuple[int, int]:
        """First row of a block, and the one after its last."""
        return self._blocks[number]

    def count(self, window: tuple[int, ...]) -> int:
        """Training rows in some blocks."""
        return sum(self._counts[block] for block in window)


def _windows(blocks: list[int]) -> Iterator[tuple[int, ...]]:
    """Blocks in windows of nearly equal size: a small last one would be badly mixed."""
    windows = -(-len(blocks) // WINDOW_BLOCKS)
    for part in np.array_split(np.array(blocks), windows) if windows else ():
        yield tuple(part.tolist())


@final
@dataclass(frozen=True)
class EpochOrder:
    """The order of the training rows in one epoch: for each shard its windows, each of blocks."""

    order: Order
    number: int
    windows: tuple[tuple[tuple[int, ...], ...], ...]

    def shard_rows(self, shard: int) -> int:
        """Training rows of a shard."""
        return sum(self.order.count(window) for window in self.windows[shard])

    def span(self, shard: int, step: int) -> tuple[int, int]:
        """Where a step's rows begin and end in the sequence of a shard."""
        rows, steps = self.shard_rows(shard), self.order.steps
        return step * rows // steps, (step + 1) * rows // steps

    def sizes(self) -> list[int]:
        """Rows of every step, over all shards."""
        edges = np.arange(self.order.steps + 1, dtype=np.int64)
        total = np.zeros(self.order.steps, np.int64)
        for shard in range(self.order.shards):
            total += np.diff(edges * self.shard_rows(shard) // self.order.steps)
        return [int(size) for size in total]

    def window_rows(self, shard: int, window: int) -> Rows:
        """Rows of a window in the order of training."""
        partition = self.order.partition
        blocks = self.windows[shard][window]
        rows = [partition.training_rows(*self.order.block(block)) for block in blocks]
        shuffle = _generator(_WINDOW, partition.seed, self.number, shard, window)
        return shuffle.permutation(np.concatenate(rows))

    def window_starts(self, shard: int) -> list[int]:
        """Where each window begins in the sequence of a shard, and where the last one ends."""
        counts = (self.order.count(window) for window in self.windows[shard])
        return list(accumulate(counts, initial=0))

    def step_rows(self, step: int) -> list[Rows]:
        """Rows of a step by shard; slow, for messages and tests."""
        found = []
        for shard in range(self.order.shards):
            first, last = self.span(shard, step)
            parts = [np.empty(0, np.int64)]
            for window, start in enumerate(self.window_starts(shard)[:-1]):
                rows = self.window_rows(shard, window)
                parts.append(rows[max(0, first - start) : max(0, last - start)])
            found.append(np.concatenate(parts))
        return found
