"""A pipeline: the typed object that names a model, its data, its training and its gates.

Pipelines are found by Python entry points of the group ``assay.pipelines``, so that a team keeps
its own in its own package and a flow parameter never carries an import path.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from components.contract import DataSource, Model, SourceContext
from components.data.encoding import Features
from components.errors import AssayError, ConfigError
from components.pipeline_entries import GROUP, pipeline_entries
from components.train.config import TrainConfig
from components.validate.gradient_report import Waiver


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Held-out rows with their labels and a predictor's outputs, row by row."""

    rows: pa.Table
    labels: npt.NDArray[np.int64]
    outputs: Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class QualityGate:
    """An absolute bound on a metric of the held-out rows."""

    metric: str
    minimum: float = float("-inf")
    maximum: float = float("inf")

    def __post_init__(self) -> None:
        """Refuse a gate that lets everything pass."""
        if self.minimum == float("-inf") and self.maximum == float("inf"):
            raise ValueError(
                f"quality gate on {self.metric!r} must set minimum or maximum; got neither"
            )


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Everything that a retraining run needs to know about one model.

    Args:
        name: The registered model's name, and the entry point's.
        description: One line for people.
        source: Gives the data source, from what the installation offers it.
        features: Which columns are read, and how.
        model: The network's class, built as ``model(encoding, config)``.
        loss: Maps logits and labels (B,) int64 to the loss of each row (B,), or to their mean.
        config: Training defaults; its class names and types the keys of ``--set``.
        metrics: Maps scored rows to named metrics.
        gates: Bounds that a candidate must keep.
        metric: The metric that decides between candidate and champion; higher is better.
        margin: How much worse than the champion a candidate may be and still replace it.
        dated: Whether ``as_of`` selects rows.
        waivers: Tensors whose gradient differs on purpose, each with its reason.
        frozen: Parameters that stay as the model's class made them, by name or pattern such as
            ``backbone.*``.
    """

    name: str
    description: str
    source: Callable[[SourceContext], DataSource]
    features: Features
    model: type[Model]
    loss: Callable[[Tensor, Tensor], Tensor]
    config: TrainConfig
    metrics: Callable[[Scored], dict[str, float]]
    gates: tuple[QualityGate, ...]
    metric: str
    margin: float
    dated: bool
    waivers: tuple[Waiver, ...] = ()
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a pipeline whose decision or gates could not be made."""
        if not self.gates:
            raise ValueError(f"pipeline {self.name!r} must declare at least one quality gate")
        if self.margin < 0:
            raise ValueError(f"pipeline {self.name!r}: margin must be >= 0, got {self.margin}")


def load_pipeline(name: str) -> Pipeline:
    """Import a registered pipeline.

    Raises:
        ConfigError: No pipeline has this name, or its module cannot be imported.
    """
    entries = pipeline_entries()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"pipeline must be one of {', '.join(entries) or '(none registered)'}; got {name!r}. "
            f"{hint}Pipelines are registered as entry points of the group {GROUP}."
        )
    entry = entries[name]
    try:
        pipeline = entry.load()
    except AssayError:
        raise
    except Exception as error:
        raise ConfigError(
            f"pipeline {name!r} must be importable from {entry.value}; got "
            f"{type(error).__name__}: {error}. Import the module by hand to see where."
        ) from error
    if not isinstance(pipeline, Pipeline):
        raise ConfigError(
            f"entry point {entry.value} must name a Pipeline object; got a "
            f"{type(pipeline).__name__}. Point it at the module's Pipeline(...) instance."
        )
    return pipeline
