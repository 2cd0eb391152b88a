"""What a call may not touch, and what the state of a model must bring back."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.contract_models import (
    ROWS,
    Classifier,
    assert_fires,
    check_named,
    only,
    plain,
)
from torch import Tensor, nn
from torch.nn import functional

from components.validate.contract import verify_contract

# what a call may not touch


def test_input_written_by_a_module() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 8))
    report = verify_contract(model, ROWS)
    assert_fires(report, "inputs_kept", "fc1.0", "forward must not write", "predict must not write")
    assert only(report) == {"inputs_kept"}


def test_input_written_by_predict() -> None:
    class Imputing(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            inputs[0][inputs[0] < 0] = 0
            return super().predict(*inputs)

    report = verify_contract(Imputing(), ROWS)
    assert_fires(report, "inputs_kept", "", "predict must not write")
    assert "forward must not" not in check_named(report, "inputs_kept").detail


class Tally(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x


def test_buffer_written_at_predict() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), Tally())
    report = verify_contract(model, ROWS)
    assert_fires(report, "weights_kept", "fc1.1", "it changed seen of 'fc1.1'")
    assert only(report) == {"weights_kept"}


def drops_gradients(model: Classifier) -> None:
    model.zero_grad()


def adds_gradients(model: Classifier) -> None:
    torch.autograd.backward(next(model.fc2.parameters()).sum())


MEDDLERS: list[tuple[Callable[[Classifier], object], str, str]] = [
    (lambda m: m.train(), "training", ""),
    (lambda m: m.fc1.train(not m.fc1.training), "training", "fc1"),
    (lambda m: m.fc1.requires_grad_(False), "weight.requires_grad", "fc1"),
    (drops_gradients, "weight.grad, bias.grad", "fc1"),
    (adds_gradients, "weight.grad", "fc2"),
    (lambda m: m.fc2.register_forward_hook(lambda *_: None), "forward_hooks", "fc2"),
    (lambda _: torch.manual_seed(3), "torch random state", ""),
    (lambda _: np.random.default_rng(np.random.randint(9)), "numpy random state", ""),
    (lambda _: random.random(), "python random state", ""),
    (lambda _: torch.set_grad_enabled(False), "gradient mode", ""),
]


@pytest.mark.parametrize(("meddle", "word", "culprit"), MEDDLERS, ids=[m[1] for m in MEDDLERS])
def test_predict_leaves_state_alone(meddle: Any, word: str, culprit: str) -> None:
    class Meddling(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                answer = super().predict(*inputs)
            if meddle is adds_gradients:
                torch.set_grad_enabled(True)
            meddle(self)
            return tuple(a.detach() for a in answer)

    model = Meddling()
    before = torch.is_grad_enabled(), torch.get_rng_state(), random.getstate()
    report = verify_contract(model, ROWS)
    assert_fires(report, "state_kept", culprit, word)
    assert only(report) == {"state_kept"}
    assert before[0] == torch.is_grad_enabled()
    assert torch.equal(before[1], torch.get_rng_state())
    assert before[2] == random.getstate()


def test_predict_calls_eval_and_stays_there() -> None:
    class Switching(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            self.eval()
            return super().predict(*inputs)

    assert_fires(verify_contract(Switching(), ROWS), "state_kept", "", "training")


# round trip of the state


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("list of parameters", "store[0]"),
        ("tensor", "store"),
        ("dict of tensors", "store['w']"),
        ("list of modules", "store[0].weight"),
    ],
)
def test_weights_outside_the_state(kind: str, path: str) -> None:
    report = verify_contract(plain(kind), ROWS)
    assert_fires(report, "round_trip", "", f"caused by {path}", "nn.ModuleList")
    assert only(report) == {"round_trip"}


class RunningMean(nn.Module):
    """Learns a statistic in train mode and keeps it in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


def test_statistic_outside_the_state() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), RunningMean())
    report = verify_contract(model, ROWS)
    assert_fires(report, "round_trip", "fc1.1", "caused by fc1.1.mean")


class Cached(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 8)
        self.folded: Tensor | None = None

    def forward(self, input: Tensor) -> Any:
        if self.folded is None:
            self.folded = self.weight.detach() * 2
        return functional.linear(input, self.folded)


def test_cache_outlives_the_weights() -> None:
    model = Classifier()
    model.fc1 = Cached()
    report = verify_contract(model, ROWS)
    assert_fires(report, "round_trip", "fc1")


class Stateful(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        del state


def test_state_that_is_not_a_tensor() -> None:
    model = Classifier()
    model.fc1 = Stateful(4, 8)
    assert_fires(verify_contract(model, ROWS), "round_trip", "fc1", "fc1._extra_state")


def test_state_that_does_not_load() -> None:
    class Renaming(Classifier):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {f"net.{k}": v for k, v in super().state_dict(*args, **kwargs).items()}

    report = verify_contract(Renaming(), ROWS)
    assert_fires(report, "round_trip", "", "load_state_dict", "must not raise")


# a fresh instance


class Scaled(Classifier):
    scale = 1.0

    def forward(self, *inputs: Tensor) -> Any:
        return super().forward(*inputs) * self.scale


def test_state_brings_back_the_answers_in_a_fresh_instance() -> None:
    assert verify_contract(Scaled(), ROWS, fresh=Scaled).passed
    model = Scaled()
    model.scale = 2.0  # a copy has it too, a fresh instance has not
    assert verify_contract(model, ROWS).passed
    report = verify_contract(model, ROWS, fresh=Scaled)
    assert_fires(report, "round_trip", "", "a fresh instance that loads the state must give")
    assert only(report) == {"round_trip"}


def test_fresh_instance_of_another_shape_or_none() -> None:
    class Wider(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.fc2 = nn.Linear(8, 5)

    report = verify_contract(Classifier(), ROWS, fresh=Wider)
    assert_fires(report, "round_trip", "", "load_state_dict of the model's state in a fresh")

    def failing() -> Classifier:
        raise OSError("no configuration")

    report = verify_contract(Classifier(), ROWS, fresh=failing)
    assert_fires(report, "round_trip", "", "building a fresh instance must not raise", "OSError")


def test_building_anew_leaves_the_random_state_alone() -> None:
    model, before = Classifier(), torch.get_rng_state()
    verify_contract(model, ROWS, fresh=Classifier)
    assert torch.equal(before, torch.get_rng_state())
