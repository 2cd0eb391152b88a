"""Every fault is caught, with its cause and the module that holds it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradient_report import Cause, GradientReport, Verdict
from components.validate.gradients import verify_gradients

WIDTH = 6
Context = torch.autograd.function.FunctionCtx


class Healthy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.bias = nn.Parameter(torch.randn(WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(functional.linear(x, self.weight, self.bias))


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


class Net(nn.Module):
    """stem -> block.0 (healthy) -> block.1 (the module under test) -> head."""

    def __init__(self, suspect: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(Healthy(), suspect)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


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
