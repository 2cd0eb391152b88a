"""Calls past the hooks are found however they are made, and hooks that change numbers are named."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.contract_models import (
    ROWS,
    Attention,
    Classifier,
    Extended,
    OwnForward,
    Shared,
    Transformer,
    assert_fires,
    batches_of,
    only,
)
from torch import Tensor, nn
from torch.nn import functional

from components.contract import Model
from components.validate.call_audit import count_calls
from components.validate.contract import verify_contract
from components.validate.waivers import Waiver

# calls past the hooks


class Rows(nn.Module):
    """The same layer, called in a way that the test chooses."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.layers[1], self.layers[0](x))


PAST: dict[str, Any] = {
    "method": lambda fc, x: fc.forward(x),
    "unbound": lambda fc, x: nn.Linear.forward(fc, x),
    "of its type": lambda fc, x: type(fc).forward(fc, x),
    "by name": lambda fc, x: getattr(fc, "for" + "ward")(x),
    "bound to the class": lambda fc, x: nn.Linear.forward.__get__(fc)(x),
    "with keywords": lambda fc, x: fc.forward(input=x),
}


@pytest.mark.parametrize("way", PAST)
def test_call_past_the_hooks(way: str) -> None:
    model = Rows(PAST[way])
    counts = count_calls(model, lambda: model(torch.ones(2, 4)))
    assert counts == {"": (1, 1), "layers": (0, 0), "layers.0": (1, 1), "layers.1": (1, 0)}


def test_call_through_the_hooks() -> None:
    for way in (lambda fc, x: fc(x), lambda fc, x: fc(fc(x)), lambda fc, x: fc.__call__(x)):
        model = Rows(way)
        counts = count_calls(model, lambda model=model: model(torch.ones(2, 4)))
        assert all(entered == fired for entered, fired in counts.values()), counts


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input) + nn.Linear.forward(self, input)


class Tree(nn.Module):
    """Calls itself for what lies below, as trees do."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.fc, self.past = nn.Linear(4, 4), past

    def forward(self, x: Tensor, depth: int = 2) -> Any:
        if depth == 0:
            return self.fc(x)
        below = self.forward if self.past else self
        return self.fc(below(x, depth - 1))


def test_what_one_instance_calls_of_itself() -> None:
    x = torch.ones(2, 4)
    doubled = Doubled(4, 4)
    assert count_calls(doubled, lambda: doubled(x)) == {"": (1, 1)}
    assert count_calls(doubled, lambda: doubled.forward(x)) == {"": (1, 0)}
    assert count_calls(doubled, lambda: nn.Linear.forward(doubled, x)) == {"": (1, 0)}
    tree = Tree(past=False)
    assert count_calls(tree, lambda: tree(x)) == {"": (3, 3), "fc": (3, 3)}
    tree = Tree(past=True)
    assert count_calls(tree, lambda: tree(x)) == {"": (3, 1), "fc": (3, 3)}


@pytest.mark.parametrize(("build", "shape"), [(Attention, (5, 8)), (Transformer, (5, 8))])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_fast_paths_raise_no_alarm(
    build: type[Classifier], shape: tuple[int, ...], training: bool, gradients: bool
) -> None:
    model = build().train(training)
    (rows, *_) = batches_of(*shape)
    with torch.set_grad_enabled(gradients):
        counts = count_calls(model, lambda: model(*rows))
    assert all(entered == fired for entered, fired in counts.values()), counts
    assert counts[""] == (1, 1)


def test_other_instances_of_the_same_class_are_not_counted() -> None:
    model, other = Shared(), nn.Linear(4, 4)
    counts = count_calls(model, lambda: (model(*ROWS[0]), other.forward(torch.ones(1, 4))))
    assert all(entered == fired for entered, fired in counts.values()), counts


@pytest.mark.parametrize("build", [Classifier, Extended, OwnForward])
def test_classes_and_instances_are_put_back(build: type[Classifier]) -> None:
    model = build()
    forwards = [vars(cls).get("forward") for cls in (*type(model).__mro__, *nn.Linear.__mro__)]
    attributes = [dict(vars(module)) for module in model.modules()]
    profile, trace = sys.getprofile(), sys.gettrace()

    def fail() -> None:
        model(*ROWS[0])
        raise ZeroDivisionError

    count_calls(model, lambda: model(*ROWS[0]))
    with pytest.raises(ZeroDivisionError):
        count_calls(model, fail)
    found = [vars(cls).get("forward") for cls in (*type(model).__mro__, *nn.Linear.__mro__)]
    assert all(a is b for a, b in zip(forwards, found, strict=True))
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert (sys.getprofile(), sys.gettrace()) == (profile, trace)


def test_threads_that_count_at_once_leave_the_classes_alone() -> None:
    original = nn.Linear.forward
    wrong: list[object] = []

    def work() -> None:
        model = Classifier()
        for _ in range(20):
            counts = count_calls(model, lambda: model(*ROWS[0]))
            wrong.extend(c for c in counts.values() if c != (1, 1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert nn.Linear.forward is original


@pytest.mark.parametrize("way", ["unbound", "of its type"])
def test_unbound_calls_are_reported(way: str) -> None:
    class Past(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            hidden = PAST[way](self.fc1, inputs[0])
            return self.fc2(hidden)

    report = verify_contract(Past(), ROWS)
    assert_fires(report, "hooks", "fc1", "'fc1' ran 1 times and its hooks 0 times")
    assert only(report) == {"hooks"}


# hooks that change numbers


def doubling(module: nn.Module, taken: Any, given: Tensor) -> Tensor:
    return given * 2


def shifting(module: nn.Module, taken: Any) -> Any:
    return (taken[0] + 1,)


def watching(module: nn.Module, taken: Any, *given: Any) -> None:
    vars(module)["seen"] = len(taken[0])


def halving(module: nn.Module, taken: Any, *given: Any) -> Any:
    return tuple(None if gradient is None else gradient / 2 for gradient in taken)


HOOKS: list[tuple[Any, Any, str, str, str]] = [
    (lambda m: m.fc1, lambda n: n.register_forward_hook(doubling), "answers", "fc1", "doubling"),
    (
        lambda m: m.fc2,
        lambda n: n.register_forward_pre_hook(shifting),
        "answers",
        "fc2",
        "shifting",
    ),
    (lambda m: m, lambda n: n.register_forward_hook(doubling), "answers", "", "doubling"),
    (
        lambda m: m.fc2,
        lambda n: n.register_full_backward_hook(halving),
        "gradients",
        "fc2",
        "the backward hook halving of 'fc2'",
    ),
    (
        lambda m: m.fc1,
        lambda n: n.register_full_backward_pre_hook(lambda _, g: (g[0] * 2,)),
        "gradients",
        "fc1",
        "backward pre-hook",
    ),
    (
        lambda m: m.fc1.weight,
        lambda p: p.register_hook(lambda g: g * 2),
        "gradients",
        "fc1",
        "the tensor hook <lambda> of 'fc1.weight'",
    ),
]


@pytest.mark.parametrize(("place", "register", "what", "culprit", "words"), HOOKS)
def test_hook_that_changes_numbers(
    place: Any, register: Any, what: str, culprit: str, words: str
) -> None:
    model = Classifier()
    model.fc2.register_forward_hook(watching)
    register(place(model))
    report = verify_contract(model, ROWS)
    assert_fires(report, "hook_effects", culprit, f"hooks must leave {what} alone", words)
    assert only(report) == {"hook_effects"}
    assert "watching" not in report.failures[0]


def test_hook_on_gradients_that_nothing_reads_raises_no_alarm() -> None:
    model = Classifier()
    model.fc1.register_full_backward_hook(halving)  # those of the model's inputs
    assert verify_contract(model, ROWS).passed


def test_hooks_that_look_on_raise_no_alarm() -> None:
    model: Model = Classifier()
    for module in model.modules():
        module.register_forward_hook(watching)
        module.register_forward_pre_hook(watching)
        module.register_full_backward_hook(lambda *_: None)
    model.fc1.weight.register_hook(lambda gradient: None)  # type: ignore[union-attr, operator]
    report = verify_contract(model, ROWS)
    assert [f for f in report.failures if "hooks must leave" in f] == []


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_hooks_of_torch_itself_raise_no_alarm() -> None:
    model = Classifier()
    model.fc1 = nn.utils.weight_norm(nn.Linear(4, 8))
    nn.utils.parametrizations.spectral_norm(model.fc2)
    report = verify_contract(model, ROWS)
    assert [f for f in report.failures if "hooks must leave" in f] == []


def test_two_hooks_that_change_numbers_are_both_named() -> None:
    model = Classifier()
    model.fc1.register_forward_hook(doubling)
    model.fc2.register_forward_pre_hook(shifting)
    report = verify_contract(model, ROWS)
    assert len(report.failures) == 2
    assert_fires(report, "hook_effects", "fc1", "doubling", "shifting")


def test_waiver_excuses_a_hook_on_gradients_only() -> None:
    waiver = [Waiver.model_construct(tensor="fc*", kind="hook", reason="clipped on purpose")]
    model = Classifier()
    weight: Any = model.fc1.weight
    weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    assert only(verify_contract(model, ROWS)) == {"hook_effects"}
    assert verify_contract(model, ROWS, waivers=waiver).passed  # type: ignore[arg-type]
    model.fc1.register_forward_hook(doubling)
    assert not verify_contract(model, ROWS, waivers=waiver).passed  # type: ignore[arg-type]


def test_answers_that_need_a_hook() -> None:
    class Needing(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            hidden = self.fc1(inputs[0])
            return self.fc2(functional.relu(hidden)) + vars(self.fc1)["seen"]

    model = Needing()
    model.fc1.register_forward_hook(watching)
    assert_fires(verify_contract(model, ROWS), "hook_effects", "fc1", "watching", "answers")
