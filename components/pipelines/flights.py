"""flights: will a flight out of New York arrive more than 15 minutes late?

Legend: B = batch, C = categorical columns, F = numeric columns, K = quantile bins.
"""

import itertools
import math
from typing import final

import torch
from pydantic import Field
from torch import Tensor, nn

from components.contract import Model, ModelMetadata, TensorSpec
from components.data.encoding import Encoding, Features, Numeric
from components.data.flights import WEATHER, FlightsSource
from components.export.config import Budget, Release, Variant
from components.metrics import binary_metrics, resampled_roc_auc
from components.pipeline import Pipeline, QualityGate, Scored, SliceGate
from components.train.config import TrainConfig


class FlightsConfig(TrainConfig):
    """Training settings, and the size of the network."""

    hidden: int = Field(128, ge=1, le=4096, description="units of the first layer; then half of it")
    dropout: float = Field(0.3, ge=0, lt=1, description="share of hidden units dropped in training")


class NumericBlock(nn.Module):
    """Missing values, normalisation and quantile bins of numeric columns, as part of the network.

    The bins are the piecewise-linear encoding of Gorishniy et al.
    (https://arxiv.org/abs/2203.05556). All statistics are buffers, taken from the training rows.
    """

    mean_F: Tensor
    std_F: Tensor
    low_FK: Tensor
    scale_FK: Tensor

    def __init__(self, columns: tuple[Numeric, ...]) -> None:
        super().__init__()
        bins = max(len(column.quantiles) for column in columns) - 1
        low, scale = zip(*(_bins(column.quantiles, bins) for column in columns), strict=True)
        self.register_buffer("mean_F", torch.tensor([column.mean for column in columns]))
        self.register_buffer("std_F", torch.tensor([column.std for column in columns]))
        self.register_buffer("low_FK", torch.tensor(low))
        self.register_buffer("scale_FK", torch.tensor(scale))
        self.width = len(columns) * (bins + 1)

    def forward(self, numeric_BF: Tensor) -> Tensor:
        """Map raw numbers (B, F), NaN where missing, to (B, F + F * K)."""
        known_BF = torch.where(torch.isnan(numeric_BF), self.mean_F, numeric_BF)
        normal_BF = ((known_BF - self.mean_F) / self.std_F).clamp(-4.0, 4.0)
        place_BFK = (known_BF.unsqueeze(2) - self.low_FK) * self.scale_FK
        bins_BFK = place_BFK.clamp(0.0, 1.0) - 0.5
        return torch.cat([normal_BF, bins_BFK.flatten(1)], dim=1)


def _bins(quantiles: tuple[float, ...], bins: int) -> tuple[list[float], list[float]]:
    """Lower edges and inverse widths; a bin that a column does not have gives a constant."""
    edges = list(itertools.pairwise(quantiles))
    spare = bins - len(edges)
    low = [a for a, _ in edges] + [quantiles[-1]] * spare
    scale = [1.0 / (b - a) for a, b in edges] + [0.0] * spare
    return low, scale


@final
class FlightsModel(Model):
    """Embeddings of the categories and bins of the numbers, then two hidden layers."""

    def __init__(self, encoding: Encoding, config: FlightsConfig) -> None:
        super().__init__()
        self._inputs = encoding.specs()
        sizes = [len(column.vocabulary) + 1 for column in encoding.categorical]
        tables = [nn.Embedding(size, min(16, max(2, math.isqrt(size - 1) + 1))) for size in sizes]
        for table in tables:
            nn.init.normal_(table.weight, std=0.1)
        self.embeddings = nn.ModuleList(tables)
        self.numbers = NumericBlock(encoding.numeric)
        width = self.numbers.width + sum(table.embedding_dim for table in tables)
        self.layers = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden // 2),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden // 2, 1),
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map codes (B, C) and numbers (B, F) to logits (B,)."""
        codes_BC, numeric_BF = inputs
        parts = [table(codes_BC[:, i]) for i, table in enumerate(self.embeddings)]
        logit_B1: Tensor = self.layers(torch.cat([*parts, self.numbers(numeric_BF)], dim=1))
        return logit_B1.squeeze(1)

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Map codes and numbers to the probability of being late (B,)."""
        return (torch.sigmoid(self(*inputs)),)

    def get_model_metadata(self) -> ModelMetadata:
        """Inputs ``categorical`` and ``numeric``, output ``probability``."""
        return ModelMetadata(
            inputs=self._inputs,
            outputs=(TensorSpec(name="probability", dtype="float32", shape=("batch",)),),
            classes=("on time", "late"),
            description="probability that a flight arrives more than 15 minutes late",
        )


def late_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits (B,) against labels (B,) of 0 and 1."""
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def flight_metrics(scored: Scored) -> dict[str, float]:
    """ROC-AUC, log loss, Brier score, and ROC-AUC by carrier and by origin."""
    return binary_metrics(scored, "probability", groups=("carrier", "origin"))


pipeline = Pipeline(
    name="flights",
    description="will a flight arrive more than 15 minutes late? (336,776 flights, embeddings+MLP)",
    source=lambda at: FlightsSource(at.folder),
    features=Features(
        label="late",
        classes=2,
        categorical=(
            "carrier",
            "origin",
            "dest",
            "weekday",
            "plane_type",
            "manufacturer",
            "engine",
        ),
        numeric=(
            "sched_dep_minute",
            "sched_arr_minute",
            "distance",
            "dest_lat",
            "dest_lon",
            "plane_age",
            "engines",
            "seats",
            *(name for name in WEATHER if name != "wind_gust"),
        ),
    ),
    model=FlightsModel,
    loss=late_loss,
    config=FlightsConfig(
        epochs=5, batch_size=2048, learning_rate=2e-3, weight_decay=0.1, patience=3
    ),
    metrics=flight_metrics,
    gates=(
        QualityGate(metric="roc_auc", minimum=0.65),
        QualityGate(metric="brier", maximum=0.25),
        QualityGate(metric="calibration_error", maximum=0.15),
        SliceGate(metric="roc_auc", column="carrier", minimum=0.55, min_rows=500),
        SliceGate(metric="roc_auc", column="origin", minimum=0.6, min_rows=200),
    ),
    metric="roc_auc",
    margin=0.005,
    dated=True,
    resampled=resampled_roc_auc("probability"),
    release=Release(
        variants=(
            Variant(kind="fp16", tolerance=2e-3, metric_drop=0.001),
            Variant(kind="int8", tolerance=0.05, metric_drop=0.002),
        ),
        budget=Budget(p99_ms=5.0, rows_per_s=5_000),
    ),
)
