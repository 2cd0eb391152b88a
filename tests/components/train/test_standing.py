"""Training that is cut into pieces comes to the same bytes."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training_lab import (
    Restless,
    Stop,
    change,
    each_loss,
    fit,
    in_pieces,
    make_rows,
    network,
    sha256,
)
from torch import nn

from components.storage import Storage
from components.train import loop
from components.train.checkpoint import Checkpoints, State
from components.train.config import TrainConfig
from components.train.loop import Reports, Trained

CASES: dict[str, tuple[TrainConfig, dict[str, Any]]] = {
    "plain": (change(), {}),
    "every generator": (change(), {"build": Restless}),
    "float16": (change(precision="float16", clip_norm=0.5), {}),
    "float16 that overflows": (
        change(precision="float16"),
        {"loss": lambda logits, labels: 100 * each_loss(logits, labels)},
    ),
    "bfloat16": (change(precision="bfloat16"), {}),
    "accumulation": (change(accumulate=3, schedule="cosine"), {"build": Restless}),
    "shards": (change(shards=3), {"build": Restless}),
    "early stopping": (change(epochs=30, patience=1, learning_rate=0.2), {}),
    "class weights": (
        change(epochs=2),
        {"loss": each_loss, "class_weights": torch.tensor([1.0, 2.0, 0.5])},
    ),
}


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loop, "_LOOK_S", 0.0)
    with torch.random.fork_rng():
        yield


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def refuse(text: str) -> None:
    raise AssertionError(text)


def checkpoints(storage: Storage) -> Checkpoints:
    return Checkpoints(storage, "key", refuse)


def run(storage: Storage, stop: Stop, config: TrainConfig, more: dict[str, Any]) -> Trained:
    random.seed(stop.looks)  # what ran before makes no difference
    np.random.seed(stop.looks)
    torch.manual_seed(stop.looks)
    reports = Reports(stop=stop, warn=refuse)
    return fit(make_rows(), config, checkpoints=checkpoints(storage), reports=reports, **more)


@pytest.mark.parametrize("case", CASES)
def test_pieces_come_to_the_bytes_of_the_whole(storage: Storage, case: str) -> None:
    config, more = CASES[case]
    whole = fit(make_rows(), config, **more)
    if case == "early stopping":
        assert whole.best.number < len(whole.history) < config.epochs
    for seed in (0, 1):
        trained, pieces = in_pieces(lambda stop: run(storage, stop, config, more), seed)
        assert pieces >= 2
        assert trained.resumed is not None
        assert sha256(trained) == sha256(whole)
        assert trained.history == whole.history
        assert trained.best == whole.best
        storage.clear()


def test_one_step_at_a_time_comes_to_the_same(storage: Storage) -> None:
    config = change(epochs=2)
    trained, pieces = in_pieces(lambda stop: run(storage, stop, config, {}), 0, most=1)
    assert pieces == 8, "there are as many steps"
    whole = fit(make_rows(), config)
    assert (sha256(trained), trained.history) == (sha256(whole), whole.history)


def test_pieces_kept_in_an_object_store_come_to_the_same() -> None:
    storage = Storage("memory://standing-tests/job")
    try:
        trained, pieces = in_pieces(lambda stop: run(storage, stop, change(), {}), 3)
    finally:
        storage.clear()
    assert pieces >= 2
    assert sha256(trained) == sha256(fit(make_rows(), change()))


def test_a_finished_run_is_told_again_without_a_step(storage: Storage) -> None:
    whole = fit(make_rows(), checkpoints=checkpoints(storage))
    told: list[Any] = []

    class Untouched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.load_state_dict({f"inner.{n}": t for n, t in self.inner.state_dict().items()})

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            raise AssertionError("a step was made")

    def build() -> nn.Module:
        model = network()
        model.forward = Untouched().forward
        return model

    reports = Reports(resumed=told.extend, epoch=refuse, stop=lambda: True)
    again = fit(make_rows(), build=build, checkpoints=checkpoints(storage), reports=reports)
    assert (sha256(again), again.history, again.best) == (sha256(whole), whole.history, whole.best)
    assert again.resumed == (4, 0)
    assert tuple(told) == whole.history


def test_a_stop_leaves_a_checkpoint_of_its_step(storage: Storage) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(storage, Stop(5), change(), {})
    found = checkpoints(storage).load()
    assert found is not None
    assert (found.progress.epoch, found.progress.step) == (2, 1)
    assert len(found.progress.history) == 1


def test_checkpoints_come_as_often_as_asked(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[int, int]] = []
    save = Checkpoints.save

    def note(self: Checkpoints, state: State) -> None:
        saved.append((state.progress.epoch, state.progress.step))
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save", note)
    fit(make_rows(), change(epochs=2), checkpoints=checkpoints(storage), every_s=3600)
    assert saved == [(2, 0), (3, 0)], "after every epoch"
    saved.clear()
    storage.clear()
    fit(make_rows(), change(epochs=1), checkpoints=checkpoints(storage), every_s=0)
    assert saved == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 0)]


def test_the_scale_of_losses_is_kept(storage: Storage) -> None:
    config, more = CASES["float16 that overflows"]
    fit(make_rows(), config, checkpoints=checkpoints(storage), **more)
    found = checkpoints(storage).load()
    assert found is not None
    assert 1 <= found.progress.scaler["scale"] < 65536, "it began with that, and was halved"
    assert {"growth_factor", "growth_interval", "_growth_tracker"} <= found.progress.scaler.keys()


def test_a_torn_checkpoint_costs_the_steps_since_the_one_before(storage: Storage) -> None:
    whole = fit(make_rows())
    for looks in (5, 2):
        with pytest.raises(KeyboardInterrupt):
            run(storage, Stop(looks), change(), {})
    *_, last = (name for name in storage.names() if name.endswith(".safetensors"))
    storage.write(last, storage.read(last)[:100])
    warnings: list[str] = []
    trained = fit(make_rows(), checkpoints=Checkpoints(storage, "key", warnings.append))
    assert len(warnings) == 1
    assert trained.resumed == (2, 1)
    assert (sha256(trained), trained.history) == (sha256(whole), whole.history)


def test_a_full_disk_costs_the_checkpoints_and_nothing_else(
    storage: Storage, tmp_path: Path
) -> None:
    import resource

    whole = fit(make_rows())
    with pytest.raises(KeyboardInterrupt):
        run(storage, Stop(5), change(), {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    warnings: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        trained = fit(
            make_rows(),
            checkpoints=checkpoints(storage),
            every_s=0,
            reports=Reports(warn=warnings.append),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert trained.resumed == (2, 1)
    assert (sha256(trained), trained.history) == (sha256(whole), whole.history)
    assert len(warnings) == 3 + 1 + 4 + 1
    assert "File too large" in warnings[0]
    assert "after epoch 2, step 2" in warnings[0]
    assert "Training goes on" in warnings[0] and "ASSAY_CHECKPOINT_ROOT" in warnings[0]


def test_training_does_not_depend_on_whether_it_is_kept(storage: Storage) -> None:
    kept = fit(make_rows(), build=Restless, checkpoints=checkpoints(storage), every_s=0)
    assert sha256(kept) == sha256(fit(make_rows(), build=Restless))
