"""A loss that is blind to a tensor, told from a tensor that nothing depends on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from components.validate.gradients import verify_gradients
from components.validate.gradients.outputs import shows_in_outputs
from components.validate.gradients.twin import build_twin


class Shifted(nn.Module):
    """Scores, all shifted alike."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 1)
        self.shift = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) + self.moved()

    def moved(self) -> Tensor:
        return self.shift


class Rounded(Shifted):
    def moved(self) -> Tensor:
        return self.shift.round()


class Dead(Shifted):
    def moved(self) -> Tensor:
        return (self.shift - 100).relu()


class Detached(Shifted):
    def moved(self) -> Tensor:
        return self.shift.detach() + 0 * self.shift


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        return 2 * g


class Wrong(Shifted):
    def moved(self) -> Tensor:
        return Doubled.apply(self.shift)


class Fallback(Shifted):
    """Tries a module that fails before it shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = nn.Linear(7, 7)

    def moved(self) -> Tensor:
        try:
            self.broken(torch.ones(1))
        except RuntimeError:
            return self.shift
        return 0 * self.shift


def differences(model: nn.Module, x: Tensor) -> Tensor:
    scores = model(x)
    return (scores[1:] - scores[:-1]).pow(2).mean()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(
    ("kind", "shows"),
    [
        (Shifted, True),
        (Fallback, True),
        (Rounded, False),
        (Dead, False),
        (Detached, False),
        (Wrong, False),
    ],
)
def test_a_shift_that_cancels_in_the_loss(kind: type[Shifted], shows: bool) -> None:
    torch.manual_seed(0)
    twin, _ = build_twin(kind(), differences, batches(), seed=0)
    slot = next(slot for slot in twin.slots if slot.name == "shift")
    before = slot.values().clone()
    assert shows_in_outputs(twin, slot, 0, seed=0) is shows
    assert torch.equal(slot.values(), before)
    assert not any(module._forward_hooks for module in twin.model.modules())


def test_a_loss_blind_to_a_shift_passes() -> None:
    torch.manual_seed(0)
    assert verify_gradients(Shifted(), differences, batches()).passed
    for kind in (Rounded, Dead, Detached):
        report = verify_gradients(kind(), differences, batches())
        assert [t.name for t in report.tensors if t.verdict == "FAIL"] == ["shift"]
