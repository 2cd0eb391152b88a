"""Rows as tensors, in the order of training: held on the device, or streamed from a snapshot.

Legend: B = rows of a step, N = rows of the training split.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final

import numpy as np
import torch
from torch import Tensor

from components.train.order import EpochOrder, Order, Rows

Tensors = list[Tensor]
"""Inputs and, last, the labels; all share their first axis."""

ReadRows = Callable[[Rows], Tensors]
"""Maps row numbers to their tensors, in that order, on the CPU."""


@final
class Feed:
    """Reads a window at a time; where rows are streamed, a thread reads the next meanwhile.

    ``held`` are the validation rows, on the device.

    Args:
        order: The order of the rows.
        read: Gives rows of the training split.
        device: Where batches go.
        shards: The shards of this process.
        ahead: Whether a thread reads the next window while one is trained on.
    """

    def __init__(
        self, order: Order, read: ReadRows, device: torch.device, shards: range, ahead: bool
    ) -> None:
        self.order = order
        self._read = read
        self.device = device
        self._shards = shards
        self._ahead = ahead
        givers = order.partition.givers
        held = np.concatenate([order.partition.held_rows(chunk) for chunk in givers])
        self.held = [tensor.to(device) for tensor in read(held)]

    def batches(self, epoch: int, start: int) -> Generator[Tensors]:
        """Yield the batch of every step from ``start``, joined from this process's shards.

        Close it where it is left early: a thread may be reading for it.
        """
        order = self.order.epoch(epoch)
        parts = [self._shard(order, shard, start) for shard in self._shards]
        if len(parts) == 1:
            yield from parts[0]
            return
        for pieces in zip(*parts, strict=True):
            yield [torch.cat(column) for column in zip(*pieces, strict=True)]

    def _shard(self, order: EpochOrder, shard: int, start: int) -> Iterator[Tensors]:
        rows, steps = order.shard_rows(shard), self.order.steps
        edges = [step * rows // steps for step in range(start, steps + 1)]
        starts = order.window_starts(shard)
        first = next((i for i in range(len(starts) - 1) if starts[i + 1] > edges[0]), len(starts))
        windows = self._windows(order, shard, first)
        window: Tensors = []
        here = last = edges[0]
        for begin, end in itertools.pairwise(edges):
            parts: list[Tensors] = []
            place = begin
            while place < end:
                if place == last:
                    window = []  # let go of it before the next one comes
                    window, here = next(windows)
                    last = here + len(window[0])
                stop = min(end, last)
                parts.append([tensor[place - here : stop - here] for tensor in window])
                place = stop
            if len(parts) == 1:
                yield parts[0]
            else:
                yield [torch.cat(c) for c in zip(*parts, strict=True)] or [t[:0] for t in self.held]

    def _windows(self, order: EpochOrder, shard: int, first: int) -> Iterator[tuple[Tensors, int]]:
        """Windows on the device, each with the place of its first row in the shard."""
        starts = order.window_starts(shard)

        def load(window: int) -> Tensors:
            tensors = self._read(order.window_rows(shard, window))
            return [t.pin_memory() for t in tensors] if self.device.type == "cuda" else tensors

        def place(tensors: Tensors) -> Tensors:
            return [t.to(self.device, non_blocking=True) for t in tensors]

        numbers = range(first, len(starts) - 1)
        if not self._ahead:
            for window in numbers:
                yield place(self._read(order.window_rows(shard, window))), starts[window]
            return
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            coming: Future[Tensors] | None = None
            for window in numbers:
                ready = (coming or pool.submit(load, window)).result()
                more = window + 1 < len(starts) - 1
                coming = pool.submit(load, window + 1) if more else None
                yield place(ready), starts[window]
                del ready


def resident_feed(
    tensors: Sequence[Tensor], order: Order, device: torch.device, shards: range = range(1)
) -> Feed:
    """A feed over tensors (N, ...), which are moved to the device once; the last are the labels."""
    everything = [tensor.to(device) for tensor in tensors]

    def read(rows: Rows) -> Tensors:
        index = torch.from_numpy(rows).to(device)
        return [tensor.index_select(0, index) for tensor in everything]

    return Feed(order, read, device, shards, ahead=False)
