"""Parameters left out, losses that cannot be verified, and training steps that go wrong."""

from typing import Any

import pytest
import torch
from support.gradient_models import (
    WIDTH,
    Healthy,
    Net,
    batches,
    checks_failed,
    failing,
    squared,
    verified,
)
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradient_report import Cause, Verdict
from components.validate.gradients import verify_gradients


def test_unused_parameter() -> None:
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__(Healthy())
            self.spare = nn.Linear(3, 3)

    torch.manual_seed(0)
    report = verified(Idle())
    assert failing(report) == {"spare.weight": Cause.UNUSED, "spare.bias": Cause.UNUSED}
    assert report.culprit == "spare"


def test_a_parameter_used_in_one_mode_only_is_not_unused() -> None:
    class Auxiliary(Net):
        def __init__(self) -> None:
            super().__init__(Healthy())
            self.extra = nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out + self.extra(x) if self.training else out

    torch.manual_seed(0)
    assert verified(Auxiliary()).passed


@pytest.mark.parametrize("kind", ["list", "dict", "modules"])
def test_parameter_outside_the_registry(kind: str) -> None:
    class Hidden(Healthy):
        def __init__(self) -> None:
            super().__init__()
            scale = torch.ones(WIDTH, requires_grad=True)
            linear = nn.Linear(WIDTH, WIDTH)
            self.held: Any = {"list": [scale], "dict": {"s": scale}, "modules": [linear]}[kind]

        def forward(self, x: Tensor) -> Tensor:
            held = self.held["s"] if isinstance(self.held, dict) else self.held[0]
            return super().forward(held(x) if isinstance(held, nn.Module) else x * held)

    torch.manual_seed(0)
    report = verified(Net(Hidden()))
    assert not report.passed
    assert checks_failed(report) == ["parameters_registered"]
    where = {"list": "held[0]", "dict": "held['s']", "modules": "held[0].weight"}[kind]
    assert f"block.1.{where}" in report.checks[0].detail
    assert report.culprit == "block.1"


@pytest.mark.parametrize("counted", [False, True])
def test_non_deterministic_loss_is_unverifiable(counted: bool) -> None:
    source = torch.Generator().manual_seed(0)
    calls = iter(range(1_000_000))

    def shaky(model: nn.Module, batch: Tensor) -> Tensor:
        drift = torch.tensor(next(calls) * 1e-3) if counted else torch.rand((), generator=source)
        return squared(model, batch) * (1 + drift)

    torch.manual_seed(0)
    report = verify_gradients(Net(Healthy()), shaky, batches())
    assert not report.passed
    assert {t.verdict for t in report.tensors} == {Verdict.UNVERIFIABLE}
    assert report.culprit is None and "noisier" in report.reason


def test_a_loss_that_is_flat_at_zero_is_unverifiable() -> None:
    def satisfied(model: nn.Module, batch: Tensor) -> Tensor:
        return functional.relu(squared(model, batch) - 1e3)

    torch.manual_seed(0)
    report = verify_gradients(Net(Healthy()), satisfied, batches())
    assert not report.passed
    assert {t.verdict for t in report.tensors} == {Verdict.UNVERIFIABLE}


def test_noise_below_the_tolerance_does_not_matter() -> None:
    source = torch.Generator().manual_seed(0)

    def hum(model: nn.Module, batch: Tensor) -> Tensor:
        return squared(model, batch) + 1e-15 * torch.rand((), generator=source)

    torch.manual_seed(0)
    assert verify_gradients(Net(Healthy()), hum, batches()).passed


def test_a_loss_that_clears_gradients_breaks_accumulation() -> None:
    def clearing(model: nn.Module, batch: Tensor) -> Tensor:
        model.zero_grad()
        return squared(model, batch)

    torch.manual_seed(0)
    report = verify_gradients(Net(Healthy()), clearing, batches())
    assert checks_failed(report) == ["accumulation_adds"]


def test_gradients_that_zero_grad_does_not_clear() -> None:
    class Sticky(Net):
        def zero_grad(self, set_to_none: bool = True) -> None:
            del set_to_none

    torch.manual_seed(0)
    report = verified(Sticky(Healthy()))
    assert checks_failed(report) == ["zero_grad_repeats"]
    assert not report.passed


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_writes_to_a_parameter(training: bool) -> None:
    class Writer(Healthy):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.bias.data.mul_(0.9)
            return super().forward(x)

    torch.manual_seed(0)
    report = verified(Net(Writer()).train(training))
    assert "forward_keeps_parameters" in checks_failed(report)
    assert "block.1.bias" in report.checks[3].detail
    assert not report.passed
