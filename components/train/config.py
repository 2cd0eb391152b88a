"""What a training run can be told."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainConfig(BaseModel):
    """Hyper-parameters of one training run; every field can be set with ``--set name=value``.

    A pipeline with settings of its own subclasses this with further fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(10, ge=1, description="upper bound on passes over the training rows")
    batch_size: int = Field(
        256, ge=1, description="most rows in one optimiser step, plus one for each shard but one"
    )
    accumulate: int = Field(
        1, ge=1, description="parts of a batch that go through the network one after another"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["one_cycle", "cosine", "constant"] = Field(
        "one_cycle", description="course of the learning rate over all steps"
    )
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay of AdamW")
    clip_norm: float = Field(
        0.0, ge=0, description="largest norm of the whole gradient; 0 does not clip"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rows count inversely to how frequent their class is"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seeds weights, order and dropout")
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the training rows kept for early stopping"
    )
    validation_rows: int = Field(
        131_072, ge=1, description="most rows kept for early stopping, whatever the share"
    )
    patience: int = Field(
        3, ge=1, description="epochs without a better validation loss before stopping"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of forward and backward; weights and optimiser stay float32"
    )
    compile: Literal["off", "default", "reduce-overhead"] = Field(
        "off", description="mode of torch.compile; reduce-overhead uses CUDA graphs"
    )
    threads: int = Field(
        1, ge=1, le=256, description="intra-op threads; part of what makes bytes reproducible"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    require_gpu: bool = Field(False, description="refuse to train without CUDA")
    memory_rows: int = Field(
        2_000_000, ge=0, description="rows held in memory; more are streamed, with equal results"
    )
    workers: int = Field(1, ge=1, description="processes that train together; needs assay[ray]")
    shards: int = Field(
        0, ge=0, description="parts that the rows are dealt to; 0 is as many as workers"
    )

    @model_validator(mode="after")
    def _deal_evenly(self) -> Self:
        if self.parts % self.workers:
            raise ValueError(
                f"workers must divide shards, so that each trains on as many; got workers="
                f"{self.workers} and shards={self.shards}"
            )
        if self.parts > self.batch_size:
            raise ValueError(
                "batch_size must be at least shards, so that no step is without rows; got "
                f"batch_size={self.batch_size} and {self.parts} shards"
            )
        return self

    @property
    def parts(self) -> int:
        """Parts that the rows are dealt to."""
        return self.shards or self.workers
