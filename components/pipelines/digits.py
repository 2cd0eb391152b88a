"""digits: which digit does an 8 by 8 image show?

Legend: B = batch.
"""

from typing import final

import torch
from torch import Tensor, nn

from components.contract import Model, ModelMetadata, TensorSpec
from components.data.digits import DigitsSource
from components.data.encoding import Encoding, Features
from components.metrics import class_metrics, resampled_accuracy
from components.pipeline import Pipeline, QualityGate, SliceGate
from components.train.config import TrainConfig

CLASSES = tuple(str(digit) for digit in range(10))


@final
class DigitsModel(Model):
    """Two convolutions, one pooling, one hidden layer; grey values are scaled inside."""

    def __init__(self, encoding: Encoding, config: TrainConfig) -> None:
        super().__init__()
        self._inputs = encoding.specs()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, len(CLASSES))
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map images (B, 1, 8, 8), grey values 0 to 16, to logits (B, 10)."""
        (image_B188,) = inputs
        logits_B10: Tensor = self.head(self.features(image_B188 / 16.0))
        return logits_B10

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Map images to class probabilities (B, 10)."""
        return (torch.softmax(self(*inputs), dim=1),)

    def get_model_metadata(self) -> ModelMetadata:
        """One input ``image``, one output ``probabilities``."""
        return ModelMetadata(
            inputs=self._inputs,
            outputs=(
                TensorSpec(name="probabilities", dtype="float32", shape=("batch", len(CLASSES))),
            ),
            classes=CLASSES,
            description="probability of each digit shown in an image of 8 by 8 grey values",
        )


pipeline = Pipeline(
    name="digits",
    description="which digit does an 8x8 image show? (1,797 images, convolutional network)",
    source=lambda at: DigitsSource(at.folder),
    features=Features(label="digit", classes=10, tensors={"image": (1, 8, 8)}),
    model=DigitsModel,
    loss=nn.functional.cross_entropy,
    config=TrainConfig(epochs=20, batch_size=64, learning_rate=5e-3, weight_decay=1e-2, patience=6),
    metrics=lambda scored: class_metrics(scored, "probabilities"),
    gates=(
        QualityGate(metric="accuracy", minimum=0.97),
        QualityGate(metric="calibration_error", maximum=0.03),
        SliceGate(metric="accuracy", column="digit", minimum=0.85, min_rows=20),
    ),
    metric="accuracy",
    margin=0.02,
    dated=False,
    resampled=resampled_accuracy("probabilities"),
)
