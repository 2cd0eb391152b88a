"""A job's training from a snapshot to files: weights, encoding and loss curve."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from components.contract import Arrays, Model, admit, instantiate
from components.data.encoding import Encoding, fit_encoding
from components.data.snapshot import Snapshot
from components.data.statistics import Statistics
from components.errors import ContractError, DataError
from components.pipeline import Pipeline
from components.state import write_atomic
from components.train.checkpoint import Checkpoints, Epoch
from components.train.config import TrainConfig
from components.train.device import choose_device, memory_errors, reproducible
from components.train.loop import SILENT, Reports, Trained, train_model
from components.train.parallel import ALONE, Group
from components.train.rows import open_feed

_TRUTH = {"false": "0", "true": "1"}
"""Labels that are stored as booleans."""


@dataclass(frozen=True)
class TrainingFiles:
    """What training leaves in a folder."""

    weights: Path
    encoding: Path
    loss_curve: Path


def run_training(
    pipeline: Pipeline,
    config: TrainConfig,
    snapshot: Snapshot,
    *,
    checkpoints: Checkpoints | None = None,
    every_s: float = 60.0,
    group: Group = ALONE,
    reports: Reports = SILENT,
) -> tuple[Trained, Encoding]:
    """Fit the encoding and train the model on the snapshot's training rows.

    Args:
        pipeline: Gives features, model and loss.
        config: Hyper-parameters.
        snapshot: The rows.
        checkpoints: Where to go on from, and where the state is kept.
        every_s: Seconds between two checkpoints within an epoch.
        group: The processes that train together.
        reports: Whom to tell.

    Raises:
        InfrastructureError: A GPU is required and absent, raised before any work; or the device
            has too little memory.
        DataError: The rows do not fit the features, or there are fewer than two.
        ContractError: The model's class is incomplete, takes other inputs than are encoded, or has
            nothing to train.
        GateError: The loss stops being finite.
        KeyboardInterrupt: ``reports.stop`` asked for it.
    """
    device = choose_device(config)
    if snapshot.rows["train"] < 2:
        raise DataError(
            "training needs at least 2 rows, one to learn from and one to validate on; got "
            f"{snapshot.rows['train']}. Choose another as_of, or mend the data source."
        )
    encoding = fit_encoding(pipeline.features, snapshot.statistics)
    with reproducible(config), memory_errors(config):
        model = build_model(pipeline, encoding, config)
        if group.rank:  # the same weights everywhere, but dropout of its own
            own = np.random.SeedSequence((config.seed, group.rank)).generate_state(1)
            torch.manual_seed(int(own[0]))  # the CPU's generator looks at 32 bits only
        trained = train_model(
            model,
            pipeline.loss,
            open_feed(snapshot, pipeline.features, encoding, config, device, group),
            config,
            class_weights=class_weights(pipeline, config, snapshot.statistics),
            checkpoints=checkpoints,
            every_s=every_s,
            group=group,
            reports=reports,
        )
    return trained, encoding


def write_files(trained: Trained, encoding: Encoding, folder: Path) -> TrainingFiles:
    """Write what training gave; equal weights give equal bytes."""
    files = TrainingFiles(
        folder / "weights.safetensors", folder / "encoding.json", folder / "loss_curve.png"
    )
    write_atomic(files.weights, save_tensors(trained.state))
    write_atomic(files.encoding, encoding.model_dump_json(indent=1).encode())
    write_atomic(files.loss_curve, plot_losses(trained.history, trained.best))
    return files


def class_weights(pipeline: Pipeline, config: TrainConfig, statistics: Statistics) -> Tensor | None:
    """How much a row of each class counts, float32 (classes,): all rows / (classes * its rows).

    Raises:
        DataError: A class has no training row.
    """
    if config.class_weights == "none":
        return None
    features = pipeline.features
    found = statistics.columns[features.label].values or {}
    counts = {_TRUTH.get(value, value): count for value, count in found.items()}
    booleans = {"0": "false", "1": "true"}
    names = [str(label) for label in range(features.classes)]
    rows = [counts.get(name, counts.get(booleans.get(name, ""), 0)) for name in names]
    if 0 in rows:
        raise DataError(
            "class_weights=balanced needs training rows of every class; class "
            f"{rows.index(0)} of {features.label!r} has none. Set class_weights=none, or choose "
            "another as_of."
        )
    return torch.tensor([sum(rows) / (features.classes * count) for count in rows])


def to_tensors(arrays: Arrays) -> tuple[Tensor, ...]:
    """Arrays in order, as tensors that share their memory."""
    return tuple(torch.from_numpy(array) for array in arrays.values())


def build_model(pipeline: Pipeline, encoding: Encoding, config: TrainConfig) -> Model:
    """A fresh model for an encoding, with the pipeline's frozen parameters frozen.

    Raises:
        ContractError: The class is incomplete, its metadata names other inputs, or a pattern of
            ``frozen`` matches no parameter or leaves none to train.
    """
    model = instantiate(pipeline.model, encoding, config)
    declared = model.get_model_metadata().inputs
    wanted, found = encoding.specs(), tuple(spec.unitless for spec in declared)
    if not admit(found, wanted):
        raise ContractError(
            f"{type(model).__name__}.get_model_metadata must declare the inputs that the features "
            f"encode, {[s.model_dump() for s in wanted]}; got {[s.model_dump() for s in found]}."
        )
    _freeze(model, pipeline)
    return model


def _freeze(model: Model, pipeline: Pipeline) -> None:
    named = list(model.named_parameters(remove_duplicate=False))  # a tied one has two names
    names = [name for name, _ in named]
    idle = [p for p in pipeline.frozen if not any(fnmatchcase(name, p) for name in names)]
    for name, parameter in named:
        if any(fnmatchcase(name, pattern) for pattern in pipeline.frozen):
            parameter.requires_grad_(False)
    if idle or not any(parameter.requires_grad for parameter in model.parameters()):
        what = f"{', '.join(idle)} matches none" if idle else "none is left to train"
        raise ContractError(
            f"pipeline {pipeline.name!r}: frozen must name parameters of the model and leave some "
            f"to train; {what} of {', '.join(names) or 'no parameters at all'}."
        )


def load_model(
    pipeline: Pipeline, config: TrainConfig, encoding: Path, weights: Path
) -> tuple[Model, Encoding]:
    """A trained model in eval mode, from the files that training left."""
    columns = Encoding.model_validate_json(encoding.read_bytes())
    model = build_model(pipeline, columns, config)
    model.load_state_dict(load_tensors(weights.read_bytes()), strict=True)
    return model.eval(), columns


def plot_losses(history: Sequence[Epoch], best: Epoch) -> bytes:
    """A PNG of training and validation loss by epoch, the kept epoch marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    numbers = [epoch.number for epoch in history]
    axes.plot(numbers, [e.train_loss for e in history], "o-", label="training")
    axes.plot(numbers, [e.validation_loss for e in history], "o-", label="validation")
    axes.axvline(best.number, color="grey", linestyle=":", label=f"kept: epoch {best.number}")
    axes.set(xlabel="epoch", ylabel="mean loss per row", title="Loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
