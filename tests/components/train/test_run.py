"""Training from rows to files, on the real digits."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from components.contract import Model, ModelMetadata, TensorSpec
from components.data.digits import DigitsSource
from components.data.encoding import Encoding, Folded
from components.data.rows import load_rows
from components.errors import ContractError, DataError, InfrastructureError
from components.pipelines.digits import DigitsModel, pipeline
from components.plan import DEFAULT_AS_OF
from components.train.config import TrainConfig
from components.train.engine import Epoch, Trained
from components.train.run import (
    TrainingFiles,
    build_model,
    load_model,
    plot_losses,
    run_training,
    to_tensors,
)

CONFIG = pipeline.config.model_copy(update={"epochs": 2, "device": "cpu"})
ENCODING = Encoding(folded=(Folded(column="image", shape=(1, 8, 8)),))


@dataclass(frozen=True)
class Done:
    trained: Trained
    files: TrainingFiles
    epochs: list[Epoch]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    source = DigitsSource(tmp_path_factory.mktemp("data") / "digits")
    source.prepare()
    return load_rows(source, "train", DEFAULT_AS_OF, pipeline.features)


def train(rows: pa.Table, folder: Path, config: TrainConfig = CONFIG) -> Done:
    epochs: list[Epoch] = []
    trained, files = run_training(pipeline, config, rows, folder, on_epoch=epochs.append)
    return Done(trained, files, epochs)


@pytest.fixture(scope="module")
def done(rows: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return train(rows, tmp_path_factory.mktemp("first"))


@pytest.fixture(autouse=True)
def _own_generator() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_training_leaves_three_files(done: Done) -> None:
    folder = done.files.weights.parent
    names = ["encoding.json", "loss_curve.png", "weights.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert done.files.loss_curve.read_bytes().startswith(b"\x89PNG\r\n")
    assert tuple(done.epochs) == done.trained.history
    assert done.trained.history[1].train_loss < done.trained.history[0].train_loss


def test_the_same_seed_gives_the_same_files(rows: pa.Table, done: Done, tmp_path: Path) -> None:
    torch.manual_seed(12345)
    again = train(rows, tmp_path)
    for name in ("weights", "encoding", "loss_curve"):
        assert sha256(getattr(again.files, name)) == sha256(getattr(done.files, name)), name


def test_another_seed_gives_other_weights(rows: pa.Table, done: Done, tmp_path: Path) -> None:
    other = train(rows, tmp_path, CONFIG.model_copy(update={"seed": 1}))
    assert sha256(other.files.weights) != sha256(done.files.weights)
    assert sha256(other.files.encoding) == sha256(done.files.encoding)


def test_the_weights_are_those_of_the_best_epoch(done: Done) -> None:
    stored = load_tensors(done.files.weights.read_bytes())
    assert stored.keys() == done.trained.state.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in done.trained.state.items())


def test_what_was_stored_loads_as_a_model_in_eval_mode(rows: pa.Table, done: Done) -> None:
    model, encoding = load_model(pipeline, CONFIG, done.files.encoding, done.files.weights)
    assert not any(module.training for module in model.modules())
    assert encoding == ENCODING
    with torch.no_grad():
        logits = model(*to_tensors(encoding.encode(rows)))
    right = logits.argmax(dim=1).numpy() == rows.column("digit").to_numpy()
    assert right.mean() > 0.7, "two epochs are enough to be far from chance"


def test_weights_of_another_model_do_not_load(done: Done, tmp_path: Path) -> None:
    from safetensors.torch import save

    path = tmp_path / "weights.safetensors"
    path.write_bytes(save({"head.0.weight": torch.zeros(2, 2)}))
    with pytest.raises(RuntimeError, match=r"head\.0\.weight"):
        load_model(pipeline, CONFIG, done.files.encoding, path)


def test_tensors_keep_order_names_and_memory() -> None:
    arrays = {"b": np.arange(3), "a": np.ones((3, 2), np.float32)}
    tensors = to_tensors(arrays)
    assert [tuple(tensor.shape) for tensor in tensors] == [(3,), (3, 2)]
    arrays["b"][0] = 7
    assert tensors[0][0] == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_a_required_gpu_is_asked_for_before_any_work(tmp_path: Path) -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was read")

    config = CONFIG.model_copy(update={"device": "auto", "require_gpu": True})
    with pytest.raises(InfrastructureError, match="Send the stage to a GPU worker"):
        run_training(pipeline, config, Untouchable(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(
    rows: pa.Table, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="'digit' must be present"):
        train(rows.drop_columns(["digit"]), tmp_path)
    with pytest.raises(DataError, match="'image'"):
        train(rows.drop_columns(["image"]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_training_on_one_row_is_refused(rows: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 2 rows"):
        train(rows.slice(0, 1), tmp_path)


def test_a_model_that_declares_other_inputs_is_refused() -> None:
    class Stubborn(Model):
        def __init__(self, encoding: Encoding, config: TrainConfig) -> None:
            super().__init__()

        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0]

        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return inputs

        def get_model_metadata(self) -> ModelMetadata:
            spec = TensorSpec(name="image", dtype="float32", shape=("batch", 64))
            return ModelMetadata(inputs=(spec,), outputs=(), classes=(), description="")

    with pytest.raises(ContractError, match=r"Stubborn\.get_model_metadata must declare") as caught:
        build_model(replace(pipeline, model=Stubborn), ENCODING, CONFIG)
    assert "8, 8" in str(caught.value)
    assert "64" in str(caught.value)


def test_an_incomplete_model_is_named() -> None:
    class Half(Model):
        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0]

    with pytest.raises(ContractError, match="Half must implement .*get_model_metadata, predict"):
        build_model(replace(pipeline, model=Half), ENCODING, CONFIG)


def test_a_fresh_model_depends_on_the_generator_alone() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(build_model(pipeline, ENCODING, CONFIG).state_dict()["head.0.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert isinstance(build_model(pipeline, ENCODING, CONFIG), DigitsModel)


def test_the_plot_shows_what_it_is_given() -> None:
    history = (Epoch(1, 1.0, 2.0), Epoch(2, 0.5, 1.5))
    pictures = {
        plot_losses(history, history[0]),
        plot_losses(history, history[1]),
        plot_losses(history[:1], history[0]),
    }
    assert len(pictures) == 3
    assert plot_losses(history, history[0]) in pictures
