"""A snapshot's training rows as tensors: all at once, or by row number from chunks."""

import itertools
from typing import final

import numpy as np
import torch

from components.data.chunks import CHUNK_ROWS
from components.data.encoding import Encoding, Features, read_labels
from components.data.snapshot import Snapshot
from components.train.config import TrainConfig
from components.train.feed import Feed, Tensors, resident_feed
from components.train.order import Order, Partition, Rows
from components.train.parallel import Group


def open_feed(
    snapshot: Snapshot,
    features: Features,
    encoding: Encoding,
    config: TrainConfig,
    device: torch.device,
    group: Group,
) -> Feed:
    """Batches of this process, from memory if the rows are few enough, else streamed.

    Raises:
        DataError: The snapshot is damaged.
    """
    rows = snapshot.rows["train"]
    partition = Partition(rows, config.seed, config.validation_fraction, config.validation_rows)
    order = Order(partition, config.batch_size, config.parts)
    assert config.parts % group.world == 0, "workers divide shards, or rows would be left out"
    per_worker = config.parts // group.world
    shards = range(group.rank * per_worker, (group.rank + 1) * per_worker)
    reader = ChunkReader(snapshot, features, encoding)
    if rows <= config.memory_rows:
        return resident_feed(reader.everything(), order, device, shards)
    return Feed(order, reader.read, device, shards, ahead=True)


@final
class ChunkReader:
    """Reads rows of the training split chunk by chunk, and encodes only those that are asked for.

    Args:
        snapshot: Where the rows lie.
        features: Names the label.
        encoding: How rows become inputs.
    """

    def __init__(self, snapshot: Snapshot, features: Features, encoding: Encoding) -> None:
        self._snapshot = snapshot
        self._features = features
        self._encoding = encoding

    def everything(self) -> Tensors:
        """All rows, in their order."""
        return self.read(np.arange(self._snapshot.rows["train"]))

    def read(self, rows: Rows) -> Tensors:
        """Rows by number, in the order asked for; every chunk is read once.

        Chunk after chunk goes to its place in the result, so that there are never two copies.
        """
        arrangement = np.argsort(rows, kind="stable")
        ordered = rows[arrangement]
        chunks = np.unique(ordered // CHUNK_ROWS)
        edges = np.searchsorted(ordered, [*(chunks * CHUNK_ROWS), rows.max(initial=-1) + 1])
        found: Tensors = []
        for chunk, (first, last) in zip(chunks, itertools.pairwise(edges), strict=True):
            part = self._encoded(int(chunk), ordered[first:last] - chunk * CHUNK_ROWS)
            found = found or [t.new_empty((len(rows), *t.shape[1:])) for t in part]
            places = torch.from_numpy(arrangement[first:last])
            for whole, tensor in zip(found, part, strict=True):
                whole.index_copy_(0, places, tensor)
        return found

    def _encoded(self, chunk: int, offsets: Rows) -> Tensors:
        table = self._snapshot.chunk("train", chunk, columns=list(self._features.columns))
        if len(offsets) < table.num_rows:
            table = table.take(offsets)
        arrays = [*self._encoding.encode(table).values(), read_labels(table, self._features)]
        return [torch.from_numpy(array) for array in arrays]
