"""Many tensors along one direction: what it costs, and that bisection leads to the fault."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Cause, GradientReport, Verdict

WIDTH, BLOCKS, CLASSES = 4, 130, 3


class HalfBias(torch.autograd.Function):
    """Adds a bias, with a gradient of the bias that is `share` of the right one."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, bias: Tensor, share: float
    ) -> Tensor:
        ctx.share = share  # type: ignore[attr-defined]
        return x + bias

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, g: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        return g, ctx.share * g.sum(0), None  # type: ignore[attr-defined]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.outer(torch.tanh(self.inner(x)))


class Faulty(Block):
    def __init__(self, share: float, mode: bool | None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.share, self.mode = share, mode

    def forward(self, x: Tensor) -> Tensor:
        wrong = self.mode is None or self.mode == self.training
        return super().forward(HalfBias.apply(x, self.bias, self.share if wrong else 1.0))


def deep(fault: nn.Module | None = None, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(BLOCKS)]
    if fault is not None:
        blocks[77] = fault  # type: ignore[call-overload]
    return nn.Sequential(nn.Dropout(dropout), nn.Sequential(*blocks), nn.Linear(WIDTH, CLASSES))


def verified(model: nn.Module) -> GradientReport:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(4, WIDTH, generator=generator),
            torch.randint(CLASSES, (4,), generator=generator),
        )
        for _ in range(3)
    ]
    return verify_gradients(
        model, lambda m, batch: functional.cross_entropy(m(batch[0]), batch[1]), batches
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_clean_model_of_many_tensors_takes_a_handful_of_forwards(dropout: float) -> None:
    report = verified(deep(dropout=dropout))
    assert report.passed, report.reason
    assert len(report.tensors) == 4 * BLOCKS + 2 > 500
    assert report.forwards <= 20
    assert {t.verdict for t in report.tensors} == {Verdict.PASS}


@pytest.mark.parametrize(("share", "mode"), [(0.5, None), (1.01, None), (0.5, False)])
def test_bisection_leads_to_the_one_wrong_tensor(share: float, mode: bool | None) -> None:
    report = verified(deep(Faulty(share, mode), dropout=0.1))
    failing = {t.name: t.cause for t in report.tensors if t.verdict is Verdict.FAIL}
    assert failing == {"1.77.bias": Cause.MISMATCH}
    assert report.culprit == "1.77"
    # Most of these are replays of single blocks, in the search for the module.
    assert report.forwards < 3 * len(report.tensors)
