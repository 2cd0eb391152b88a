"""The optimiser's update against the expected one, on copies of all that is given."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gradient_models import WIDTH, Healthy, Net, batches, checks_failed, squared, verified
from torch import Tensor, nn
from torch.optim import lr_scheduler

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import GradientReport
from components.validate.waivers import Waiver, WaiverKind

Make = Callable[[nn.Module], torch.optim.Optimizer]
NAME = "optimizer_updates"


def detail(report: GradientReport) -> str:
    return next(check.detail for check in report.checks if check.name == NAME)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A few real steps, so that the optimiser has state."""
    for batch in batches():
        optimizer.zero_grad()
        torch.autograd.backward(squared(model, batch))
        optimizer.step()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def grouped(model: Net) -> torch.optim.Optimizer:
    rest = [*model.stem.parameters(), *model.block.parameters()]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": model.head.parameters(), "lr": 1.0}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


class Signed(torch.optim.Optimizer):
    """A rule of one's own."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.forgotten = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        held = [p for group in self.param_groups for p in group["params"]]
        for parameter in held[self.forgotten :]:
            if parameter.grad is not None:
                parameter -= self.param_groups[0]["lr"] * parameter.grad.sign()


class Collecting(Signed):
    """Moves only every fourth time."""

    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % 4 == 0:
            super().step(closure)


SOUND: dict[str, Make] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True, foreach=True),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "groups": grouped,
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.5, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), maximize=True),
    "tensor rate": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(1e-3)),
    "rate of zero": lambda m: torch.optim.SGD(m.parameters(), lr=0.0),
    "own rule": lambda m: Signed(m.parameters()),
    "own rule at rest": lambda m: Signed(m.parameters(), lr=0.0),
    "own rule below rounding": lambda m: Signed(m.parameters(), lr=1e-12),
    "collecting": lambda m: Collecting(m.parameters()),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_optimisers_pass_fresh_and_in_the_middle_of_training(name: str) -> None:
    model = Net(Healthy())
    optimizer = SOUND[name](model)
    for _ in range(2):
        report = verified(model, optimizer=optimizer)
        assert report.passed, report.reason
        assert "as expected" in detail(report)
        trained(model, optimizer)


@pytest.mark.parametrize("make", [SOUND["adam"], SOUND["own rule"], SOUND["groups"]])
def test_nothing_that_is_given_changes(make: Make) -> None:
    model = Net(Healthy())
    optimizer = make(model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    trained(model, optimizer)
    scheduler.step()

    def meddle(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        model.head.weight.data.mul_(2)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-6)

    optimizer.register_step_post_hook(meddle)
    before = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in model.parameters()]
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]

    assert "not applicable" not in detail(verified(model, optimizer=optimizer))

    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        for entry, value in state.items():
            assert torch.equal(torch.as_tensor(after["state"][key][entry]), torch.as_tensor(value))
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert all(torch.equal(grad, kept) for grad, kept in gradients)
    assert [id(p.grad) for p in model.parameters()] == [id(grad) for grad, _ in gradients]


class Skipping(torch.optim.SGD):
    """Leaves out the last parameter."""

    def _init_group(self, group: Any, params: Any, *rest: Any) -> Any:
        result = super()._init_group(group, params, *rest)
        params.pop()
        rest[0].pop()
        return result


class TooFar(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        for _ in range(2):
            result = super().step(closure)
        return result


class Alternating(torch.optim.SGD):
    """Every other step does nothing."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure) if self.calls % 2 else None


class Keeping(torch.optim.SGD):
    def zero_grad(self, set_to_none: bool = True) -> None:
        del set_to_none


def forgetful(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = Signed(model.parameters())
    optimizer.forgotten = 1
    return optimizer


def clipped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def clip(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = [p for group in stepping.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(held, 1e-3)

    optimizer.register_step_pre_hook(clip)
    return optimizer


@pytest.mark.filterwarnings("ignore:.*duplicate parameters:UserWarning")
def duplicated(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.parameters(), next(model.parameters())], lr=0.1)


class Exploding(Signed):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.param_groups[0]["params"][0].mul_(float("inf"))


FAULTY: dict[str, tuple[Make, str]] = {
    "skips one": (lambda m: Skipping(m.parameters(), lr=0.1), "head.bias did not move"),
    "goes too far": (lambda m: TooFar(m.parameters()), "instead of"),
    "every other step": (lambda m: Alternating(m.parameters(), lr=0.1), "instead of"),
    "own rule skips one": (forgetful, "stem.weight did not move"),
    "own rule explodes": (lambda m: Exploding(m.parameters()), "stem.weight became NaN"),
    "hook clips": (clipped, "instead of"),
    "duplicates": (duplicated, "stem.weight moved by"),
    "keeps gradients": (lambda m: Keeping(m.parameters(), lr=0.1), "keeps its gradient"),
}


@pytest.mark.filterwarnings("ignore:.*duplicate parameters:UserWarning")
@pytest.mark.parametrize("name", FAULTY)
def test_a_wrong_update_fails_and_says_what_moved(name: str) -> None:
    make, words = FAULTY[name]
    model = Net(Healthy())
    optimizer = make(model)
    report = verified(model, optimizer=optimizer)
    assert checks_failed(report) == [NAME]
    assert words in detail(report)
    assert report.culprit is None and NAME in report.reason

    excuse = Waiver(tensor="*", kind=WaiverKind.HOOK, reason="meant")
    assert verified(model, optimizer=optimizer, waivers=[excuse]).passed


class OwnRate(Signed):
    """Sets its rate by itself, as Adafactor does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        for group in self.param_groups:
            group["lr"] = None

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.1)


def test_a_rate_of_none_is_the_optimisers_own_business() -> None:
    report = verified(model := Net(Healthy()), optimizer=OwnRate(model.parameters()))
    assert report.passed, report.reason


def test_options_that_a_step_adds_to_the_given_groups_are_taken_away() -> None:
    model = Net(Healthy())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def mark(*_: Any) -> None:
        optimizer.param_groups[0]["seen"] = True

    optimizer.register_step_post_hook(mark)
    assert verified(model, optimizer=optimizer).passed
    assert "seen" not in optimizer.param_groups[0]


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"amsgrad": True}])
def test_groups_of_their_own_rates_with_frozen_parameters(options: dict[str, bool]) -> None:
    model = Net(Healthy())
    model.head.bias.requires_grad_(False)
    groups = [
        {"params": list(model.head.parameters()), "lr": 0.1},
        {"params": [p for n, p in model.named_parameters() if not n.startswith("head")]},
    ]
    frozen = Waiver(tensor="head.bias", kind=WaiverKind.FROZEN, reason="constant")
    report = verified(model, optimizer=torch.optim.Adam(groups, **options), waivers=[frozen])
    assert report.passed, report.reason


def test_a_skipped_update_of_a_vanishing_gradient_is_seen() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 2), nn.BatchNorm1d(2))
    # The bias before a batch norm has no gradient but rounding.
    order = [p for p in model.parameters() if p is not model[0].bias]
    report = verified(model, optimizer=Skipping([*order, model[0].bias], lr=0.1))
    assert detail(report).startswith("0.bias did not move")


def test_frozen_unused_sparse_and_tied_parameters_are_no_alarm() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4, sparse=True)
            self.body = nn.Linear(4, 4)
            self.again = nn.Parameter(self.body.weight.data)
            self.spare = nn.Parameter(torch.ones(2))
            self.fixed = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.table(x).mean(dim=1)) @ self.again * self.fixed

    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 9, (4, 3), generator=generator) for _ in range(3)]
    waivers = [
        Waiver(tensor="spare", kind=WaiverKind.UNUSED, reason="later"),
        Waiver(tensor="fixed", kind=WaiverKind.FROZEN, reason="constant"),
    ]
    model = Words()

    def loss(words: nn.Module, x: Tensor) -> Tensor:
        return words(x).pow(2).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = verify_gradients(model, loss, data, optimizer=optimizer, waivers=waivers)
    assert report.passed, report.reason
    assert "as expected" in detail(report)


@pytest.mark.parametrize("kind", ["closure", "raises", "patched"])
def test_steps_that_cannot_be_taken_on_copies_are_not_applicable(kind: str) -> None:
    class Raising(Signed):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("only on a device")

    model = Net(Healthy())
    optimizer: torch.optim.Optimizer
    if kind == "closure":
        optimizer = torch.optim.LBFGS(model.parameters())
    elif kind == "raises":
        optimizer = Raising(model.parameters())
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    report = verified(model, optimizer=optimizer)
    assert report.passed, report.reason
    assert detail(report).startswith("not applicable")


def test_what_is_no_optimizer_is_refused() -> None:
    wrong: Any = torch.optim.SGD
    with pytest.raises(ValueError, match=r"must be a torch.optim.Optimizer or None; got type"):
        verified(Net(Healthy()), optimizer=wrong)
