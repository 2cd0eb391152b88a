"""Training from a snapshot to files, on the real digits."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load as load_tensors
from support.training_lab import (
    COLUMNS,
    PIPELINE,
    LabModel,
    Stop,
    each_loss,
    in_pieces,
    make_table,
    snapshot_of,
)
from torch import Tensor, nn

from components.contract import Model, ModelMetadata, TensorSpec
from components.data.digits import DigitsSource
from components.data.encoding import Encoding, Folded
from components.data.snapshot import Snapshot
from components.data.statistics import describe
from components.data.take import take_snapshot
from components.errors import ContractError, DataError, InfrastructureError
from components.pipelines.digits import DigitsModel, pipeline
from components.plan import DEFAULT_AS_OF
from components.storage import Storage
from components.train import loop
from components.train.checkpoint import Checkpoints, Epoch
from components.train.config import TrainConfig
from components.train.device import reproducible
from components.train.loop import Reports, Trained
from components.train.run import (
    TrainingFiles,
    build_model,
    class_weights,
    load_model,
    plot_losses,
    run_training,
    to_tensors,
    write_files,
)

CONFIG = pipeline.config.model_copy(update={"epochs": 2, "device": "cpu"})
ENCODING = Encoding(folded=(Folded(column="image", shape=(1, 8, 8)),))


@dataclass(frozen=True)
class Done:
    trained: Trained
    files: TrainingFiles
    epochs: list[Epoch]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    folder = tmp_path_factory.mktemp("data")
    source = DigitsSource(folder / "digits")
    source.prepare()
    storage = Storage(folder / "snapshots")
    return take_snapshot(source, pipeline.features, DEFAULT_AS_OF, storage)


@pytest.fixture(scope="module")
def rows(snapshot: Snapshot) -> pa.Table:
    return snapshot.table("train")


def train(snapshot: Snapshot, folder: Path, config: TrainConfig = CONFIG) -> Done:
    epochs: list[Epoch] = []
    reports = Reports(epoch=epochs.append)
    trained, encoding = run_training(pipeline, config, snapshot, reports=reports)
    return Done(trained, write_files(trained, encoding, folder), epochs)


@pytest.fixture(scope="module")
def done(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return train(snapshot, tmp_path_factory.mktemp("first"))


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


def test_the_same_seed_gives_the_same_files(snapshot: Snapshot, done: Done, tmp_path: Path) -> None:
    torch.manual_seed(12345)
    again = train(snapshot, tmp_path)
    for name in ("weights", "encoding", "loss_curve"):
        assert sha256(getattr(again.files, name)) == sha256(getattr(done.files, name)), name


def test_another_seed_gives_other_weights(snapshot: Snapshot, done: Done, tmp_path: Path) -> None:
    other = train(snapshot, tmp_path, CONFIG.model_copy(update={"seed": 1}))
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
def test_a_required_gpu_is_asked_for_before_any_work() -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was read")

    config = CONFIG.model_copy(update={"device": "auto", "require_gpu": True})
    with pytest.raises(InfrastructureError, match="Send the stage to a GPU worker"):
        run_training(pipeline, config, Untouchable())


def lab(tmp_path: Path, count: int = 200, label: pa.DataType | None = None) -> Snapshot:
    return snapshot_of(make_table(count, label), tmp_path, PIPELINE)


def test_training_on_one_row_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2 rows.*got 1"):
        run_training(PIPELINE, PIPELINE.config, SimpleNamespace(rows={"train": 1}))


def test_two_rows_are_enough(tmp_path: Path) -> None:
    class Small(LabModel):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.body = nn.Linear(COLUMNS + 4, 16)

    trained, _ = run_training(replace(PIPELINE, model=Small), PIPELINE.config, lab(tmp_path, 2))
    assert len(trained.history) == 3


def test_memory_that_is_short_names_the_settings_that_help(tmp_path: Path) -> None:
    class Greedy(LabModel):
        def forward(self, *inputs: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    with pytest.raises(InfrastructureError, match=r"batch_size=16 in 1 parts.*accumulate=2"):
        run_training(replace(PIPELINE, model=Greedy), PIPELINE.config, lab(tmp_path))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_is_stopped_and_goes_on(
    snapshot: Snapshot, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LOOK_S", 0.0)

    def run(stop: Stop) -> Trained:
        kept = Checkpoints(Storage(tmp_path), "key", print)
        return run_training(
            pipeline, CONFIG, snapshot, checkpoints=kept, reports=Reports(stop=stop)
        )[0]

    trained, pieces = in_pieces(run, 0, most=25)
    assert pieces >= 2
    assert trained.history == done.trained.history
    assert all(torch.equal(trained.state[n], t) for n, t in done.trained.state.items())


def test_frozen_parameters_stay_and_the_others_move(tmp_path: Path) -> None:
    frozen = replace(PIPELINE, frozen=("words.*", "body.0.bias"))
    trained, encoding = run_training(frozen, PIPELINE.config, lab(tmp_path))
    with reproducible(PIPELINE.config):
        before = dict(build_model(frozen, encoding, PIPELINE.config).named_parameters())
    same = {name for name in before if torch.equal(before[name].detach(), trained.state[name])}
    assert same == {"words.weight", "body.0.bias"}


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("heads.*",), r"heads\.\* matches none of .*head\.0\.weight"),
        (("head.*", "nothing", "no.*"), r"nothing, no\.\* matches none"),
        (("*",), "none is left to train"),
    ],
)
def test_frozen_must_name_some_parameters_and_leave_some(
    patterns: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ContractError, match=words):
        build_model(replace(pipeline, frozen=patterns), ENCODING, CONFIG)


def test_a_tied_parameter_is_frozen_by_either_name(tmp_path: Path) -> None:
    class Tied(LabModel):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.again = self.words

    encoding = run_training(PIPELINE, PIPELINE.config, lab(tmp_path))[1]
    for pattern in ("words.*", "again.*"):
        tied = replace(PIPELINE, model=Tied, frozen=(pattern,))
        model = build_model(tied, encoding, PIPELINE.config)
        assert not model.get_parameter("words.weight").requires_grad


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64()])
def test_balanced_weights_are_inverse_to_how_frequent_a_class_is(kind: pa.DataType) -> None:
    statistics = describe(make_table(200, kind))
    labels = make_table(200).column("label").to_pylist()
    config = CONFIG.model_copy(update={"class_weights": "balanced"})
    found = class_weights(PIPELINE, config, statistics)
    assert found is not None
    assert found.tolist() == pytest.approx([200 / (3 * labels.count(c)) for c in range(3)])
    assert class_weights(PIPELINE, CONFIG, statistics) is None


def test_labels_may_be_booleans() -> None:
    features = replace(PIPELINE.features, classes=2)
    statistics = describe(pa.table({"label": [True, False, True, True]}))
    config = CONFIG.model_copy(update={"class_weights": "balanced"})
    found = class_weights(replace(PIPELINE, features=features), config, statistics)
    assert found is not None
    assert found.tolist() == pytest.approx([2.0, 2 / 3])


def test_a_class_without_rows_cannot_be_balanced() -> None:
    features = replace(PIPELINE.features, classes=4)
    config = CONFIG.model_copy(update={"class_weights": "balanced"})
    with pytest.raises(DataError, match="class 3 of 'label' has none. Set class_weights=none"):
        class_weights(replace(PIPELINE, features=features), config, describe(make_table(200)))


def test_balanced_weights_train_with_losses_of_rows_alone(tmp_path: Path) -> None:
    snapshot = lab(tmp_path)
    config = PIPELINE.config.model_copy(update={"class_weights": "balanced"})
    with pytest.raises(ContractError, match="set class_weights=none"):
        run_training(PIPELINE, config, snapshot)
    by_row = replace(PIPELINE, loss=each_loss)
    balanced, plain = (run_training(by_row, c, snapshot)[0] for c in (config, PIPELINE.config))
    assert not torch.equal(balanced.state["head.weight"], plain.state["head.weight"])


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
    history = tuple(
        Epoch(number=n, train_loss=1 / n, validation_loss=2 / n, learning_rate=1, gradient_norm=0)
        for n in (1, 2)
    )
    pictures = {
        plot_losses(history, history[0]),
        plot_losses(history, history[1]),
        plot_losses(history[:1], history[0]),
    }
    assert len(pictures) == 3
    assert plot_losses(history, history[0]) in pictures
