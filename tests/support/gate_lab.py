"""A logistic regression with its true weights, on rows made for it, and what may be wrong with it.

Legend: B = batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from components.contract import Model, ModelMetadata, TensorSpec
from components.data.encoding import Encoding, Features, fit_encoding
from components.data.memory import ArraySource
from components.data.schema import RowSchema
from components.data.snapshot import Snapshot
from components.data.take import take_snapshot
from components.metrics import binary_metrics
from components.pipeline import Pipeline, QualityGate, Resampled, Scored, SliceGate
from components.storage import Storage
from components.train.config import TrainConfig
from components.validate.run import Evidence, collect_evidence

TRAIN, HOLDOUT = 800, 600
NUMBERS = ("signal", "noise", "other")
SCHEMA = RowSchema(
    pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("group", pa.string(), nullable=False),
            *(pa.field(name, pa.float32(), nullable=False) for name in NUMBERS),
            pa.field("label", pa.int8(), nullable=False),
        ]
    ),
    key=("id",),
)
FEATURES = Features(label="label", classes=2, categorical=("group",), numeric=NUMBERS)

Columns = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class World:
    """How labels come about: ``P(1) = sigmoid(slope * signal + shift)``."""

    slope: float = 2.0
    shift: float = 0.0
    lawless: bool = False  # in group b, a coin decides
    leak: bool = False  # the column 'other' holds the label
    repeated: int = 0  # held-out rows that also stand in training, with keys of their own
    shared_keys: int = 0  # held-out rows with the key of a training row


class Regression(Model):
    """Probability of 1 from the signal; the noise counts for nothing."""

    def __init__(self, encoding: Encoding, config: TrainConfig) -> None:
        super().__init__()
        self._inputs = encoding.specs()
        self.groups = nn.Embedding(len(encoding.categorical[0].vocabulary) + 1, 1)
        self.line = nn.Linear(len(NUMBERS), 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        codes, numbers = inputs
        return (self.groups(codes[:, 0]) + self.line(numbers)).squeeze(1)

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch.sigmoid(self(*inputs)),)

    def get_model_metadata(self) -> ModelMetadata:
        return ModelMetadata(
            inputs=self._inputs,
            outputs=(TensorSpec(name="probability", dtype="float32", shape=("batch",)),),
            classes=("no", "yes"),
            description="a logistic regression",
        )


@final
class Timid(Regression):
    """Never says yes, though it ranks well and is calibrated where the label is rare."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs).clamp(max=-0.05)


@final
class Reckless(Regression):
    """Quite sure of itself, and wrong, where the noise is large."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs) - 1000 * torch.relu(inputs[1][:, 1] - 1.9)


@final
class Entangled(Regression):
    """An answer depends, a little, on the other rows of the batch."""

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        chance = torch.sigmoid(self(*inputs))
        return (0.999 * chance + 0.001 * chance.mean(),)


@final
class Detached(Regression):
    """The embedding gets no gradient."""

    def forward(self, *inputs: Tensor) -> Tensor:
        codes, numbers = inputs
        return (self.groups(codes[:, 0]).detach() + self.line(numbers)).squeeze(1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def metrics(scored: Scored) -> dict[str, float]:
    """Those of a probability, and the accuracy at one half."""
    right = (scored.outputs["probability"] > 0.5) == scored.labels
    return {**binary_metrics(scored, "probability"), "accuracy": float(right.mean())}


def accuracy(scored: Scored) -> Resampled:
    right = ((scored.outputs["probability"] > 0.5) == scored.labels).astype(np.int64)
    return lambda counts: float(np.dot(right, counts) / counts.sum())


def no_source(at: object) -> ArraySource:
    raise NotImplementedError


PIPELINE = Pipeline(
    name="lab",
    description="a test's pipeline",
    source=no_source,
    features=FEATURES,
    model=Regression,
    loss=loss,
    config=TrainConfig(),
    metrics=metrics,
    gates=(
        QualityGate(metric="roc_auc", minimum=0.65),
        QualityGate(metric="log_loss", maximum=0.75),
        QualityGate(metric="calibration_error", maximum=0.1),
        SliceGate(metric="roc_auc", column="group", minimum=0.6, min_rows=50),
    ),
    metric="accuracy",
    margin=0.02,
    dated=False,
    resampled=accuracy,
)


@dataclass(frozen=True)
class Candidate:
    """A model with the weights of its line, in the pipeline and the world that it lives in."""

    model: type[Regression] = Regression
    slope: float = 2.0
    noise: float = 0.0
    shift: float = 0.0
    world: World = field(default_factory=World)
    pipeline: Pipeline = PIPELINE

    def evidence(self, folder: Path) -> Evidence:
        """Run every gate of validate."""
        rows = snapshot(self.world, folder)
        encoding = fit_encoding(FEATURES, rows.statistics)
        pipeline = replace(self.pipeline, model=self.model)
        key = SCHEMA.key
        model = self.build(encoding)
        return collect_evidence(pipeline, pipeline.config, model, encoding, rows, seed=0, key=key)

    def build(self, encoding: Encoding) -> Regression:
        """The model in eval mode."""
        model = self.model(encoding, TrainConfig())
        with torch.no_grad():
            model.groups.weight.fill_(0.0)
            model.line.weight.copy_(torch.tensor([[self.slope, self.noise, 0.0]]))
            model.line.bias.fill_(self.shift)
        return model.eval()


def snapshot(world: World, folder: Path) -> Snapshot:
    """Rows of both splits, stored as a run stores them."""
    train, holdout = _rows(world, TRAIN, 0), _rows(world, HOLDOUT, 1)
    for name in (*NUMBERS, "group", "label"):
        if world.repeated:
            holdout[name][-world.repeated :] = train[name][: world.repeated]
    train["id"], holdout["id"] = np.arange(TRAIN), TRAIN + np.arange(HOLDOUT) - world.shared_keys
    source = ArraySource(_table(train), _table(holdout), SCHEMA)
    return take_snapshot(source, FEATURES, date(2014, 1, 1), Storage(str(folder)))


def _rows(world: World, count: int, seed: int) -> Columns:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(count, 3)).astype(np.float32)
    group = np.where(generator.random(count) < 0.2, "b", "a")
    chance = 1 / (1 + np.exp(-world.slope * values[:, 0] - world.shift))
    if world.lawless:
        chance = np.where(group == "b", 0.5, chance)
    label = (generator.random(count) < chance).astype(np.int8)
    if world.leak:
        values[:, 2] = label + 0.01 * values[:, 2]
    return {"group": group, **dict(zip(NUMBERS, values.T.copy(), strict=True)), "label": label}


def _table(columns: Mapping[str, npt.NDArray[np.generic]]) -> pa.Table:
    return pa.table({name: pa.array(columns[name]) for name in SCHEMA.names}).cast(SCHEMA.arrow)
