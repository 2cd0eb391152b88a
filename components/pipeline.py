"""A pipeline: the typed object that names a model, its data, its training and its gates.

Pipelines are found by Python entry points of the group ``assay.pipelines``, so that a team keeps
its own in its own package and a flow parameter never carries an import path.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from components.contract import DataSource, Model, SourceContext
from components.data.encoding import Features
from components.errors import AssayError, ConfigError
from components.export.config import Release
from components.import_guard import network_refused
from components.pipeline_entries import GROUP, pipeline_entries
from components.train.config import TrainConfig
from components.validate.waivers import Waiver

Floats = npt.NDArray[np.float64]
Resampled = Callable[[npt.NDArray[np.int64]], float]
"""From how often each row was drawn, (B,), to a metric of the drawn rows."""


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
        _require_a_bound("quality gate", self)


@dataclass(frozen=True, kw_only=True)
class SliceGate:
    """A bound on a metric of the held-out rows of each value of a column.

    Args:
        metric: One of the pipeline's metrics, measured on the rows of one value at a time.
        column: A column of the rows: strings, whole numbers or truth values. Missing values are a
            slice of their own. The label's own column gives a slice per class.
        minimum: The least that a slice may have.
        maximum: The most that a slice may have.
        min_rows: Slices with fewer rows are reported and not judged.
    """

    metric: str
    column: str
    minimum: float = float("-inf")
    maximum: float = float("inf")
    min_rows: int = 100

    def __post_init__(self) -> None:
        """Refuse a gate that lets everything pass."""
        _require_a_bound("slice gate", self)
        if self.min_rows < 1:
            raise ValueError(
                f"slice gate on {self.metric!r}: min_rows must be >= 1, got {self.min_rows}"
            )


def _require_a_bound(kind: str, gate: QualityGate | SliceGate) -> None:
    if gate.minimum == float("-inf") and gate.maximum == float("inf"):
        raise ValueError(f"{kind} on {gate.metric!r} must set minimum or maximum; got neither")
    if gate.minimum > gate.maximum or (math.isinf(gate.minimum) and math.isinf(gate.maximum)):
        raise ValueError(
            f"{kind} on {gate.metric!r} must have bounds that a number can keep; got "
            f"{gate.minimum}..{gate.maximum}"
        )


@dataclass(frozen=True, kw_only=True)
class LeakageAlarms:
    """When features are suspected to know the label, or the held-out rows to be known.

    Args:
        single_feature_auc: ROC-AUC that no feature may reach alone, from 0.5 to 1.
        allowed: Features that may, each with the reason.
        duplicate_share: Share of held-out rows whose features and label also stand in training.
    """

    single_feature_auc: float = 0.99
    allowed: Mapping[str, str] = field(default_factory=dict)
    duplicate_share: float = 0.01

    def __post_init__(self) -> None:
        """Refuse an alarm that could never go off, and an exception without a reason."""
        if not 0.5 < self.single_feature_auc <= 1:
            raise ValueError(
                "leakage: single_feature_auc must be above 0.5 and at most 1, got "
                f"{self.single_feature_auc}"
            )
        if not 0 <= self.duplicate_share < 1:
            raise ValueError(
                f"leakage: duplicate_share must be >= 0 and below 1, got {self.duplicate_share}"
            )
        if mute := [name for name, reason in self.allowed.items() if not reason.strip()]:
            raise ValueError(f"leakage: allowed must give a reason; {', '.join(mute)} has none")


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
        gates: Bounds that a candidate must keep, on all held-out rows or on slices of them.
        metric: The metric that decides between candidate and champion; higher is better.
        margin: How much worse than the champion a candidate may be, at the lower end of the
            confidence interval of their difference, and still replace it.
        dated: Whether ``as_of`` selects rows.
        waivers: Tensors whose gradient differs on purpose, each with its reason.
        frozen: Parameters that stay as the model's class made them, by name or pattern such as
            ``backbone.*``.
        leakage: When features or held-out rows are suspected of leakage.
        resampled: Maps scored rows to a function from counts (B,), how often each row was drawn, to
            the deciding metric of the drawn rows. Without it ``metrics`` is called for every
            resample of the bootstrap, and there are fewer of them.
        baseline: Maps label frequencies of training (classes,) and a number of rows to the outputs
            of a model that predicts them always. Needed only where these do not follow from the
            outputs' shapes.
        release: Operator set, variants, budget and way of promotion of the registered files.
    """

    name: str
    description: str
    source: Callable[[SourceContext], DataSource]
    features: Features
    model: type[Model]
    loss: Callable[[Tensor, Tensor], Tensor]
    config: TrainConfig
    metrics: Callable[[Scored], dict[str, float]]
    gates: tuple[QualityGate | SliceGate, ...]
    metric: str
    margin: float
    dated: bool
    waivers: tuple[Waiver, ...] = ()
    frozen: tuple[str, ...] = ()
    leakage: LeakageAlarms = field(default_factory=LeakageAlarms)
    resampled: Callable[[Scored], Resampled] | None = None
    baseline: Callable[[Floats, int], Mapping[str, npt.NDArray[np.generic]]] | None = None
    release: Release = field(default_factory=Release)

    def __post_init__(self) -> None:
        """Refuse a pipeline whose decision or gates could not be made."""
        if not self.gates:
            raise ValueError(f"pipeline {self.name!r} must declare at least one quality gate")
        if not 0 <= self.margin < math.inf:
            raise ValueError(
                f"pipeline {self.name!r}: margin must be finite and >= 0, got {self.margin}"
            )
        if unread := sorted(self.leakage.allowed.keys() - {*self.features.columns}):
            raise ValueError(
                f"pipeline {self.name!r}: leakage.allowed must name features; got "
                f"{', '.join(unread)}"
            )


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
        with network_refused():
            pipeline = entry.load()
    except AssayError:
        raise
    except (Exception, SystemExit) as error:  # a module that exits must not end the run as 0
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
