"""Small pipelines of an imaginary team, good and broken ones; copied to a folder of its own.

Legend: B = batch, F = features.
"""

import functools
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

from components.contract import (
    DataSource,
    Model,
    ModelMetadata,
    SourceContext,
    Split,
    TensorSpec,
)
from components.data.encoding import Encoding, Features
from components.data.schema import RowSchema
from components.export.config import Promotion, Release
from components.metrics import class_metrics, resampled_accuracy, resampled_roc_auc
from components.pipeline import Pipeline, QualityGate
from components.pipelines.flights import FlightsConfig, FlightsModel, flight_metrics, late_loss
from components.train.config import TrainConfig

COLUMNS = ("a", "b", "c")
ROWS = {"train": 300, "holdout": 100}


@final
class Synthetic(DataSource):
    """Label 1 where ``a + b > c``; ``fault`` spoils the rows in a way that its name says."""

    def __init__(self, at: SourceContext, fault: str = "") -> None:
        self._fault = fault

    def schema(self) -> RowSchema:
        columns = COLUMNS[:-1] if self._fault == "no column" else COLUMNS
        numbers = [pa.field(name, pa.float32()) for name in columns]
        return RowSchema(pa.schema([*numbers, pa.field("label", pa.int8())]))

    def prepare(self) -> None:
        pass

    def window(self, as_of: date) -> str:
        return "300 rows, hold out 100"

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        generator = np.random.default_rng(list(ROWS).index(split))
        values = generator.normal(size=(ROWS[split], 3)).astype(np.float32)
        labels = (values[:, 0] + values[:, 1] > values[:, 2]).astype(np.int8)
        if self._fault == "label":
            labels[5] = 7
        if self._fault == "nan":
            values[:, 2] = np.nan
        columns = {**dict(zip(COLUMNS, values.T, strict=True)), "label": labels}
        names = self.schema().names
        yield pa.record_batch({name: columns[name] for name in names})

    def excluded(self, as_of: date) -> Mapping[str, int]:
        return {}


@final
class Trips(DataSource):
    """Rows with text, whole numbers, truth values and holes, as those of a database are."""

    def __init__(self, at: SourceContext) -> None:
        pass

    def schema(self) -> RowSchema:
        return RowSchema(
            pa.schema(
                [
                    pa.field("carrier", pa.string()),
                    pa.field("origin", pa.string(), nullable=False),
                    pa.field("minute", pa.int32(), nullable=False),
                    pa.field("distance", pa.float64()),
                    pa.field("weekend", pa.bool_(), nullable=False),
                    pa.field("label", pa.int8(), nullable=False),
                ]
            )
        )

    def prepare(self) -> None:
        pass

    def window(self, as_of: date) -> str:
        return "2000 rows, hold out 400"

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        rows = {"train": 2000, "holdout": 400}[split]
        generator = np.random.default_rng(rows)
        carrier = generator.choice(["AA", "B6", "zürich ✈"], rows)
        minute = generator.integers(0, 1440, rows).astype(np.int32)
        distance = generator.normal(500, 200, rows)
        late = (minute / 1440 + (carrier == "B6") + generator.normal(0, 0.3, rows)) > 0.9
        arrays = {
            "carrier": pa.array(carrier, mask=generator.random(rows) < 0.1),
            "origin": pa.array(generator.choice(["EWR", "JFK"], rows)),
            "minute": pa.array(minute),
            "distance": pa.array(distance, mask=generator.random(rows) < 0.1),
            "weekend": pa.array(generator.random(rows) < 0.3),
            "label": pa.array(late.astype(np.int8)),
        }
        yield pa.record_batch(arrays, schema=self.schema().arrow)

    def excluded(self, as_of: date) -> Mapping[str, int]:
        return {}


class Network(Model):
    """Two layers, in which only ``forward`` is left open."""

    def __init__(self, encoding: Encoding, config: TrainConfig) -> None:
        super().__init__()
        self._inputs = encoding.specs()
        self.first = nn.Linear(3, 8)
        self.last = nn.Linear(8, 2)

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.softmax(self(*inputs), dim=1),)

    def get_model_metadata(self) -> ModelMetadata:
        return ModelMetadata(
            inputs=self._inputs,
            outputs=(TensorSpec(name="probabilities", dtype="float32", shape=("batch", 2)),),
            classes=("no", "yes"),
            description="whether a + b > c",
        )


@final
class Good(Network):
    """As it should be."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(inputs[0])))


@final
class Detached(Network):
    """The first layer gets no gradient."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(inputs[0])).detach())


@final
class Bypassing(Network):
    """A submodule is called so that its hooks do not fire."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.first.forward(inputs[0])))


@final
class Incomplete(Model):
    """There is no ``predict``."""

    def __init__(self, encoding: Encoding, config: TrainConfig) -> None:
        super().__init__()

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def get_model_metadata(self) -> ModelMetadata:
        raise NotImplementedError


class Unlucky:
    """Waits where Python drops an exception."""

    def __del__(self) -> None:
        time.sleep(60)


def waiting_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Waits, first where an interruption is dropped, if the environment names a file to make."""
    if (path := os.environ.get("TEAM_WAIT")) is not None:
        if Path(path).exists():
            time.sleep(60)
        Path(path).touch()
        Unlucky()
    return nn.functional.cross_entropy(logits, labels)


def make(
    name: str,
    model: type[Model] = Good,
    *,
    fault: str = "",
    minimum: float = 0.0,
    promotion: Promotion = "automatic",
) -> Pipeline:
    return Pipeline(
        name=name,
        description="a test's pipeline",
        source=functools.partial(Synthetic, fault=fault),
        features=Features(label="label", classes=2, numeric=COLUMNS),
        model=model,
        loss=waiting_loss,
        config=TrainConfig(epochs=2, batch_size=32, learning_rate=0.05, device="cpu"),
        metrics=lambda scored: class_metrics(scored, "probabilities"),
        gates=(QualityGate(metric="accuracy", minimum=minimum),),
        metric="accuracy",
        margin=0.0,
        dated=False,
        resampled=resampled_accuracy("probabilities"),
        release=Release(promotion=promotion),
    )


trips = Pipeline(
    name="trips",
    description="a test's pipeline of rows with text",
    source=Trips,
    features=Features(
        label="label",
        classes=2,
        categorical=("carrier", "origin"),
        numeric=("minute", "distance", "weekend"),
    ),
    model=FlightsModel,
    loss=late_loss,
    config=FlightsConfig(epochs=2, batch_size=64, learning_rate=0.01, hidden=16, device="cpu"),
    metrics=lambda scored: {
        name: value for name, value in flight_metrics(scored).items() if "/" not in name
    },
    gates=(QualityGate(metric="roc_auc", minimum=0.6),),
    metric="roc_auc",
    margin=0.0,
    dated=False,
    resampled=resampled_roc_auc("probability"),
)
tiny = make("tiny")
again = make("again")
rivals = make("rivals")
exploding = make("exploding")
interrupted = make("interrupted")
once = make("once")
orphaned = make("orphaned")
recorded = make("recorded")
staged = make("staged")
restored = make("restored")
forsaken = make("forsaken")
withdrawn = make("withdrawn")
contested = make("contested")
approved = make("approved", promotion="manual")
tampered = make("tampered")
costly = make("costly")
deployed = make("deployed")
placed = make("placed")
filling = make("filling")
forged = make("forged")
waiting = make("waiting")
incomplete = make("incomplete", Incomplete)
detached = make("detached", Detached)
bypassing = make("bypassing", Bypassing)
poor = make("poor", minimum=1.01)
no_column = make("no_column", fault="no column")
bad_label = make("bad_label", fault="label")
all_nan = make("all_nan", fault="nan")
not_a_pipeline = "a string"
