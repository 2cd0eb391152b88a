"""L = (w x + b - y)^2 at x=2, y=5, w=0.5, b=0.1: by hand, by autograd and by the check."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Cause, Verdict

X, Y, W, B = 2.0, 5.0, 0.5, 0.1


class Line(nn.Module):
    """Two scalar parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(W)), nn.Parameter(torch.tensor(B))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x + self.b


class Product(torch.autograd.Function):
    """w x whose author differentiated -w x."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return w * x

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        w, x = ctx.saved_tensors
        return -(slopes[0] * x).sum().reshape(w.shape), slopes[0] * w


class WrongLine(Line):
    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(self.w, x) + self.b


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


BATCH = (torch.tensor([[X]]), torch.tensor([[Y]]))


def by_hand() -> tuple[float, float]:
    slope = 2 * (W * X + B - Y)  # 2 (1.0 + 0.1 - 5) = -7.8
    return slope * X, slope


def by_autograd(model: Line) -> tuple[float, float]:
    found = torch.autograd.grad(squared_error(model, BATCH), [model.w, model.b])
    return float(found[0]), float(found[1])


def by_differences(h: float = 1e-6) -> tuple[float, float]:
    def loss(w: float, b: float) -> float:
        return (w * X + b - Y) ** 2

    dw = (loss(W + h, B) - loss(W - h, B)) / (2 * h)
    return dw, (loss(W, B + h) - loss(W, B - h)) / (2 * h)


def test_hand_autograd_and_differences_agree() -> None:
    assert by_hand() == pytest.approx((-15.6, -7.8), rel=1e-12)
    assert by_autograd(Line()) == pytest.approx((-15.6, -7.8), rel=1e-6)
    assert by_differences() == pytest.approx((-15.6, -7.8), rel=1e-9)


def test_the_check_agrees() -> None:
    report = verify_gradients(Line(), squared_error, [BATCH] * 3)
    assert report.passed, report.reason
    assert [(t.name, t.verdict) for t in report.tensors] == [
        ("w", Verdict.PASS),
        ("b", Verdict.PASS),
    ]
    for tensor in report.tensors:
        assert tensor.relative_error is not None
        assert tensor.tolerance is not None
        assert tensor.relative_error <= tensor.tolerance < 1e-5


def test_a_wrong_sign_is_found() -> None:
    assert by_autograd(WrongLine()) == pytest.approx((15.6, -7.8), rel=1e-6)
    report = verify_gradients(WrongLine(), squared_error, [BATCH] * 3)
    assert not report.passed
    wrong, right = report.tensors
    assert (wrong.name, wrong.verdict, wrong.cause) == ("w", Verdict.FAIL, Cause.MISMATCH)
    # The gradient is off by twice its size.
    assert wrong.relative_error == pytest.approx(2.0, rel=1e-3)
    assert (right.name, right.verdict) == ("b", Verdict.PASS)
    assert report.culprit == ""
