"""Declared exceptions, structure checks, and models that cannot be held to float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradients import verify_gradients
from components.validate.gradients.lint import eval_reaches_modules
from components.validate.gradients.report import Cause, GradientReport, Verdict
from components.validate.waivers import Waiver, WaiverKind

WIDTH = 6


class Core(nn.Module):
    """stem -> (subclass) -> head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.stem(x)))


class Quantised(Core):
    def between(self, x: Tensor) -> Tensor:
        return x + (torch.round(4 * x) / 4 - x).detach()


class Stopped(Core):
    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x).detach()


class Spare(Core):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))


class Single(Core):
    """A float32 island in the middle of the model."""

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x.float()).to(x.dtype)


class SingleFlipped(Core):
    """A float32 island with a gradient of the wrong sign behind it."""

    def between(self, x: Tensor) -> Tensor:
        y = torch.tanh(x.float()).to(x.dtype)
        return 2 * y.detach() - y


class FloatAtTheDoor(Core):
    """A hard-coded float32 input, which cannot meet float64 weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class FloatAtTheDoorFlipped(SingleFlipped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, WIDTH, generator=generator) for _ in range(3)]


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch[:, :2]).pow(2).mean()


def verified(model: nn.Module, **options: Any) -> GradientReport:
    return verify_gradients(model, squared, batches(), **options)


def waiver(tensor: str, kind: WaiverKind) -> Waiver:
    return Waiver(tensor=tensor, kind=kind, reason="declared for the test")


def failed(report: GradientReport) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def verdicts(report: GradientReport) -> dict[str, Verdict]:
    return {t.name: t.verdict for t in report.tensors}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


EXCUSED: list[tuple[type[Core], Waiver, Cause]] = [
    (Quantised, waiver("stem.*", WaiverKind.SURROGATE), Cause.SURROGATE),
    (Stopped, waiver("stem.*", WaiverKind.STOP_GRADIENT), Cause.BROKEN_PATH),
    (Spare, waiver("spare", WaiverKind.UNUSED), Cause.UNUSED),
]


@pytest.mark.parametrize(("kind", "excuse", "cause"), EXCUSED)
def test_a_fitting_waiver_passes_and_keeps_the_cause(
    kind: type[Core], excuse: Waiver, cause: Cause
) -> None:
    model = kind()
    assert not verified(model).passed
    report = verified(model, waivers=[excuse])
    assert report.passed, report.reason
    waived = [t for t in report.tensors if t.verdict is Verdict.WAIVED]
    assert waived and {t.cause for t in waived} == {cause}
    assert f"{len(waived)} waived" in report.reason


@pytest.mark.parametrize(("kind", "excuse", "cause"), EXCUSED)
def test_a_waiver_of_another_kind_excuses_nothing(
    kind: type[Core], excuse: Waiver, cause: Cause
) -> None:
    wrong = WaiverKind.UNUSED if cause is not Cause.UNUSED else WaiverKind.SURROGATE
    assert not verified(kind(), waivers=[waiver(excuse.tensor, wrong)]).passed


@pytest.mark.parametrize("kind", list(WaiverKind))
@pytest.mark.parametrize("tensor", ["stem.weight", "no.such.tensor"])
def test_a_waiver_that_excuses_nothing_is_stale_and_fails(kind: WaiverKind, tensor: str) -> None:
    report = verified(Core(), waivers=[waiver(tensor, kind)])
    assert set(verdicts(report).values()) == {Verdict.PASS}
    assert failed(report) == ["waivers_current"]
    assert not report.passed
    assert tensor in report.reason


def test_a_glob_must_excuse_all_that_it_matches() -> None:
    report = verified(Quantised(), waivers=[waiver("*", WaiverKind.SURROGATE)])
    assert failed(report) == ["waivers_current"]


def test_a_waived_surrogate_does_not_draw_the_blame_of_another_fault() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Stopped()
            self.then = nn.Linear(2, WIDTH)
            self.last = Quantised()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.then(self.first(x)))

    # Everything before the rounding, as far as a gradient reaches.
    rounded = [waiver("then.*", WaiverKind.SURROGATE), waiver("last.stem.*", WaiverKind.SURROGATE)]
    excuse = [*rounded, waiver("first.head.*", WaiverKind.SURROGATE)]
    report = verified(Both(), waivers=excuse)
    open_tensors = {t for t, v in verdicts(report).items() if v is Verdict.FAIL}
    assert open_tensors == {"first.stem.weight", "first.stem.bias"}
    assert report.culprit == "first"


@pytest.mark.parametrize("fields", [{"reason": ""}, {"tensor": ""}, {"kind": "because"}])
def test_a_waiver_needs_a_name_a_known_kind_and_a_reason(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Waiver.model_validate({"tensor": "a", "kind": "unused", "reason": "r", **fields})


def test_frozen_parameters_must_be_declared() -> None:
    model = Core()
    model.stem.requires_grad_(False)
    report = verified(model)
    assert failed(report) == ["freezes_declared"]
    assert verdicts(report)["stem.weight"] is Verdict.FAIL
    assert not report.passed

    declared = verified(model, waivers=[waiver("stem.*", WaiverKind.FROZEN)])
    assert declared.passed, declared.reason
    assert verdicts(declared)["stem.weight"] is Verdict.WAIVED

    model.stem.bias.requires_grad_(True)
    assert failed(verified(model, waivers=[waiver("stem.*", WaiverKind.FROZEN)])) == [
        "waivers_current"
    ]


def test_mixed_modes_must_be_declared_and_are_kept() -> None:
    seen: set[tuple[bool, bool]] = set()

    class Normed(Core):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def between(self, x: Tensor) -> Tensor:
            seen.add((self.training, self.norm.training))
            return self.norm(x)

    model = Normed()
    model.norm.eval()
    report = verified(model)
    assert failed(report) == ["modes_consistent"] and not report.passed
    assert verified(model, waivers=[waiver("norm", WaiverKind.MODE)]).passed
    assert seen == {(True, False), (False, False)}


def test_optimizer_must_hold_every_trainable_parameter() -> None:
    model = Core()
    partial = torch.optim.SGD(model.head.parameters(), lr=0.1)
    report = verified(model, optimizer=partial)
    assert failed(report) == ["optimizer_covers_parameters"] and not report.passed
    assert "stem.weight, stem.bias" in report.reason

    replaced = torch.optim.SGD(model.parameters(), lr=0.1)
    assert verified(model, optimizer=replaced).passed
    model.head = nn.Linear(WIDTH, 2)
    assert failed(verified(model, optimizer=replaced)) == ["optimizer_covers_parameters"]


@pytest.mark.parametrize("seed", range(3))
def test_float32_inside_degrades_what_it_touches(seed: int) -> None:
    torch.manual_seed(seed)
    found = verdicts(verified(Single(), seed=seed))
    assert found["stem.weight"] is Verdict.DEGRADED
    assert found["stem.bias"] is Verdict.DEGRADED
    assert verified(Single(), seed=seed).passed


@pytest.mark.parametrize("seed", range(3))
def test_float32_at_the_input_degrades_everything(seed: int) -> None:
    torch.manual_seed(seed)
    report = verified(FloatAtTheDoor(), seed=seed)
    assert set(verdicts(report).values()) == {Verdict.DEGRADED}
    assert report.passed, report.reason
    assert "float32 accuracy" in report.reason


@pytest.mark.parametrize("kind", [SingleFlipped, FloatAtTheDoorFlipped])
@pytest.mark.parametrize("seed", range(3))
def test_float32_inside_does_not_excuse_a_wrong_gradient(kind: type[Core], seed: int) -> None:
    torch.manual_seed(seed)
    report = verified(kind(), seed=seed)
    found = verdicts(report)
    assert not report.passed
    assert {found["stem.weight"], found["stem.bias"]} == {Verdict.FAIL}
    assert report.culprit == ""


def test_a_float32_mask_degrades_nothing() -> None:
    class Masked(Core):
        def between(self, x: Tensor) -> Tensor:
            return torch.tanh(x) * (x > 0).float()

    assert set(verdicts(verified(Masked())).values()) == {Verdict.PASS}


def test_a_float32_mask_does_not_loosen_the_tolerance() -> None:
    class MaskedFault(Core):
        def between(self, x: Tensor) -> Tensor:
            y = torch.tanh(x) * (x > 0).float()
            return 0.999 * y + 0.001 * y.detach()

    found = verdicts(verified(MaskedFault()))
    assert found["stem.weight"] is found["stem.bias"] is Verdict.FAIL


def test_an_error_that_is_not_about_precision_reaches_the_caller() -> None:
    class Misfit(Core):
        def between(self, x: Tensor) -> Tensor:
            return x[:, :2]

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        verified(Misfit())


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("pack", [Pair, lambda x, y: (x, y), lambda x, y: [x, y]])
def test_batches_may_nest(pack: Callable[[Tensor, Tensor], Any]) -> None:
    def nested(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        pair = batch["pair"]
        x, y = (pair.x, pair.y) if isinstance(pair, Pair) else pair
        return functional.mse_loss(model(x), y[:, :2])

    assert verify_gradients(Core(), nested, [{"pair": pack(x, x)} for x in batches()]).passed


class CopiedTie(nn.Module):
    """A decoder that starts as a copy of the embedding, though it was meant to be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.Linear(WIDTH, WORDS, bias=False)
        self.decoder.weight = nn.Parameter(self.table.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.body(self.table(x))))


WORDS = 9


def next_word(model: nn.Module, x: Tensor) -> Tensor:
    return functional.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:])


def sentences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, WORDS, (4, 5), generator=generator) for _ in range(3)]


def test_a_tie_that_was_copied_is_found_and_can_be_waived() -> None:
    report = verify_gradients(CopiedTie(), next_word, sentences())
    assert failed(report) == ["ties_share_memory"]
    assert report.culprit == "decoder" and "table.weight and decoder.weight" in report.reason
    for name in ("table.weight", "decoder.weight"):
        excuse = [waiver(name, WaiverKind.COPY)]
        assert verify_gradients(CopiedTie(), next_word, sentences(), waivers=excuse).passed
    excuse = [waiver("body.weight", WaiverKind.COPY)]
    stale = verify_gradients(CopiedTie(), next_word, sentences(), waivers=excuse)
    assert failed(stale) == ["ties_share_memory", "waivers_current"]


def test_shared_clones_patterns_and_grids_are_no_copied_ties() -> None:
    class Alike(Core):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(WIDTH, WIDTH)
            self.twin.load_state_dict(self.stem.state_dict())
            self.left, self.right = (nn.Parameter(torch.eye(WIDTH)) for _ in range(2))
            self.low, self.high = (nn.Parameter(torch.linspace(0, 1, 12)) for _ in range(2))
            self.shared = nn.Linear(WIDTH, WIDTH, bias=False)
            self.shared.weight = self.stem.weight

        def between(self, x: Tensor) -> Tensor:
            grid = (x[:, :1] - self.low).square().sum() + (x[:, :1] - self.high).cos().sum()
            return torch.tanh(self.shared(self.twin(x)) @ self.left @ self.right) + grid

    report = verified(Alike())
    assert "ties_share_memory" not in failed(report)


def test_structural_faults_name_their_module() -> None:
    model = Core()
    model.head.bias.requires_grad_(False)
    assert verified(model).culprit == "head"

    model = Core()
    model.stem.eval()
    report = verified(model)
    assert report.culprit == "stem" and "eval mode" in report.reason


def test_a_stuck_module_can_be_waived() -> None:
    class Stuck(nn.Dropout):
        def train(self, mode: bool = True) -> "Stuck":
            return super().train(True)

    class Sampling(Core):
        def __init__(self) -> None:
            super().__init__()
            self.drop = Stuck(0.5)

        def between(self, x: Tensor) -> Tensor:
            return self.drop(torch.tanh(x))

    report = verified(Sampling())
    assert failed(report) == ["eval_reaches_modules"] and report.culprit == "drop"
    model = Sampling()
    model.stem.eval()
    eval_reaches_modules(model, (), ())
    assert [m.training for m in (model, model.stem, model.drop)] == [True, False, True]
    declared = verified(Sampling(), waivers=[waiver("drop", WaiverKind.MODE)])
    assert declared.passed, declared.reason
