"""Two small models with their rows, and the file that the first one exports to."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from components.contract import Arrays, Model, ModelMetadata, TensorSpec
from components.data.encoding import Encoding, Features, fit_encoding
from components.data.statistics import describe
from components.export.onnx_export import export_onnx

SIZES = (12, 40, 40)
NUMBERS = 5
CLASSES = ("early", "late", "cancelled")


class Tabular(Model):
    """Embeddings beside imputed and standardised numbers, as for flights."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(size, 8) for size in SIZES])
        self.register_buffer("mean", torch.full((NUMBERS,), 0.5))
        self.register_buffer("std", torch.full((NUMBERS,), 2.0))
        width = 8 * len(SIZES) + 2 * NUMBERS
        self.net = nn.Sequential(
            nn.Linear(width, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, len(CLASSES))
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        codes, numbers = inputs
        missing = numbers.isnan()
        scaled = torch.where(missing, torch.zeros_like(numbers), (numbers - self.mean) / self.std)
        tables = [table(codes[:, i]) for i, table in enumerate(self.tables)]
        return self.net(torch.cat([*tables, scaled, missing.to(numbers.dtype)], dim=1))

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        logits = self(*inputs)
        return logits, logits.softmax(dim=-1)

    def get_model_metadata(self) -> ModelMetadata:
        width = len(CLASSES)
        return ModelMetadata(
            inputs=(
                TensorSpec(name="categorical", dtype="int64", shape=("batch", len(SIZES))),
                TensorSpec(name="numeric", dtype="float32", shape=("batch", NUMBERS)),
            ),
            outputs=(
                TensorSpec(name="logits", dtype="float32", shape=("batch", width)),
                TensorSpec(name="probabilities", dtype="float32", shape=("batch", width)),
            ),
            classes=CLASSES,
            description="a small tabular model",
        )


class Conv(Model):
    """Convolution, batch norm, pooling; a label beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 4),
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.body(inputs[0])

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        logits = self(*inputs)
        return logits, logits.argmax(dim=-1)

    def get_model_metadata(self) -> ModelMetadata:
        return ModelMetadata(
            inputs=(TensorSpec(name="image", dtype="float32", shape=("batch", 1, 8, 8)),),
            outputs=(
                TensorSpec(name="logits", dtype="float32", shape=("batch", 4)),
                TensorSpec(name="label", dtype="int64", shape=("batch",)),
            ),
            classes=("a", "b", "c", "d"),
            description="a small image model",
        )


def tabular_rows(count: int) -> Arrays:
    """Codes and numbers; every seventh number of the first two columns is missing."""
    rng = np.random.default_rng(5)
    numbers = rng.normal(size=(count, NUMBERS)).astype(np.float32)
    numbers[::7, :2] = np.nan
    codes = [rng.integers(0, size, count) for size in SIZES]
    return {"categorical": np.stack(codes, axis=1), "numeric": numbers}


@pytest.fixture
def tabular() -> Tabular:
    torch.manual_seed(0)
    return Tabular().eval()


@pytest.fixture
def conv() -> Conv:
    torch.manual_seed(0)
    return Conv().eval()


@pytest.fixture(scope="session")
def rows() -> Arrays:
    return tabular_rows(300)


@pytest.fixture(scope="session")
def images() -> Arrays:
    rng = np.random.default_rng(6)
    return {"image": rng.random((200, 1, 8, 8), dtype=np.float32)}


@pytest.fixture(scope="session")
def encoding() -> Encoding:
    features = Features(
        label="late", classes=3, categorical=("carrier", "dest"), numeric=("delay",), min_count=1
    )
    columns = {"carrier": ["AA", "UA"], "dest": ["SFO", None], "delay": [1.5, -2.0], "late": [0, 2]}
    return fit_encoding(features, describe(pa.table(columns)))


@pytest.fixture(scope="session")
def exported(encoding: Encoding) -> bytes:
    torch.manual_seed(0)
    example = [torch.zeros(2, len(SIZES), dtype=torch.int64), torch.zeros(2, NUMBERS)]
    return export_onnx(
        Tabular().eval(), example, metadata={"assay.encoding": encoding.model_dump_json()}
    )


@pytest.fixture(scope="session")
def exported_conv() -> bytes:
    torch.manual_seed(0)
    return export_onnx(Conv().eval(), [torch.zeros(2, 1, 8, 8)], metadata={})
