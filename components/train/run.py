"""A job's training from rows to files: weights, encoding and loss curve."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from components.contract import Arrays, Model, instantiate
from components.data.encoding import Encoding, fit_encoding, read_labels
from components.errors import ContractError, DataError
from components.pipeline import Pipeline
from components.state import write_atomic
from components.train.config import TrainConfig
from components.train.engine import Epoch, Trained, choose_device, reproducible, train_model


@dataclass(frozen=True)
class TrainingFiles:
    """What training leaves in a folder."""

    weights: Path
    encoding: Path
    loss_curve: Path


def run_training(
    pipeline: Pipeline,
    config: TrainConfig,
    rows: pa.Table,
    folder: Path,
    *,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Trained, TrainingFiles]:
    """Fit the encoding and the model on the training rows and write the results to ``folder``.

    Raises:
        InfrastructureError: A GPU is required and absent; raised before any work.
        DataError: The rows do not fit the features, or there are fewer than two.
        ContractError: The model's class is incomplete, or takes other inputs than are encoded.
        GateError: The loss stops being finite.
    """
    choose_device(config)
    if rows.num_rows < 2:
        raise DataError(
            "training needs at least 2 rows, one to learn from and one to validate on; got "
            f"{rows.num_rows}. Choose another as_of, or mend the data source."
        )
    encoding = fit_encoding(pipeline.features, rows)
    inputs = to_tensors(encoding.encode(rows))
    labels = torch.from_numpy(read_labels(rows, pipeline.features))
    with reproducible(config):
        model = build_model(pipeline, encoding, config)
        trained = train_model(
            model,
            pipeline.loss,
            inputs,
            labels,
            config,
            on_epoch=on_epoch,
            on_progress=on_progress,
        )
    files = TrainingFiles(
        folder / "weights.safetensors", folder / "encoding.json", folder / "loss_curve.png"
    )
    write_atomic(files.weights, save_tensors(trained.state))
    write_atomic(files.encoding, encoding.model_dump_json(indent=1).encode())
    write_atomic(files.loss_curve, plot_losses(trained.history, trained.best))
    return trained, files


def to_tensors(arrays: Arrays) -> tuple[Tensor, ...]:
    """Arrays in order, as tensors that share their memory."""
    return tuple(torch.from_numpy(array) for array in arrays.values())


def build_model(pipeline: Pipeline, encoding: Encoding, config: TrainConfig) -> Model:
    """A fresh model for an encoding.

    Raises:
        ContractError: The class is incomplete, or its metadata names other inputs.
    """
    model = instantiate(pipeline.model, encoding, config)
    wanted, found = encoding.specs(), model.get_model_metadata().inputs
    if wanted != found:
        raise ContractError(
            f"{type(model).__name__}.get_model_metadata must declare the inputs that the features "
            f"encode, {[s.model_dump() for s in wanted]}; got {[s.model_dump() for s in found]}."
        )
    return model


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
