"""What a training run can be told."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainConfig(BaseModel):
    """Hyper-parameters of one training run; every field can be set with ``--set name=value``.

    A pipeline with settings of its own subclasses this with further fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(10, ge=1, description="upper bound on passes over the training rows")
    batch_size: int = Field(256, ge=1, description="rows in one optimiser step")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay of AdamW")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seeds weights, order and dropout")
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the training rows kept for early stopping"
    )
    patience: int = Field(
        3, ge=1, description="epochs without a better validation loss before stopping"
    )
    threads: int = Field(
        1, ge=1, le=256, description="intra-op threads; part of what makes bytes reproducible"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    require_gpu: bool = Field(False, description="refuse to train without CUDA")
