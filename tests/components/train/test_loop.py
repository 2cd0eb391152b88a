"""The training loop, against slow references: bytes, losses, epochs, and where it stops."""

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save
from support.training_lab import (
    CLASSES,
    COLUMNS,
    CONFIG,
    CPU,
    change,
    each_loss,
    fit,
    make_rows,
    network,
    open_rows,
    order_of,
    plain,
    sha256,
)
from torch import Tensor, nn

from components.train import loop
from components.train.checkpoint import Epoch
from components.train.config import TrainConfig
from components.train.device import reproducible
from components.train.loop import Reports, train_model
from components.train.objective import Objective
from components.train.parallel import ALONE

ROWS = make_rows()
mean = nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def _own_generator() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def step_rows(config: TrainConfig, epoch: int) -> list[Tensor]:
    order = order_of(65, config)
    steps = [order.epoch(epoch).step_rows(step) for step in range(order.steps)]
    return [torch.cat([torch.from_numpy(part) for part in step]) for step in steps]


def held(config: TrainConfig) -> Tensor:
    return torch.from_numpy(order_of(65, config).partition.held_rows(0))


def test_the_same_seed_gives_the_same_bytes() -> None:
    torch.manual_seed(1)
    first = fit(ROWS)
    torch.manual_seed(2)  # what ran before makes no difference
    second = fit(ROWS)
    assert sha256(first) == sha256(second)
    assert first.history == second.history


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"learning_rate": 2e-2}, {"batch_size": 8}, {"shards": 2}]
)
def test_another_seed_or_setting_gives_other_bytes(other: dict[str, object]) -> None:
    assert sha256(fit(ROWS, change(**other))) != sha256(fit(ROWS))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_loss_goes_down(precision: str) -> None:
    config = change(epochs=40, patience=40, precision=precision)
    trained = fit(ROWS, config, lambda: nn.Linear(COLUMNS, CLASSES))
    first, last = trained.history[0], trained.history[-1]
    assert last.train_loss < 0.7 * first.train_loss
    assert trained.best.validation_loss < first.validation_loss


@pytest.mark.parametrize("batch_size", [1, 16, 19, 58, 59, 1000])
@pytest.mark.parametrize("loss", [mean, each_loss])
def test_every_row_weighs_the_same_in_the_reported_loss(batch_size: int, loss: object) -> None:
    """Unchanged weights: the epoch's loss is that of all rows at once."""
    config = change(batch_size=batch_size, learning_rate=1e-30, weight_decay=0, epochs=1)
    torch.manual_seed(0)
    model = nn.Linear(COLUMNS, CLASSES)
    chosen = held(config)
    others = torch.tensor([row for row in range(65) if row not in chosen])
    with torch.no_grad():
        wanted = [mean(model(ROWS[0][rows]), ROWS[1][rows]).item() for rows in (others, chosen)]
    trained = train_model(model, loss, open_rows(ROWS, config), config)
    found = [trained.best.train_loss, trained.best.validation_loss]
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"shards": 3}, {"accumulate": 4}, {"clip_norm": 0.3}])
def test_the_loop_agrees_with_a_slow_reference(settings: dict[str, object]) -> None:
    """AdamW under a one-cycle rate, batch by batch, written out."""
    config = change(epochs=2, **settings)
    trained = fit(ROWS, config, plain)
    with reproducible(config):
        model = plain()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    steps = len(step_rows(config, 1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=steps * 2 + 1
    )
    states, losses = [], []
    for epoch in (1, 2):
        total = 0.0
        for batch in step_rows(config, epoch):
            optimizer.zero_grad()
            loss = mean(model(ROWS[0][batch]), ROWS[1][batch])
            loss.backward()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / order_of(65, config).rows)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert [epoch.train_loss for epoch in trained.history] == pytest.approx(losses, rel=1e-5)
    for name, value in states[trained.best.number - 1].items():
        torch.testing.assert_close(trained.state[name], value, rtol=1e-4, atol=1e-6)


def test_losses_of_rows_and_their_mean_train_alike() -> None:
    assert sha256(fit(ROWS, loss=each_loss)) == sha256(fit(ROWS, loss=mean))


class Scripted(nn.Module):
    """A model whose validation losses are given, and which counts the epochs."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self.losses = losses

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            return self.weight.expand(len(inputs))
        self.epoch += 1
        return torch.full((len(inputs),), float(self.losses[int(self.epoch) - 1]))


@pytest.mark.parametrize(
    ("losses", "patience", "epochs", "best"),
    [
        ([3, 2, 2.5, 2.25, 1], 2, 4, 2),
        ([3, 2, 2.5, 2.25, 1], 3, 5, 5),
        ([1, 2, 3], 1, 2, 1),
        ([1, 1, 1, 1], 2, 3, 1),
        ([5, 4, 3, 2], 1, 4, 4),
        ([5], 1, 1, 1),
    ],
)
def test_training_stops_after_its_patience_and_keeps_the_best_epoch(
    losses: list[float], patience: int, epochs: int, best: int
) -> None:
    config = change(batch_size=1000, epochs=len(losses), patience=patience)
    trained = fit(ROWS, config, lambda: Scripted(losses), lambda logits, labels: logits.mean())
    assert [epoch.number for epoch in trained.history] == list(range(1, epochs + 1))
    assert [epoch.validation_loss for epoch in trained.history] == losses[:epochs]
    assert trained.best == trained.history[best - 1]
    assert trained.state["epoch"] == best, "the state is that of the best epoch"


def test_the_kept_state_gives_the_kept_loss() -> None:
    config = change(epochs=30, patience=5, learning_rate=0.2)
    model = network()
    trained = train_model(model, mean, open_rows(ROWS, config), config)
    assert trained.best.number < len(trained.history), "the last epoch must not be the best"
    assert trained.best.validation_loss == min(e.validation_loss for e in trained.history)
    again = network()
    again.load_state_dict(trained.state)
    rows = [tensor[held(config)] for tensor in ROWS]
    for chosen in (model, again):
        loss = Objective(chosen, mean, config, CPU, None, ALONE).evaluate(chosen, rows)
        assert loss == trained.best.validation_loss


@pytest.mark.parametrize("batch_size", [16, 29])
def test_one_row_too_many_leaves_no_batch_of_a_single_row(batch_size: int) -> None:
    """Running statistics need two rows: a last batch of one would end the training."""
    config = change(batch_size=batch_size, validation_fraction=1e-9)
    order = order_of(2 * batch_size + 2, config)
    assert order.rows == 2 * batch_size + 1
    assert min(order.epoch(1).sizes()) > 1
    assert len(fit(make_rows(2 * batch_size + 2), config).history) == 3


class Tied(nn.Module):
    """One parameter under two names, stored by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(COLUMNS, COLUMNS).T)
        self.same = nn.Linear(COLUMNS, COLUMNS, bias=False)
        self.same.weight = self.weight
        self.head = nn.Linear(COLUMNS, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.same(torch.tanh(inputs @ self.weight)))
        return logits


def test_tied_weights_are_trained_once_and_stay_tied() -> None:
    with reproducible(CONFIG):
        before = Tied().weight.clone()
    trained = fit(ROWS, build=Tied)
    assert torch.equal(trained.state["weight"], trained.state["same.weight"])
    assert not torch.allclose(trained.state["weight"], before)
    assert save(trained.state), "which takes no shared memory and no strides"
    config = change(epochs=1, batch_size=1000, schedule="constant", weight_decay=0)
    moved = fit(ROWS, config, Tied).state["weight"] - before
    assert moved.abs().max().item() <= config.learning_rate * 1.001, "AdamW's first step, made once"


def test_frozen_parameters_stay() -> None:
    def build() -> nn.Module:
        model = plain()
        model[0].weight.requires_grad_(False)
        return model

    with reproducible(CONFIG):
        before = plain().state_dict()
    after = fit(ROWS, build=build).state
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"0.weight"}


def test_the_state_lies_on_the_cpu_and_needs_no_gradient() -> None:
    trained = fit(ROWS)
    assert {tensor.device.type for tensor in trained.state.values()} == {"cpu"}
    assert not any(tensor.requires_grad for tensor in trained.state.values())
    assert trained.device == "cpu"


def test_the_rows_are_left_as_they_were() -> None:
    before = [tensor.clone() for tensor in ROWS]
    fit(ROWS)
    assert all(torch.equal(a, b) for a, b in zip(before, ROWS, strict=True))


def test_hooks_of_the_model_and_its_parts_fire_in_every_step() -> None:
    calls = dict.fromkeys(("whole", "part", "training", "backward"), 0)

    def forward(module: nn.Module, inputs: object, output: object) -> None:
        calls["whole"] += 1
        calls["training"] += module.training

    def part(module: nn.Module, inputs: object, output: object) -> None:
        calls["part"] += 1

    def backward(module: nn.Module, inputs: object, outputs: object) -> None:
        calls["backward"] += 1

    model = network()
    model.register_forward_hook(forward)
    model[1].register_forward_hook(part)
    model[-1].register_full_backward_hook(backward)
    train_model(model, mean, open_rows(ROWS, CONFIG), CONFIG)
    steps = 3 * order_of(65, CONFIG).steps
    assert calls == {
        "whole": steps + 3,
        "part": steps + 3,
        "training": steps,
        "backward": steps,
    }


def test_progress_and_epochs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LOOK_S", 0.0)
    steps: list[tuple[int, int]] = []
    epochs: list[Epoch] = []
    reports = Reports(epoch=epochs.append, steps=lambda *told: steps.append(told))
    trained = fit(ROWS, reports=reports)
    assert steps == [(step, 12) for step in range(12)]
    assert tuple(epochs) == trained.history


def test_a_stop_without_checkpoints_stops() -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_LOOK_S", 0.0)
        fit(ROWS, reports=Reports(stop=lambda: True))


def test_several_inputs_keep_their_order() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(CLASSES, CLASSES)
            self.linear = nn.Linear(COLUMNS, CLASSES)

        def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
            logits: Tensor = self.table(codes) + self.linear(numbers)
            return logits

    inputs, labels = ROWS
    trained = fit((labels, inputs, labels), change(epochs=60, patience=60, learning_rate=0.1), Two)
    assert trained.best.validation_loss < 0.1, "the code is the label, row by row"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_compiled_model_trains_to_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, but not turned into machine code, which takes a minute; test_gpu.py does that."""
    modes: list[str] = []
    trace = torch.compile

    def traced(model: nn.Module, mode: str) -> object:
        modes.append(mode)
        return trace(model, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    config = change(epochs=2, batch_size=29)
    results = [fit(ROWS, config.model_copy(update={"compile": m})) for m in ("off", "default")]
    assert modes == ["default"]
    assert sha256(results[0]) == sha256(results[1])
    assert results[0].history == results[1].history
