"""A team's pipelines that read their rows from a file which others may change.

``TEAM_ROWS`` names the file: three numbers and a label on each line. Legend: B = batch.
"""

import os
import time
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from components.contract import DataSource, Model, ModelMetadata, SourceContext, Split, TensorSpec
from components.data.encoding import Encoding, Features
from components.data.schema import RowSchema
from components.errors import DataError
from components.metrics import class_metrics
from components.pipeline import Pipeline, QualityGate
from components.train.config import TrainConfig

WIDTH = 8
COLUMNS = ("a", "b", "c")
HELD_OUT = 64


@final
class Ledger(DataSource):
    """The last lines of the file are held out."""

    def __init__(self, at: SourceContext) -> None:
        self._path = Path(os.environ["TEAM_ROWS"])

    def schema(self) -> RowSchema:
        numbers = [pa.field(name, pa.float32()) for name in COLUMNS]
        return RowSchema(pa.schema([*numbers, pa.field("label", pa.int8(), nullable=False)]))

    def prepare(self) -> None:
        if not self._path.exists():
            raise DataError(f"the ledger must be there; {self._path} is not. Restore it.")

    def window(self, as_of: date) -> str:
        return f"all lines, hold out the last {HELD_OUT}"

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        rows = np.loadtxt(self._path, dtype=np.float32, ndmin=2)
        rows = rows[:-HELD_OUT] if split == "train" else rows[-HELD_OUT:]
        columns = [*rows[:, :3].T, rows[:, 3].astype(np.int8)]
        yield pa.record_batch(columns, schema=self.schema().arrow)

    def excluded(self, as_of: date) -> Mapping[str, int]:
        return {}


@final
class Network(Model):
    """Two layers."""

    def __init__(self, encoding: Encoding, config: TrainConfig) -> None:
        super().__init__()
        self._inputs = encoding.specs()
        self.first = nn.Linear(3, WIDTH)
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(inputs[0])))

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.softmax(self(*inputs), dim=1),)

    def get_model_metadata(self) -> ModelMetadata:
        return ModelMetadata(
            inputs=self._inputs,
            outputs=(TensorSpec(name="probabilities", dtype="float32", shape=("batch", 2)),),
            classes=("no", "yes"),
            description="whether a + b > c",
        )


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy; waits if the environment names a file to make."""
    if (path := os.environ.get("TEAM_WAIT")) is not None:
        Path(path).touch()
        time.sleep(60)
    return nn.functional.cross_entropy(logits, labels)


def make(name: str) -> Pipeline:
    return Pipeline(
        name=name,
        description="a test's pipeline",
        source=Ledger,
        features=Features(label="label", classes=2, numeric=COLUMNS),
        model=Network,
        loss=loss,
        config=TrainConfig(epochs=2, batch_size=32, learning_rate=0.05, device="cpu"),
        metrics=lambda scored: class_metrics(scored, "probabilities"),
        gates=(QualityGate(metric="accuracy", minimum=0.0),),
        metric="accuracy",
        margin=0.0,
        dated=False,
    )


def write_rows(path: Path, seed: int = 0) -> Path:
    """A ledger of 364 lines."""
    numbers = np.random.default_rng(seed).normal(size=(364, 3)).astype(np.float32)
    labels = numbers[:, 0] + numbers[:, 1] > numbers[:, 2]
    np.savetxt(path, np.column_stack([numbers, labels]), fmt="%.6f")
    return path


kept = make("kept")
swapped = make("swapped")
broken = make("broken")
unrecorded = make("unrecorded")
