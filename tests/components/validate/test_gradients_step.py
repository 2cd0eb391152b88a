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
from torch.nn.utils import prune

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Cause, GradientReport, Verdict
from components.validate.gradients.step import step_checks
from components.validate.gradients.twin import build_twin


def detail(report: GradientReport, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


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


def test_a_layer_that_only_eval_mode_reads_is_never_trained() -> None:
    class Switching(Net):
        def __init__(self) -> None:
            super().__init__(Healthy())
            self.other = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if self.training else self.other(out)

    torch.manual_seed(0)
    report = verified(Switching())
    assert failing(report) == {"other.weight": Cause.UNUSED, "other.bias": Cause.UNUSED}
    assert report.culprit == "other"


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


def test_a_step_that_depends_on_the_last_one_does_not_repeat() -> None:
    class Memory(Healthy):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * (1 + self.calls % 2)

    torch.manual_seed(0)
    assert "zero_grad_repeats" in checks_failed(verified(Net(Memory())))


def test_forward_called_directly_is_named() -> None:
    class Direct(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block.forward(self.stem(x)))

    torch.manual_seed(0)
    report = verified(Direct(Healthy()))
    assert checks_failed(report) == ["modules_called"]
    assert report.culprit == "block" and "Sequential" in report.reason


def test_attention_that_reads_the_weight_of_a_module_calls_every_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (3, 2)),
        nn.TransformerEncoderLayer(2, 1, 4, batch_first=True),
        nn.Flatten(),
        nn.Linear(WIDTH, 2),
    )
    report = verified(model)
    assert report.passed, report.reason


@pytest.mark.parametrize("how", ["train", "forward"])
def test_a_module_that_eval_does_not_reach(how: str) -> None:
    class Stuck(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> "Stuck":
            return super().train(mode or how == "train")

        def forward(self, x: Tensor) -> Tensor:
            if how == "forward":
                self.train()
            return super().forward(x)

    torch.manual_seed(0)
    model = Net(Stuck(WIDTH))
    report = verified(model)
    assert "eval_reaches_modules" in checks_failed(report)
    assert report.culprit == "block.1"
    assert all(module.training for module in model.modules())


def test_modules_that_stay_in_eval_mode_are_no_alarm() -> None:
    class Frozen(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            self.eval()
            return super().forward(x)

    torch.manual_seed(0)
    report = verified(Net(Frozen(WIDTH)))
    assert "eval_reaches_modules" not in checks_failed(report)


@pytest.mark.parametrize("hooked", [False, True])
def test_step_checks_cost_four_forwards_and_one_more_with_hooks(hooked: bool) -> None:
    torch.manual_seed(0)
    model = Net(Healthy())
    if hooked:
        model.head.weight.register_hook(lambda g: None)
    twin, home = build_twin(model, squared, batches(), seed=0)
    before = twin.forwards
    outcome = step_checks(twin, home, model, waivers=(), optimizer=None)
    # The second backward, the reading in eval mode and two parts of the batch.
    assert twin.forwards - before == 4 + hooked
    assert all(check.passed for check in outcome.checks)
    assert outcome.loss == home.loss == outcome.away.loss
    assert all(leaf.grad is None for slot in twin.slots for leaf in slot.leaves)


def test_a_buffer_in_place_of_a_weight() -> None:
    torch.manual_seed(0)
    model = Net(Healthy())
    weight = model.head.weight.detach().clone()
    del model.head.weight
    model.head.register_buffer("weight", weight)
    report = verified(model)
    assert checks_failed(report) == ["parameters_registered"]
    assert report.culprit == "head" and "head.weight" in report.checks[0].detail


def test_a_buffer_that_is_trained_is_no_buffer() -> None:
    class Trained(Healthy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(WIDTH, requires_grad=True))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale)

    torch.manual_seed(0)
    report = verified(Net(Trained()))
    assert checks_failed(report) == ["parameters_registered"]
    assert report.culprit == "block.1"


def test_masks_of_pruning_and_class_weights_may_be_buffers() -> None:
    class Criterion(Net):
        def __init__(self, suspect: nn.Module) -> None:
            super().__init__(suspect)
            self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            scores = super().forward(x)
            return scores + self.criterion(scores, x[:, 0].gt(0).long())

    torch.manual_seed(0)
    model = Criterion(Healthy())
    prune.l1_unstructured(model.stem, "weight", amount=0.3)
    assert "parameters_registered" not in checks_failed(verified(model))
