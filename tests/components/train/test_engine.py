"""The training loop, against slow references: bytes, losses, epochs, and what it leaves behind."""

import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from components.errors import GateError
from components.train import engine
from components.train.config import TrainConfig
from components.train.engine import (
    Epoch,
    Trained,
    evaluate_loss,
    reproducible,
    split_rows,
    train_model,
)

ROWS, COLUMNS, CLASSES = 65, 4, 3
CONFIG = TrainConfig(epochs=3, batch_size=16, learning_rate=1e-2, patience=3, device="cpu")


def change(**values: object) -> TrainConfig:
    return CONFIG.model_copy(update=values)


@pytest.fixture(autouse=True)
def _own_generator() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    """Inputs (N, 4), and the labels (N,) that a linear rule gives them."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(ROWS, COLUMNS, generator=generator)
    rule = torch.randn(COLUMNS, CLASSES, generator=generator)
    return inputs, (inputs @ rule).argmax(dim=1)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(COLUMNS, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, CLASSES),
    )


def fit(
    rows: tuple[Tensor, Tensor],
    config: TrainConfig = CONFIG,
    build: Callable[[], nn.Module] = network,
    loss: engine.Loss = nn.functional.cross_entropy,
) -> Trained:
    """Build and train as a run does."""
    with reproducible(config):
        return train_model(build(), loss, [rows[0]], rows[1], config)


def sha256(trained: Trained) -> str:
    return hashlib.sha256(save(trained.state)).hexdigest()


def test_the_same_seed_gives_the_same_bytes(rows: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(1)
    first = fit(rows)
    torch.manual_seed(2)  # what ran before makes no difference
    second = fit(rows)
    assert sha256(first) == sha256(second)
    assert first.history == second.history


@pytest.mark.parametrize("other", [{"seed": 1}, {"learning_rate": 2e-2}, {"batch_size": 8}])
def test_another_seed_or_setting_gives_other_bytes(
    rows: tuple[Tensor, Tensor], other: dict[str, object]
) -> None:
    assert sha256(fit(rows, change(**other))) != sha256(fit(rows))


def test_the_loss_goes_down(rows: tuple[Tensor, Tensor]) -> None:
    trained = fit(rows, change(epochs=40, patience=40), lambda: nn.Linear(COLUMNS, CLASSES))
    first, last = trained.history[0], trained.history[-1]
    assert last.train_loss < 0.7 * first.train_loss
    assert trained.best.validation_loss < first.validation_loss


def test_the_inputs_are_left_as_they_were(rows: tuple[Tensor, Tensor]) -> None:
    before = [tensor.clone() for tensor in rows]
    fit(rows)
    assert all(torch.equal(a, b) for a, b in zip(before, rows, strict=True))


@pytest.mark.parametrize("batch_size", [1, 16, 19, 58, 59, 1000])
def test_every_row_weighs_the_same_in_the_reported_loss(
    rows: tuple[Tensor, Tensor], batch_size: int
) -> None:
    """Unchanged weights: the epoch's loss is that of all rows at once, partial batch or not."""
    config = change(batch_size=batch_size, learning_rate=1e-30, weight_decay=0, epochs=1)
    torch.manual_seed(0)
    model = nn.Linear(COLUMNS, CLASSES)
    train, held = split_rows(ROWS, config)
    assert len(train) == 59, "16 and 19 leave a partial batch"

    def reference(chosen: Tensor) -> float:
        each = [nn.functional.cross_entropy(model(rows[0][i]), rows[1][i]).item() for i in chosen]
        return sum(each) / len(each)

    expected = Epoch(1, reference(train), reference(held))
    trained = train_model(model, nn.functional.cross_entropy, [rows[0]], rows[1], config)
    assert trained.best.train_loss == pytest.approx(expected.train_loss, rel=1e-6)
    assert trained.best.validation_loss == pytest.approx(expected.validation_loss, rel=1e-6)


def test_the_loop_agrees_with_a_slow_reference(rows: tuple[Tensor, Tensor]) -> None:
    """AdamW under a one-cycle rate, batch by batch, written out."""
    config = change(epochs=2, patience=2)
    trained = fit(rows, config, lambda: nn.Linear(COLUMNS, CLASSES))
    train, _ = split_rows(ROWS, config)
    torch.manual_seed(config.seed)
    model = nn.Linear(COLUMNS, CLASSES)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=4 * 2 + 1
    )
    order = torch.Generator().manual_seed(config.seed)
    states, losses = [], []
    for _ in range(2):
        total = 0.0
        for batch in train[torch.randperm(len(train), generator=order)].split(16):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(rows[0][batch]), rows[1][batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / len(train))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert [epoch.train_loss for epoch in trained.history] == pytest.approx(losses, rel=1e-5)
    for name, value in states[trained.best.number - 1].items():
        torch.testing.assert_close(trained.state[name], value, rtol=1e-4, atol=1e-6)


class Scripted(nn.Module):
    """A model whose validation losses are given, and whose weight counts the training steps."""

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


def script(rows: tuple[Tensor, Tensor], losses: list[float], patience: int) -> Trained:
    config = change(batch_size=1000, epochs=len(losses), patience=patience)
    return fit(rows, config, lambda: Scripted(losses), lambda logits, labels: logits.mean())


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
    rows: tuple[Tensor, Tensor], losses: list[float], patience: int, epochs: int, best: int
) -> None:
    trained = script(rows, losses, patience)
    assert [epoch.number for epoch in trained.history] == list(range(1, epochs + 1))
    assert [epoch.validation_loss for epoch in trained.history] == losses[:epochs]
    assert trained.best == trained.history[best - 1]
    assert trained.state["epoch"] == best, "the state is that of the best epoch"


def test_the_kept_state_gives_the_kept_loss(rows: tuple[Tensor, Tensor]) -> None:
    config = change(epochs=30, patience=5, learning_rate=0.2)
    model = network()
    trained = train_model(model, nn.functional.cross_entropy, [rows[0]], rows[1], config)
    assert trained.best.number < len(trained.history), "the last epoch must not be the best"
    assert trained.best.validation_loss == min(e.validation_loss for e in trained.history)
    _, held = split_rows(ROWS, config)
    again = network()
    again.load_state_dict(trained.state)
    for chosen in (model, again):
        loss = evaluate_loss(chosen, nn.functional.cross_entropy, [rows[0][held], rows[1][held]])
        assert loss == trained.best.validation_loss


def test_the_state_can_be_stored_whatever_its_strides(rows: tuple[Tensor, Tensor]) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(CLASSES, COLUMNS).T)
            self.tied = self.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.weight

    trained = fit(rows, build=Transposed)
    assert save(trained.state)


def test_the_state_lies_on_the_cpu_and_needs_no_gradient(rows: tuple[Tensor, Tensor]) -> None:
    trained = fit(rows)
    assert {tensor.device.type for tensor in trained.state.values()} == {"cpu"}
    assert not any(tensor.requires_grad for tensor in trained.state.values())
    assert trained.device == "cpu"


@pytest.mark.parametrize("when", ["training", "validation"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(
    rows: tuple[Tensor, Tensor], when: str, value: float
) -> None:
    model = nn.Linear(COLUMNS, CLASSES)
    epochs: list[Epoch] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        bad = model.training == (when == "training") and len(epochs) == 1
        return nn.functional.cross_entropy(logits, labels) * (value if bad else 1.0)

    with pytest.raises(
        GateError, match=r"epoch 2 gave .*Lower learning_rate \(now 0\.01\)"
    ) as caught:
        train_model(model, loss, [rows[0]], rows[1], CONFIG, on_epoch=epochs.append)
    assert caught.value.stage == "train"
    assert len(epochs) == 1


def test_an_infinite_input_is_refused(rows: tuple[Tensor, Tensor]) -> None:
    broken = rows[0].clone()
    broken[3, 1] = float("inf")
    with pytest.raises(GateError, match="bad rows"):
        fit((broken, rows[1]))


def test_hooks_fire_in_every_step(rows: tuple[Tensor, Tensor]) -> None:
    calls = {"forward": 0, "training": 0, "backward": 0}

    def forward(module: nn.Module, inputs: object, output: object) -> None:
        calls["forward"] += 1
        calls["training"] += module.training

    def backward(module: nn.Module, inputs: object, outputs: object) -> None:
        calls["backward"] += 1

    model = network()
    model.register_forward_hook(forward)
    model[-1].register_full_backward_hook(backward)
    train_model(model, nn.functional.cross_entropy, [rows[0]], rows[1], CONFIG)
    steps = 3 * 4  # three epochs of 59 rows in batches of 16
    assert calls == {"forward": steps + 3, "training": steps, "backward": steps}


def test_progress_and_epochs_are_told(rows: tuple[Tensor, Tensor]) -> None:
    progress: list[tuple[int, int]] = []
    epochs: list[Epoch] = []
    trained = train_model(
        network(),
        nn.functional.cross_entropy,
        [rows[0]],
        rows[1],
        CONFIG,
        on_epoch=epochs.append,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(step, 12) for step in range(1, 13)]
    assert tuple(epochs) == trained.history


def test_several_inputs_keep_their_order(rows: tuple[Tensor, Tensor]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(CLASSES, CLASSES)
            self.linear = nn.Linear(COLUMNS, CLASSES)

        def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
            logits: Tensor = self.table(codes) + self.linear(numbers)
            return logits

    codes = rows[1]
    config = change(epochs=60, patience=60, learning_rate=0.1)
    with reproducible(config):
        trained = train_model(Two(), nn.functional.cross_entropy, [codes, rows[0]], rows[1], config)
    assert trained.best.validation_loss < 0.1, "the code is the label, row by row"


@pytest.mark.parametrize("count", [1, 10, 16384, 16385, 40000])
def test_evaluation_agrees_with_all_rows_at_once(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, COLUMNS, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    model = nn.Sequential(nn.Linear(COLUMNS, CLASSES), nn.Dropout(0.9))
    found = evaluate_loss(model, nn.functional.cross_entropy, [inputs, labels])
    with torch.no_grad():
        logits = model.eval()(inputs).double()
    assert found == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(2, 0.1, 1), (2, 0.99, 1), (10, 0.1, 1), (10, 0.25, 2), (100, 0.3, 30), (5, 0.99, 4)],
)
def test_rows_are_split_into_two_disjoint_parts(count: int, fraction: float, held: int) -> None:
    train, validation = split_rows(count, change(validation_fraction=fraction))
    assert len(validation) == held
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(count))
    assert train.tolist() == sorted(train.tolist())
    assert validation.tolist() == sorted(validation.tolist())


def test_the_seed_chooses_the_split() -> None:
    parts = [split_rows(100, change(seed=seed))[1].tolist() for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        split_rows(count, CONFIG)
