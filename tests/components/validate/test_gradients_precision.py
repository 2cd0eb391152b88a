"""Labels and constants in float32 do not hide gradients behind its rounding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Verdict

WEIGHTS = torch.tensor([1.0, 3.0])
Batch = tuple[Tensor, Tensor]


def binary(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return functional.binary_cross_entropy_with_logits(model(x)[:, 0], y.float())


def cast(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x)[:, 0] - y.to(torch.float32)).square().mean()


def typed(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x)[:, 0] - y.to(dtype=torch.float32)).square().mean()


def weighted(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model(x), y, weight=WEIGHTS)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("loss", [binary, cast, typed, weighted])
def test_labels_and_constants_take_part_in_float64(loss: Callable[..., Tensor]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        batches = [(torch.randn(4, 6), torch.randint(2, (4,))) for _ in range(3)]
        report = verify_gradients(net(), loss, batches)
        assert report.passed, report.reason
        assert {t.verdict for t in report.tensors} == {Verdict.PASS}
    assert torch.equal(WEIGHTS, torch.tensor([1.0, 3.0]))


def test_what_comes_from_the_model_stays_in_the_precision_that_it_is_cast_to() -> None:
    def rounded(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).float().square().mean()

    torch.manual_seed(0)
    batches = [(torch.randn(4, 6), torch.randint(2, (4,))) for _ in range(3)]
    report = verify_gradients(net(), rounded, batches)
    assert report.passed, report.reason
    assert Verdict.DEGRADED in {t.verdict for t in report.tensors}


def test_a_weighted_mean_in_float32_is_neither_mean_nor_sum() -> None:
    def native(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return functional.cross_entropy(model(x).float(), y, weight=WEIGHTS)

    for seed in range(8):
        torch.manual_seed(seed)
        batches = [(torch.randn(4, 6), torch.randint(2, (4,))) for _ in range(3)]
        report = verify_gradients(net(), native, batches)
        (check,) = (c for c in report.checks if c.name == "accumulation_unequal")
        assert check.passed, check.detail
