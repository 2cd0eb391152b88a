"""A loss that is not finite ends training at once, says where, and is not kept."""

import re
from pathlib import Path

import pytest
import torch
from support.training_lab import (
    CLASSES,
    COLUMNS,
    CONFIG,
    change,
    fit,
    make_rows,
    open_rows,
    order_of,
)
from torch import Tensor, nn

from components.errors import GateError
from components.storage import Storage
from components.train import loop
from components.train.checkpoint import Checkpoints, Epoch
from components.train.config import TrainConfig
from components.train.loop import Reports, train_model

ROWS = make_rows()
mean = nn.functional.cross_entropy


def step_rows(config: TrainConfig, epoch: int) -> list[Tensor]:
    order = order_of(65, config)
    steps = [order.epoch(epoch).step_rows(step) for step in range(order.steps)]
    return [torch.cat([torch.from_numpy(part) for part in step]) for step in steps]


def held(config: TrainConfig) -> Tensor:
    return torch.from_numpy(order_of(65, config).partition.held_rows(0))


def poisoned(row: int) -> tuple[Tensor, Tensor]:
    inputs = ROWS[0].clone()
    inputs[row, 1] = float("nan")
    return inputs, ROWS[1]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_loss_that_is_not_finite_names_its_step_and_rows(shards: int, tmp_path: Path) -> None:
    config = change(batch_size=8, shards=shards)
    row = next(row for row in range(30, 65) if row not in held(config))
    with pytest.raises(GateError) as caught:
        fit(poisoned(row), config, checkpoints=Checkpoints(Storage(tmp_path), "key", print))
    words = re.search(
        r"it was nan at epoch 1, step (\d+) of 8 \(a batch of (\d+) rows of the training split, "
        r"numbers ([\d, ]+)\)\. Lower learning_rate \(now 0\.01\), set clip_norm, or look for bad",
        str(caught.value),
    )
    assert words, str(caught.value)
    step, size, named = int(words[1]), int(words[2]), [int(n) for n in words[3].split(", ")]
    assert row in named
    assert sorted(step_rows(config, 1)[step - 1].tolist()) == named
    assert size == len(named)
    assert caught.value.stage == "train"
    assert list(tmp_path.iterdir()) == [], "nothing is kept of it"


def test_of_many_rows_the_first_are_named() -> None:
    config = change(batch_size=1000)
    rows = sorted(step_rows(config, 1)[0].tolist())
    named = ", ".join(map(str, rows[:8]))
    with pytest.raises(GateError, match=rf"a batch of 59 rows .*, numbers {named}, \.\.\.\)"):
        fit(poisoned(rows[-1]), config)


@pytest.mark.parametrize("when", ["training", "validation"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_later_one_stops_at_once_and_is_not_kept(when: str, value: float, tmp_path: Path) -> None:
    model = nn.Linear(COLUMNS, CLASSES)
    epochs: list[Epoch] = []
    steps = 0

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal steps
        bad = model.training == (when == "training") and len(epochs) == 1
        steps += bad
        return mean(logits, labels) * (value if bad else 1.0)

    storage = Storage(tmp_path)
    place = {
        "training": r"epoch 2, step 1 of 4 \(a batch of 14 rows",
        "validation": r"the validation loss after epoch 2\. Lower",
    }[when]
    with pytest.raises(GateError, match=rf"it was {value} at {place}"):
        train_model(
            model,
            loss,
            open_rows(ROWS, CONFIG),
            CONFIG,
            checkpoints=Checkpoints(storage, "key", print),
            every_s=0,
            reports=Reports(epoch=epochs.append),
        )
    assert (len(epochs), steps) == (1, 1)
    found = Checkpoints(storage, "key", print).load()
    assert found is not None
    assert (found.progress.epoch, found.progress.step) <= (2, 3)
    assert all(tensor.isfinite().all() for tensor in found.tensors.values())


def test_losses_that_are_looked_at_late_are_not_kept_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU, where looking costs time: before a checkpoint they are looked at."""
    train = loop._Loop.__init__

    def late(self: loop._Loop, *arguments: object) -> None:
        train(self, *arguments)
        self._lag = 64

    monkeypatch.setattr(loop._Loop, "__init__", late)
    monkeypatch.setattr(loop, "_LOOK_S", 0.0)
    config = change(batch_size=8)
    row = next(row for row in range(65) if row in torch.cat(step_rows(config, 1)[2:4]))
    kept: list[tuple[int, int]] = []

    monkeypatch.setattr(
        Checkpoints, "save", lambda self, s: kept.append((s.progress.epoch, s.progress.step))
    )
    with pytest.raises(GateError, match=rf"epoch 1, step (3|4) of 8 .*\b{row}\b"):
        fit(
            poisoned(row),
            config,
            checkpoints=Checkpoints(Storage(tmp_path), "key", print),
            every_s=0,
        )
    assert kept in ([(1, 1), (1, 2)], [(1, 1), (1, 2), (1, 3)])
