"""Every fault is caught, with its cause and the module that holds it."""

from collections.abc import Callable

import pytest
import torch
from support.gradient_models import (
    Healthy,
    Net,
    batches,
    failing,
    squared,
    verified,
)
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Cause, Verdict

Context = torch.autograd.function.FunctionCtx


class DetachedBranch(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x.detach())


class DetachedOutput(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Item(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + x.square().mean().item())


class DataRead(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(functional.linear(x, self.weight.data, self.bias))


class NoGrad(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = torch.tanh(functional.linear(x, self.weight)) + 2
        return x * scale + self.bias


class Rounding(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(4 * super().forward(x)) / 4


class StraightThrough(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        soft = super().forward(x)
        return soft + (torch.round(4 * soft) / 4 - soft).detach()


class Overflowing(Healthy):
    """The root of a negative number is masked out of the value, but not out of the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        return torch.where(hidden > 0, hidden.sqrt(), hidden)


class InfiniteOutput(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sub(5).log()


class WrongSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> Tensor:
        return -3 * g


class OnePercent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> Tensor:
        return 3 * 1.01 * g


class UnreducedBias(torch.autograd.Function):
    """Adds a broadcast bias, but its backward keeps one row instead of summing over rows."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, bias: Tensor) -> Tensor:
        return x + bias

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, g[0]


class Applied(Healthy):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.function.apply(x))


class Biased(Healthy):
    def forward(self, x: Tensor) -> Tensor:
        return UnreducedBias.apply(functional.linear(x, self.weight), self.bias)


UPSTREAM = {"stem.weight", "stem.bias", "block.0.weight", "block.0.bias"}
OWN = {"block.1.weight", "block.1.bias"}
FAULTS: dict[str, tuple[Callable[[], nn.Module], Cause, set[str]]] = {
    "detached branch": (DetachedBranch, Cause.MISMATCH, UPSTREAM),
    "detached output": (DetachedOutput, Cause.BROKEN_PATH, UPSTREAM | OWN),
    ".item()": (Item, Cause.MISMATCH, UPSTREAM),
    ".data": (DataRead, Cause.BROKEN_PATH, {"block.1.weight"}),
    "no_grad": (NoGrad, Cause.MISMATCH, UPSTREAM | {"block.1.weight"}),
    "round": (Rounding, Cause.BROKEN_PATH, UPSTREAM | OWN),
    "straight-through": (StraightThrough, Cause.SURROGATE, UPSTREAM | OWN),
    "wrong sign": (lambda: Applied(WrongSign), Cause.MISMATCH, UPSTREAM),
    "factor 1.01": (lambda: Applied(OnePercent), Cause.MISMATCH, UPSTREAM),
    "no broadcast reduction": (Biased, Cause.MISMATCH, {"block.1.bias"}),
    "NaN gradient": (Overflowing, Cause.NON_FINITE, UPSTREAM | OWN),
}


def test_the_net_without_a_fault_passes() -> None:
    torch.manual_seed(0)
    assert verified(Net(Healthy())).passed


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught_with_cause_and_culprit(name: str, seed: int) -> None:
    build, cause, expected = FAULTS[name]
    torch.manual_seed(seed)
    report = verified(Net(build()), seed=seed)
    assert not report.passed
    found = failing(report)
    assert set(found) == expected
    # Detached values may still reach a weight by another way: then its gradient is merely wrong.
    assert cause in found.values()
    assert set(found.values()) <= {cause, Cause.BROKEN_PATH}
    assert report.culprit == "block.1"
    assert type(build()).__name__ in report.reason


def test_non_finite_loss_blames_the_first_module_that_makes_it() -> None:
    torch.manual_seed(0)
    report = verified(Net(InfiniteOutput()))
    assert set(failing(report).values()) == {Cause.NON_FINITE}
    assert report.culprit == "block.1"


def test_a_fault_deep_inside_is_named_by_its_full_path() -> None:
    torch.manual_seed(0)
    report = verified(Net(nn.Sequential(Healthy(), nn.Sequential(Healthy(), Item()))))
    assert report.culprit == "block.1.1.1"


def test_of_two_nan_gradients_the_most_downstream_is_named() -> None:
    torch.manual_seed(0)
    report = verified(Net(nn.Sequential(Overflowing(), Healthy(), Overflowing())))
    assert report.culprit == "block.1.2"


def test_modules_that_work_in_place_can_be_replayed() -> None:
    torch.manual_seed(0)
    report = verified(Net(nn.Sequential(Item(), nn.LeakyReLU(inplace=True))))
    assert report.culprit == "block.1.0"


def test_rounding_the_data_is_no_fault() -> None:
    class Bins(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.round(3 * x)

    class BinnedLate(Net):
        def __init__(self, suspect: nn.Module) -> None:
            super().__init__(suspect)
            self.bins = Bins()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.bins(x)[:, :2]

    torch.manual_seed(0)
    assert verified(BinnedLate(Healthy())).passed
    assert verified(BinnedLate(Item())).culprit == "block.1"


def test_of_two_faults_the_most_downstream_is_named() -> None:
    torch.manual_seed(0)
    report = verified(Net(nn.Sequential(Item(), Healthy(), Applied(OnePercent))))
    assert report.culprit == "block.1.2"


def test_a_fault_between_children_is_the_parents() -> None:
    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.stem(x).detach()))

    torch.manual_seed(0)
    report = verified(Cut(Healthy()))
    assert set(failing(report)) == {"stem.weight", "stem.bias"}
    assert report.culprit == "" and "Cut" in report.reason


def test_a_fault_in_the_loss_blames_no_module() -> None:
    def detached(model: nn.Module, batch: Tensor) -> Tensor:
        out = model(batch)
        return (out * out.detach()).mean()

    torch.manual_seed(0)
    report = verify_gradients(Net(Healthy()), detached, batches())
    assert not report.passed
    assert report.culprit is None and "loss_fn" in report.reason


def test_a_loss_without_any_graph_is_broken_everywhere() -> None:
    torch.manual_seed(0)
    report = verify_gradients(
        Net(Healthy()), lambda m, x: torch.tensor(squared(m, x).item()), batches()
    )
    assert set(failing(report).values()) == {Cause.BROKEN_PATH}
    assert len(failing(report)) == len(report.tensors)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_fault_in_train_mode_only_is_found_from_eval_mode(share: float) -> None:
    class Sly(Healthy):
        """The same value in both modes, but in training only a share of the gradient."""

        def forward(self, x: Tensor) -> Tensor:
            cut = (share * x + (1 - share) * x.detach()) if share else x.detach()
            return super().forward(cut if self.training else share * x + (1 - share) * x)

    torch.manual_seed(0)
    report = verified(Net(Sly()).eval())
    assert set(failing(report)) == UPSTREAM
    assert report.culprit == "block.1"
    assert {t.mode for t in report.tensors if t.verdict is Verdict.FAIL} == {"train"}


def test_a_fault_behind_a_zero_initialised_layer_is_found() -> None:
    torch.manual_seed(0)
    model = Net(Applied(WrongSign))
    nn.init.zeros_(model.head.weight)
    report = verified(model)
    assert set(failing(report)) == UPSTREAM
    assert report.culprit == "block.1"


def test_replays_move_parameters_that_share_storage_once() -> None:
    class Tied(Healthy):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(len(self.bias)))
            self.again = nn.Parameter(self.scale.data)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale + self.again

    torch.manual_seed(0)
    report = verified(Net(nn.Sequential(DetachedBranch(), Tied())))
    assert report.culprit == "block.1.0"
