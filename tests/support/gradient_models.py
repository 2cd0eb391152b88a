"""A small net with room for a faulty module, and what tests ask of its gradient report."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Cause, GradientReport, Verdict

WIDTH = 6


class Healthy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.bias = nn.Parameter(torch.randn(WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(functional.linear(x, self.weight, self.bias))


class Net(nn.Module):
    """stem -> block.0 (healthy) -> block.1 (the module under test) -> head."""

    def __init__(self, suspect: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(Healthy(), suspect)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, WIDTH, generator=generator) for _ in range(3)]


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch[:, :2]).pow(2).mean()


def verified(model: nn.Module, **options: Any) -> GradientReport:
    return verify_gradients(model, squared, batches(), **options)


def failing(report: GradientReport) -> dict[str, Cause]:
    return {t.name: t.cause for t in report.tensors if t.verdict is Verdict.FAIL}


def checks_failed(report: GradientReport) -> list[str]:
    return [check.name for check in report.checks if not check.passed]
