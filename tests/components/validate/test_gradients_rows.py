"""Rows that interact, batches of another size, and losses over micro-batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gradient_models import WIDTH, Healthy, Net, batches, checks_failed, squared, verified
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from components.validate.gradients import verify_gradients
from components.validate.gradients.parts import outer_calls
from components.validate.gradients.report import GradientReport
from components.validate.gradients.twin import build_twin
from components.validate.waivers import Waiver, WaiverKind

Loss = Callable[[nn.Module, Any], Tensor]
ROW_CHECKS = ("rows_independent", "batch_sizes", "accumulation_unequal")


def detail(report: GradientReport, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


def waived(tensor: str) -> list[Waiver]:
    return [Waiver(tensor=tensor, kind=WaiverKind.ROWS, reason="meant")]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Centred(Healthy):
    """Subtracts the batch's mean."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.01 * x.mean(dim=0))


class AcrossRows(nn.Module):
    """Attention between rows, from batch_first left out."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(1)
        return self.mix(tokens, tokens, tokens, need_weights=False)[0].squeeze(1)


class PeeksInEval(Healthy):
    """Normalises by the batch in eval mode only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.training else x / x.std(dim=0, unbiased=False))


class Special(Healthy):
    """Treats a batch of one row in another way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (0.9 if len(x) == 1 else 1.0)


@pytest.mark.parametrize("kind", [Centred, AcrossRows, PeeksInEval, Special])
@pytest.mark.parametrize("training", [True, False])
def test_rows_that_interact_are_found_in_the_module_where_they_meet(
    kind: type[nn.Module], training: bool
) -> None:
    model = Net(kind()).train(training)
    report = verified(model)
    assert checks_failed(report) == ["rows_independent"]
    inner = ".mix" if kind is AcrossRows else ""
    assert report.culprit == f"block.1{inner}"
    assert "rows" in report.reason

    excused = verified(model, waivers=waived("block.*"))
    assert excused.passed, excused.reason
    elsewhere = verified(model, waivers=waived("stem"))
    assert checks_failed(elsewhere) == ["rows_independent", "waivers_current"]


def test_a_waiver_of_rows_that_keep_apart_is_stale() -> None:
    assert checks_failed(verified(Net(Healthy()), waivers=waived("*"))) == ["waivers_current"]


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze()


class FixedSize(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(4, -1))


class Spread(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise ValueError("a spread needs two rows")
        return super().forward(x)


def test_an_output_that_loses_its_rows_is_found_though_the_loss_broadcasts() -> None:
    def broadcast(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x[:, 0]).pow(2).mean()

    model = nn.Sequential(Healthy(), nn.Linear(WIDTH, 1), Squeezed())
    report = verify_gradients(model, broadcast, batches())
    assert checks_failed(report) == ["batch_sizes"]
    assert report.culprit == "2"


def test_a_shape_spoiled_upstream_is_blamed_there() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Squeezed(), nn.BatchNorm1d(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    report = verified(Net(Norm()))
    assert "batch_sizes" in checks_failed(report)
    assert report.culprit == "block.1.inner.0", report.reason


@pytest.mark.parametrize("kind", [FixedSize, Spread])
def test_a_module_that_refuses_other_batch_sizes_is_named(kind: type[nn.Module]) -> None:
    report = verified(Net(kind()))
    assert checks_failed(report) == ["batch_sizes"]
    assert report.culprit == "block.1"
    assert kind.__name__ in report.reason
    assert verified(Net(kind()), waivers=waived("block.1")).passed


class DividedByRows(torch.autograd.Function):
    """Its backward divides by the number of rows that it sees."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        return g * 4 / len(g)


def test_a_backward_that_divides_by_the_size_of_its_batch() -> None:
    class Divided(Healthy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(DividedByRows.apply(x))

    # With four rows the factor is one, so that no finite difference sees it.
    report = verified(Net(Divided()))
    assert checks_failed(report) == ["accumulation_unequal"]
    assert "stem.weight" in report.reason and "block.1.weight" not in report.reason
    assert "mean over rows" in report.reason

    def total(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x[:, :2]).pow(2).sum()

    summed = verify_gradients(Net(Divided()), total, batches())
    assert checks_failed(summed) == ["accumulation_unequal"]
    assert "sum over rows" in summed.reason


def test_a_mean_that_is_divided_by_the_rows_again() -> None:
    report = verify_gradients(
        Net(Healthy()), lambda model, x: squared(model, x) / len(x), batches()
    )
    assert checks_failed(report) == ["accumulation_unequal"]
    assert "once more" in report.reason


def contrastive(model: nn.Module, x: Tensor) -> Tensor:
    scores = model(x) @ model(x + 0.1).T
    return functional.cross_entropy(scores, torch.arange(len(x)))


def spread_loss(model: nn.Module, x: Tensor) -> Tensor:
    if len(x) == 1:
        raise ValueError("the loss compares rows")
    return model(x).std(dim=0).sum()


def masked_mean(model: nn.Module, x: Tensor) -> Tensor:
    keep = (x > 0).to(x.dtype).sum(dim=1, keepdim=True)
    return (model(x).pow(2) * keep).sum() / keep.sum()


def noisy(model: nn.Module, x: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    return (model(x + noise) - noise[:, :2]).pow(2).mean()


def paired(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - model(x.flip(0)).detach()).pow(2).mean()


def regularised(model: nn.Module, x: Tensor) -> Tensor:
    return squared(model, x) + 0.1 * sum(p.pow(2).sum() for p in model.parameters())


@pytest.mark.parametrize("loss", [contrastive, spread_loss, masked_mean, noisy])
def test_losses_that_couple_rows_are_no_fault_of_the_model(loss: Loss) -> None:
    report = verify_gradients(Net(Healthy()), loss, batches())
    assert report.passed, report.reason
    assert "must not be accumulated" in detail(report, "accumulation_unequal")


def test_a_regularised_mean_may_be_accumulated() -> None:
    report = verify_gradients(Net(Healthy()), regularised, batches())
    assert report.passed, report.reason
    assert "mean over rows" in detail(report, "accumulation_unequal")


def test_batches_of_one_row_or_of_unequal_axes_are_not_cut() -> None:
    graph = [(x, torch.tensor([[0, 1, 2], [1, 2, 3]])) for x in batches()]

    def over_edges(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, (start, end) = batch
        return (model(x)[start] * model(x)[end]).sum(dim=1).mean()

    for loss, data in ((over_edges, graph), (squared, [x[:1] for x in batches()])):
        report = verify_gradients(Net(Healthy()), loss, data)
        assert report.passed, report.reason
        assert all(detail(report, name).startswith("not applicable") for name in ROW_CHECKS)


def test_a_graph_with_a_square_matrix_has_no_rows() -> None:
    class Graph(Net):
        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, adjacency = batch
            return super().forward(adjacency @ x)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch).pow(2).mean()

    data = [(x, torch.rand(4, 4).round()) for x in batches()]
    report = verify_gradients(Graph(Healthy()), loss, data)
    assert report.passed, report.reason
    assert "no rows" in detail(report, "batch_sizes")


class TimeFirst(nn.Module):
    """Time-major inside; returns every step's output, flattened (T B, F), and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.rnn(x.reshape(len(x), 3, 2).transpose(0, 1))
        return self.head(states.flatten(0, 1)), states.pow(2).mean()


class RowFirst(nn.Module):
    """Returns every row's steps one after the other (B T, F)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(-1, 2))


class OtherLengths(nn.Module):
    """Cuts its output to the longest row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        longest = int((x > 0).sum(dim=1).max())
        return self.head(x.unsqueeze(2))[:, : max(longest, 1)]


@pytest.mark.parametrize("kind", [TimeFirst, RowFirst, OtherLengths])
def test_awkward_outputs_raise_no_alarm(kind: type[nn.Module]) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        return sum(part.pow(2).mean() for part in (out if isinstance(out, tuple) else (out,)))

    report = verify_gradients(kind(), loss, batches())
    assert report.passed, report.reason


def test_random_numbers_in_eval_mode_are_not_taken_for_a_leak() -> None:
    class Sampling(Healthy):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(super().forward(x), 0.5, training=True)

    report = verified(Net(Sampling()))
    assert report.passed, report.reason
    assert "random numbers" in detail(report, "rows_independent")


def test_a_leak_in_a_method_that_the_loss_calls() -> None:
    class Methods(Net):
        def encode(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x))

    def loss(model: Methods, x: Tensor) -> Tensor:
        return model.head(model.encode(x)).pow(2).mean()

    assert verify_gradients(Methods(Healthy()), loss, batches()).passed
    report = verify_gradients(Methods(Centred()), loss, batches())
    assert checks_failed(report) == ["rows_independent"]
    assert report.culprit == "block.1"


def test_calls_made_by_recomputing_are_not_calls_of_the_loss() -> None:
    class Recomputed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.block, self.stem(x), use_reentrant=False))

    twin, _ = build_twin(Recomputed(Healthy()), squared, batches(), seed=0)
    with outer_calls(twin.model) as calls:
        twin.backward(0)
    assert [call.path for call in calls] == [""]


def test_float32_inside_still_shows_a_leak() -> None:
    class Single(nn.Module):
        def __init__(self, leak: float) -> None:
            super().__init__()
            self.leak = leak

        def forward(self, x: Tensor) -> Tensor:
            y = x.float()
            return torch.tanh(y + self.leak * y.mean(dim=0)).to(x.dtype)

    assert verified(Net(Single(0.0))).passed
    assert verified(Net(Single(0.5))).culprit == "block.1"
