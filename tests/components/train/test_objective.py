"""The mean loss and its gradient, however a batch is cut into parts."""

from collections.abc import Callable

import pytest
import torch
from support.training_lab import CLASSES, COLUMNS, CPU, change, each_loss, make_rows, plain
from torch import Tensor, nn

from components.errors import ContractError
from components.train.config import TrainConfig
from components.train.objective import Objective, mean_loss
from components.train.parallel import ALONE, Group

WEIGHTS = torch.tensor([0.5, 1.0, 3.0])
Loss = Callable[[Tensor, Tensor], Tensor]
mean = nn.functional.cross_entropy


def rows(count: int = 17) -> list[Tensor]:
    inputs, labels = make_rows(count)
    return [inputs.double(), labels]


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return plain().double()


def objective(
    model: nn.Module, loss: Loss, config: TrainConfig, weights: Tensor | None = None
) -> Objective:
    return Objective(model, loss, config, CPU, weights, ALONE)


def gradient(
    loss: Loss, parts: int, weights: Tensor | None = None, count: int = 17
) -> tuple[float, Tensor]:
    model = fresh()
    weights = None if weights is None else weights.double()
    value = objective(model, loss, change(accumulate=parts), weights).backward(rows(count), count)
    return value.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def reference(weights: Tensor | None = None, count: int = 17) -> tuple[float, Tensor]:
    """PyTorch's own mean, of the whole batch at once."""
    model = fresh()
    inputs, labels = rows(count)
    weight = None if weights is None else weights.double()
    value = nn.functional.cross_entropy(model(inputs), labels, weight=weight)
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 16, 17, 40])
@pytest.mark.parametrize("loss", [mean, each_loss])
def test_parts_however_unequal_give_the_gradient_of_the_whole(loss: Loss, parts: int) -> None:
    value, found = gradient(loss, parts)
    expected_value, expected = reference()
    assert value == pytest.approx(expected_value, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("parts", [1, 3, 17])
def test_class_weights_give_the_weighted_mean_of_pytorch(parts: int) -> None:
    value, found = gradient(each_loss, parts, WEIGHTS)
    expected_value, expected = reference(WEIGHTS)
    assert value == pytest.approx(expected_value, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    assert not torch.allclose(found, reference()[1], rtol=1e-3), "the weights matter"


@pytest.mark.parametrize("loss", [mean, each_loss])
def test_a_share_of_a_step_counts_by_its_rows(loss: Loss) -> None:
    """What two processes add up to is the mean over both."""
    inputs, labels = rows()
    model, total = fresh(), 0.0
    for first, last in ((0, 5), (5, 17)):
        piece = [inputs[first:last], labels[first:last]]
        total += float(objective(model, loss, change()).backward(piece, 17))
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected_value, expected = reference()
    assert total == pytest.approx(expected_value, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_process_without_rows_contributes_nothing(weights: Tensor | None) -> None:
    model = fresh()
    inputs, labels = rows()
    empty = [inputs[:0], labels[:0]]
    assert float(objective(model, each_loss, change(), weights).backward(empty, 17)) == 0.0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda logits, labels: logits, r"\(16, 3\)"),
        (lambda logits, labels: logits.sum(dim=0), r"\(3,\)"),
        (lambda logits, labels: each_loss(logits, labels)[:, None], r"\(16, 1\)"),
        (lambda logits, labels: mean(logits, labels)[None], r"\(1,\)"),
    ],
)
def test_a_loss_of_another_shape_is_refused(loss: Loss, shape: str) -> None:
    words = (
        rf"one loss for each row, or their mean: a tensor of shape \(16,\) or \(\); got {shape}"
        r"\. Use reduction='none'"
    )
    whole = rows(16)
    with pytest.raises(ContractError, match=words):
        objective(fresh(), loss, change()).backward(whole, 16)
    with pytest.raises(ContractError, match=words):
        objective(fresh(), loss, change()).evaluate(fresh(), whole)


def test_class_weights_need_a_loss_for_each_row() -> None:
    with pytest.raises(
        ContractError,
        match=r"shape \(17,\); got \(\)\. Use reduction='none' .*set class_weights=none",
    ):
        gradient(mean, 1, WEIGHTS)


@pytest.mark.parametrize("count", [1, 10, 63, 64, 65, 200])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_evaluation_is_that_of_all_rows_at_once(count: int, weights: Tensor | None) -> None:
    inputs, labels = make_rows(count)
    model = nn.Sequential(nn.Linear(COLUMNS, CLASSES), nn.Dropout(0.9))
    found = objective(model, each_loss, change(), weights).evaluate(model, [inputs, labels])
    with torch.no_grad():
        logits = model.eval()(inputs).double()
    weight = None if weights is None else weights.double()
    assert found == pytest.approx(float(mean(logits, labels, weight=weight)), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"batch_size": 16}, 64),
        ({"batch_size": 16, "accumulate": 3}, 24),
        ({"batch_size": 8192}, 16_384),
    ],
)
def test_evaluation_takes_no_more_rows_than_memory_has_been_seen_to_hold(
    settings: dict[str, int], most: int
) -> None:
    sizes: list[int] = []
    model = plain()
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    objective(model, mean, change(**settings)).evaluate(model, list(make_rows(40_000)))
    assert sum(sizes) == 40_000
    assert max(sizes) == most


class Remembering(nn.Module):
    """Keeps a table that grows with the largest batch seen, as models of text do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(COLUMNS, CLASSES)
        self.table = torch.ones(0, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        if len(self.table) < len(inputs):
            self.table = torch.ones(len(inputs), 1)
        logits: Tensor = self.linear(inputs) * self.table[: len(inputs)]
        return logits


def test_what_a_model_keeps_in_evaluation_can_be_trained_with() -> None:
    model = Remembering()
    inputs, labels = make_rows(64)
    here = objective(model, mean, change())
    here.evaluate(model, [inputs, labels])
    here.backward([inputs[:16], labels[:16]], 16)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_that_of_the_forward_pass_alone(precision: str) -> None:
    seen: list[torch.dtype] = []
    model = plain()
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    here = objective(model, mean, change(precision=precision))
    here.backward(list(make_rows(16)), 16)
    here.evaluate(model, list(make_rows(16)))
    assert seen == [getattr(torch, precision), torch.float32]
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert (here.scaler is not None) == (precision == "float16")


def test_the_mean_of_either_shape() -> None:
    assert float(mean_loss(torch.tensor([1.0, 3.0]))) == 2.0
    assert float(mean_loss(torch.tensor(2.0))) == 2.0


def test_a_group_of_one_needs_no_processes() -> None:
    assert Group().world == 1
    assert Group().gather(WEIGHTS) == [WEIGHTS]
    assert Group().sum(WEIGHTS) is WEIGHTS
