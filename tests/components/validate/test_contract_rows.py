"""Each row's answer is finite, the same twice, and independent of the rows beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.contract_models import (
    ROWS,
    Attention,
    Classifier,
    Flights,
    assert_fires,
    batches_of,
    flight_rows,
    only,
)
from torch import Tensor, nn
from torch.nn import functional

from components.validate.contract import verify_contract

# finiteness


class Overflow(nn.Module):
    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        return x / 0 if self.when == "always" or self.training else x


@pytest.mark.parametrize(("when", "word"), [("always", "in eval mode"), ("train", "in train mode")])
def test_not_finite(when: str, word: str) -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), Overflow(when), nn.BatchNorm1d(8))
    report = verify_contract(model, ROWS)
    assert_fires(report, "finite", "fc1.1", word)


def test_predict_not_finite() -> None:
    class LogOfZero(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return ((self(*inputs) * 0).log(),)

    report = verify_contract(LogOfZero(), ROWS)
    assert_fires(report, "finite", "", "predict in eval mode")
    assert only(report) == {"finite"}


def test_missing_value_is_passed_on() -> None:
    rows = batches_of(4)
    rows[2][0][1, 1] = torch.nan
    assert_fires(verify_contract(Classifier(), rows), "finite", "fc1", "real rows")


# determinism


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-6 * torch.rand_like(x)


def test_randomness_at_predict() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), Noisy())
    report = verify_contract(model, ROWS)
    assert_fires(report, "determinism", "fc1.1", "same bits twice")
    assert_fires(report, "state_kept", "", "torch random state")


def test_functional_dropout_forgets_the_mode() -> None:
    class Dropping(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            return self.fc2(functional.dropout(self.fc1(inputs[0]), 0.5))

    assert_fires(verify_contract(Dropping(), ROWS), "determinism", "")


def test_state_between_calls() -> None:
    class Counting(Classifier):
        calls = 0

        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            self.calls += 1
            return (self(*inputs) + self.calls,)

    assert_fires(verify_contract(Counting(), ROWS), "determinism", "")


# independence of the rows of a batch


class StuckNorm(nn.BatchNorm1d):
    """Normalises by the batch even in eval mode, and alone by nothing."""

    def forward(self, input: Tensor) -> Any:
        return input if len(input) == 1 else (input - input.mean(0)) / (input.std(0) + 1e-5)


def test_batch_statistics_at_predict() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), StuckNorm(8))
    report = verify_contract(model, ROWS)
    assert_fires(report, "independence", "fc1.1", "stands alone", "other rows stand beside it")
    assert only(report) == {"independence"}


def test_batch_norm_left_in_train_mode() -> None:
    class Forgetful(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, *inputs: Tensor) -> Any:
            return self.fc2(self.norm(self.fc1(inputs[0])))

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.norm.training = True
            return self

    report = verify_contract(Forgetful(), ROWS)
    assert_fires(report, "independence", "norm", "more than 1 value per channel")
    assert_fires(report, "weights_kept", "norm", "running_mean, running_var")
    assert_fires(report, "state_kept", "norm", "eval() must reach every module")
    assert report.culprit == "norm"


@pytest.mark.parametrize(
    "leak",
    [
        lambda y: y.softmax(0),
        lambda y: y - y.mean(),
        lambda y: y + 0.01 * y.sum(0),
        lambda y: y + 0.01 * torch.arange(len(y))[:, None],
        lambda y: y + 0.01 * y.roll(1, 0),
        lambda y: y.cumsum(0),
    ],
)
def test_rows_leak_into_each_other(leak: Callable[[Tensor], Tensor]) -> None:
    class Leaking(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return (leak(self(*inputs)),)

    report = verify_contract(Leaking(), ROWS)
    assert_fires(report, "independence", "", "must not depend on its batch")
    assert only(report) == {"independence"}


def test_attention_over_the_batch_axis() -> None:
    model = Attention()
    model.attend = nn.MultiheadAttention(8, 2, batch_first=False)
    assert_fires(verify_contract(model, batches_of(5, 8)), "independence", "attend")


def test_integer_output_may_not_change() -> None:
    class Ranking(Flights):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            probabilities, _ = super().predict(*inputs)
            return probabilities, probabilities[:, 0].argsort().argsort()

    report = verify_contract(Ranking(), flight_rows())
    assert_fires(report, "independence", "", "output 1")
