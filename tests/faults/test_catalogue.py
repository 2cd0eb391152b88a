"""A sample of the fault campaign, and proof that its oracle and its scores can be trusted."""

from dataclasses import replace

import pytest
import torch
from faults import campaign
from faults.architectures import ARCHITECTURES, Architecture
from faults.campaign import OPERATORS, Answer, Outcome, Subject, score, try_clean, try_fault
from faults.clean import CLEAN, count_tensors
from faults.operators import Effect, Injection, Operator, at_output, crooked
from faults.oracle import truth
from torch import Tensor, nn

SEED = 0


class Chain(nn.Module):
    """Two layers; `middle` is what faults are put into."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.middle = nn.Tanh()
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def batches(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=generator) for _ in range(3)]


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


CHAIN = Architecture("chain", Chain, batches, squared)


def in_the_middle(broken: object, sound: object = None, effect: Effect = "gradient") -> Injection:
    """The fault of `at_output`, in the middle of a chain."""
    torch.manual_seed(SEED)
    inject = at_output(broken, sound, effect, where=lambda module: isinstance(module, nn.Tanh))  # type: ignore[arg-type]
    injection = inject(Chain(), torch.Generator().manual_seed(SEED))
    assert injection is not None
    return injection


def test_a_factor_is_measured_upstream_of_its_place() -> None:
    crook = crooked(lambda gradient: 1.25 * gradient)
    found = truth(in_the_middle(lambda self, y: crook(y)), squared, batches(SEED))
    assert found is not None
    assert found.culprits == ("middle",)
    assert found.tensors == {"first.weight", "first.bias"}
    assert found.errors == pytest.approx({"first.weight": 0.25, "first.bias": 0.25}, rel=1e-9)


def test_a_lost_gradient_and_one_that_is_no_number_are_total_errors() -> None:
    detached = truth(in_the_middle(lambda self, y: y.detach()), squared, batches(SEED))
    nan = in_the_middle(lambda self, y: y + (y - y).square().sum().sqrt())
    spoiled = truth(nan, squared, batches(SEED))
    assert detached is not None
    assert spoiled is not None
    expected = {"first.weight": 1.0, "first.bias": 1.0}
    assert detached.errors == pytest.approx(expected)
    assert spoiled.errors == expected


def test_a_flat_forward_loses_what_lies_before_it() -> None:
    found = truth(in_the_middle(lambda self, y: y.round(), effect="flat"), squared, batches(SEED))
    assert found is not None
    assert found.tensors == {"first.weight", "first.bias"}


@pytest.mark.parametrize(
    "injection",
    [
        pytest.param(lambda: in_the_middle(lambda self, y: y), id="nothing"),
        pytest.param(lambda: in_the_middle(lambda self, y: 2 * y), id="another-loss"),
        pytest.param(lambda: in_the_middle(lambda self, y: y[:, :2]), id="no-loss-at-all"),
        pytest.param(lambda: in_the_middle(lambda self, y: y, effect="rows"), id="rows-apart"),
        pytest.param(lambda: in_the_middle(lambda self, y: y, effect="scale"), id="in-proportion"),
        pytest.param(
            lambda: in_the_middle(lambda self, y: crooked(lambda g: (1 + 1e-8) * g)(y)),
            id="below-the-threshold",
        ),
    ],
)
def test_what_does_no_harm_is_no_fault(injection: object) -> None:
    assert truth(injection(), squared, batches(SEED)) is None  # type: ignore[operator]


def test_rows_that_interact_are_a_fault_though_gradients_are_right() -> None:
    def shared(self: nn.Module, y: Tensor) -> Tensor:
        return y + y.mean(0)

    found = truth(in_the_middle(shared, shared, "rows"), squared, batches(SEED))
    assert found is not None
    assert not found.tensors


def test_a_gradient_that_is_not_proportional_to_the_loss_is_a_fault() -> None:
    def clipped(self: nn.Module, y: Tensor) -> Tensor:
        return crooked(lambda g: g.clamp(-1, 1))(y)

    found = truth(in_the_middle(clipped, effect="scale"), squared, batches(SEED))
    assert found is not None
    assert not found.errors


def test_a_module_that_the_loss_never_enters_cannot_be_at_fault() -> None:
    model = Chain()
    model.idle = nn.Linear(3, 3)
    assert truth(Injection(model, None, ("idle",), "reached"), squared, batches(SEED)) is None
    assert truth(Injection(model, None, ("last",), "reached"), squared, batches(SEED)) is not None


class Shifted(Chain):
    """All scores of a softmax are shifted alike, which changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + self.shift(x)).softmax(-1)


def test_a_gradient_that_is_zero_but_for_rounding_is_left_undecided() -> None:
    found = truth(Injection(Shifted(), None, ("",), "always"), squared, batches(SEED))
    assert found is not None
    assert found.undecided == {"shift.weight", "shift.bias"}


def test_an_operator_that_changes_nothing_is_not_applicable() -> None:
    idle = Operator("idle", "wrong_gradient", at_output(lambda self, y: y))
    nowhere = Operator("nowhere", "step", lambda model, generator: None)
    assert try_fault(idle, CHAIN, SEED, [passing]) is None
    assert try_fault(nowhere, CHAIN, SEED, [passing]) is None


def passing(subject: Subject) -> Answer:
    return Answer(False, frozenset(), None)


def failing(subject: Subject) -> Answer:
    return Answer(True, frozenset(name for name, _ in subject.model.named_parameters()), "")


def unable(subject: Subject) -> None:
    return None


SIGN = Operator("sign", "wrong_gradient", at_output(lambda self, y: crooked(torch.neg)(y)))


def test_a_detector_that_always_passes_or_always_fails_catches_nothing() -> None:
    outcomes = try_fault(SIGN, CHAIN, SEED, [passing, failing, unable])
    assert outcomes is not None
    blind, shouting, absent = outcomes
    assert blind.large
    assert [o.caught for o in outcomes] == [False, False, False]
    assert score([blind]).large_caught == 0.0
    assert score([shouting]).caught == 0.0
    assert score([absent]).cases == 0
    assert try_clean(CHAIN, SEED, failing) == Answer(
        True, frozenset(dict(Chain().named_parameters())), ""
    )


def test_only_the_exact_module_and_set_of_tensors_count() -> None:
    right = Answer(True, frozenset({"a.b.weight"}), "a.b")
    outcome = Outcome(
        operator="any",
        family="wrong_gradient",
        architecture="any",
        seed=SEED,
        culprits=("a.b",),
        tensors=frozenset({"a.b.weight"}),
        undecided=frozenset({"c.bias"}),
        error=0.5,
        answer=right,
        silent=True,
        seconds=0.0,
    )
    assert outcome.caught and outcome.tensors_right and outcome.module_right
    for path in ("a", "a.b.c", "", None):
        assert not replace(outcome, answer=replace(right, culprit=path)).module_right
    either = replace(outcome, answer=replace(right, tensors=frozenset({"a.b.weight", "c.bias"})))
    assert either.tensors_right
    for tensors in (frozenset(), frozenset({"a.b.weight", "d.weight"}), None):
        assert not replace(outcome, answer=replace(right, tensors=tensors)).tensors_right
    assert replace(outcome, culprits=()).module_right is None
    assert not replace(outcome, silent=False).caught


def test_a_crash_of_the_detector_is_a_miss() -> None:
    def broken(model: nn.Module, x: Tensor) -> Tensor:
        raise KeyError("no loss")

    answer = campaign.verified(Subject(Chain(), broken, list(batches(SEED))))
    assert not answer.alarm
    assert "KeyError" in answer.reason


def test_the_catalogue_is_as_large_as_promised() -> None:
    assert len({operator.name for operator in OPERATORS}) == len(OPERATORS) >= 24
    assert len({architecture.name for architecture in ARCHITECTURES}) >= 8
    assert len({case.name for case in CLEAN}) == len(CLEAN) >= 40
    assert count_tensors() >= 1_000


@pytest.fixture(scope="module")
def sample() -> list[Outcome]:
    """Every operator once, each on the next architecture that it applies to."""
    outcomes = []
    for number, operator in enumerate(OPERATORS):
        order = [*ARCHITECTURES[number % len(ARCHITECTURES) :], *ARCHITECTURES]
        judged = (try_fault(operator, one, SEED, [campaign.verified]) for one in order)
        found = next((outcome for outcome in judged if outcome is not None), None)
        assert found is not None, f"{operator.name} applies nowhere"
        outcomes += found
    return outcomes


def test_every_fault_of_the_sample_is_caught(sample: list[Outcome]) -> None:
    missed = [(o.operator, o.architecture, o.answer) for o in sample if not o.caught]
    assert not missed


def test_no_large_error_of_a_gradient_is_missed(sample: list[Outcome]) -> None:
    assert sum(o.large for o in sample) >= 24
    assert score(sample).large_caught == 1.0


def test_the_tensors_and_the_module_at_fault_are_named(sample: list[Outcome]) -> None:
    reached = score(sample)
    strayed = [
        (o.operator, o.architecture, o.culprits, o.answer) for o in sample if not o.module_right
    ]
    assert reached.tensors_right is not None
    assert reached.module_right is not None
    assert reached.tensors_right >= 0.95
    assert reached.module_right >= 0.90, strayed
