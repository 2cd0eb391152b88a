"""A small laboratory of training: rows, networks, a source, and how a run is cut short.

Legend: N = rows, B = batch.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor, nn

from components.contract import DataSource, Model, ModelMetadata, Split, TensorSpec
from components.data.encoding import Encoding, Features
from components.data.schema import RowSchema
from components.data.snapshot import Snapshot
from components.data.take import take_snapshot
from components.pipeline import Pipeline, QualityGate
from components.storage import Storage
from components.train.config import TrainConfig
from components.train.device import reproducible
from components.train.feed import Feed, resident_feed
from components.train.loop import Trained, train_model
from components.train.order import Order, Partition

COLUMNS, CLASSES = 4, 3
NAMES = tuple("abcd")
AS_OF = date(2014, 1, 1)
CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=3, batch_size=16, learning_rate=1e-2, device="cpu")

Rows = tuple[Tensor, Tensor]


def change(**values: object) -> TrainConfig:
    """The configuration with other values, checked."""
    return TrainConfig.model_validate({**CONFIG.model_dump(), **values})


def make_rows(count: int = 65) -> Rows:
    """Inputs (N, 4), and the labels (N,) that a linear rule gives them."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(count, COLUMNS, generator=generator)
    rule = torch.randn(COLUMNS, CLASSES, generator=generator)
    return inputs, (inputs @ rule).argmax(dim=1)


def network() -> nn.Module:
    """Running statistics, dropout, two layers."""
    return nn.Sequential(
        nn.Linear(COLUMNS, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, CLASSES),
    )


def plain() -> nn.Module:
    """Nothing random, and nothing that depends on how rows are cut."""
    return nn.Sequential(nn.Linear(COLUMNS, 16), nn.Tanh(), nn.Linear(16, CLASSES))


class Restless(nn.Module):
    """Draws from every generator of random numbers there is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.inner(inputs)
        if self.training:
            logits = logits * (1 + 0.1 * random.random()) + float(np.random.normal()) / 10
        return logits


def each_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of every row."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def order_of(count: int, config: TrainConfig) -> Order:
    """The order of so many rows."""
    shape = (count, config.seed, config.validation_fraction, config.validation_rows)
    return Order(Partition(*shape), config.batch_size, config.parts)


def open_rows(rows: Sequence[Tensor], config: TrainConfig, shards: range | None = None) -> Feed:
    """A feed of rows in memory."""
    order = order_of(len(rows[-1]), config)
    return resident_feed(rows, order, CPU, range(config.parts) if shards is None else shards)


def fit(
    rows: Sequence[Tensor],
    config: TrainConfig = CONFIG,
    build: Callable[[], nn.Module] = network,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    **more: Any,
) -> Trained:
    """Build and train as a run does."""
    with reproducible(config):
        return train_model(build(), loss, open_rows(rows, config), config, **more)


def sha256(trained: Trained) -> str:
    """Of the weights as they are stored."""
    return hashlib.sha256(save(trained.state)).hexdigest()


class Stop:
    """Asks for a stop when it is looked at for so many times, and from then on."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        return self.looks <= 0


def in_pieces(run: Callable[[Stop], Trained], seed: int, most: int = 4) -> tuple[Trained, int]:
    """Run again and again, each time interrupted after a few steps, until it ends."""
    dice, interruptions = random.Random(seed), 0
    while True:
        try:
            return run(Stop(dice.randint(1, most))), interruptions
        except KeyboardInterrupt:
            interruptions += 1


@final
class TableSource(DataSource):
    """Rows from a table; every split has the same."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def schema(self) -> RowSchema:
        return RowSchema(self._table.schema)

    def prepare(self) -> None:
        pass

    def window(self, as_of: date) -> str:
        return "all rows"

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        yield from self._table.to_batches()

    def excluded(self, as_of: date) -> Mapping[str, int]:
        return {}


def make_table(count: int, label: pa.DataType | None = None) -> pa.Table:
    """Rows as :func:`make_rows` gives them, with a row number."""
    inputs, labels = make_rows(count)
    columns = dict(zip(NAMES, inputs.numpy().T, strict=True))
    names = pa.array(np.arange(count) % 7).cast(pa.string())
    kind = pa.int8() if label is None else label
    return pa.table({**columns, "word": names, "label": pa.array(labels.numpy()).cast(kind)})


def snapshot_of(table: pa.Table, folder: Path, pipeline: "Pipeline") -> Snapshot:
    """A real snapshot of a table."""
    return take_snapshot(TableSource(table), pipeline.features, AS_OF, Storage(folder))


class LabModel(Model):
    """An embedding, running statistics, dropout."""

    def __init__(self, encoding: Encoding, config: TrainConfig) -> None:
        super().__init__()
        self._inputs = encoding.specs()
        self.words = nn.Embedding(len(encoding.categorical[0].vocabulary) + 1, 4)
        self.body = nn.Sequential(
            nn.Linear(COLUMNS + 4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, *inputs: Tensor) -> Tensor:
        words, numbers = inputs
        joined = torch.cat([self.words(words[:, 0]), numbers], dim=1)
        logits: Tensor = self.head(self.body(joined))
        return logits

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.softmax(self(*inputs), dim=1),)

    def get_model_metadata(self) -> ModelMetadata:
        output = TensorSpec(name="probabilities", dtype="float32", shape=("batch", CLASSES))
        return ModelMetadata(
            inputs=self._inputs, outputs=(output,), classes=("x", "y", "z"), description="a lab's"
        )


PIPELINE = Pipeline(
    name="lab",
    description="rows of a linear rule",
    source=lambda at: TableSource(make_table(10)),
    features=Features(label="label", classes=CLASSES, categorical=("word",), numeric=NAMES),
    model=LabModel,
    loss=nn.functional.cross_entropy,
    config=CONFIG,
    metrics=lambda scored: {"accuracy": 1.0},
    gates=(QualityGate(metric="accuracy", minimum=0.5),),
    metric="accuracy",
    margin=0.0,
    dated=False,
)
