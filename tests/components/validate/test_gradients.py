"""The verifier's own promises: a hand-computed case, no trace left, cost, arguments, records."""

import random
from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradients import verify_gradients
from components.validate.gradients.modes import examine
from components.validate.gradients.report import Cause, GradientReport, StepCheck, Verdict
from components.validate.gradients.twin import build_twin

X, Y, W, B = 2.0, 5.0, 0.5, 0.1
# L = (w x + b - y)^2, so dL/dw = 2 (w x + b - y) x and dL/db = 2 (w x + b - y).
DW, DB = -15.6, -7.8


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([W], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([B], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x + self.b


class ShallowSlope(torch.autograd.Function):
    """w x with dL/dw scaled by 15.5 / 15.6."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return w * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor, Tensor]:
        w, x = ctx.saved_tensors
        return g * x * (15.5 / 15.6), g * w


class CrookedLine(Line):
    def forward(self, x: Tensor) -> Tensor:
        return ShallowSlope.apply(self.w, x) + self.b


class Busy(nn.Module):
    """Everything that could leave a trace: dropout, running statistics, work in place, a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ReLU(inplace=True)
        self.linear = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 2)
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.linear(self.first(x))))
        self.cache = [hidden]
        return self.head(hidden) * random.random()


class Table(nn.Module):
    """An MLP on embedded columns."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, 8) for _ in range(4))
        self.body = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        columns = [table(batch["codes"][:, i]) for i, table in enumerate(self.tables)]
        return self.head(self.body(torch.cat([*columns, batch["numbers"]], dim=1)))


def line_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).pow(2).sum()


def line_batches() -> list[tuple[Tensor, Tensor]]:
    shifts = (0.0, 0.3, 0.7)
    return [(torch.tensor([X + s]), torch.tensor([Y - s])) for s in shifts]


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(2).mean()


def rows(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 4, generator=generator) for _ in range(count)]


def table_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "codes": torch.randint(0, 20, (4, 4), generator=generator),
            "numbers": torch.randn(4, 8, generator=generator),
            "label": torch.randint(0, 3, (4,), generator=generator),
        }
        for _ in range(3)
    ]


def table_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch), batch["label"])


def test_hand_derivative_equals_autograd_and_the_difference() -> None:
    residual = W * X + B - Y
    assert (2 * residual * X, 2 * residual) == pytest.approx((DW, DB))

    model = Line()
    torch.autograd.backward(line_loss(model, line_batches()[0]))
    assert model.w.grad is not None and model.b.grad is not None
    assert (model.w.grad.item(), model.b.grad.item()) == pytest.approx((DW, DB))

    twin, home = build_twin(model, line_loss, line_batches(), seed=0)
    away = twin.reading(0)
    found = examine(twin, home, home.loss, away, seed=0).findings
    rungs = [f.comparison.rung for f in found if f.comparison]
    assert len(rungs) == 2
    assert [abs(r.numeric / r.length) for r in rungs] == pytest.approx([-DW, -DB], rel=1e-9)
    assert [abs(r.analytic / r.length) for r in rungs] == pytest.approx([-DW, -DB], rel=1e-9)
    # h (||w|| + 0.05 sqrt(n)) with n = 1
    reach = [W + 0.05, B + 0.05]
    lengths = [r.h * size for r, size in zip(rungs, reach, strict=True)]
    assert [r.length for r in rungs] == pytest.approx(lengths)


def test_hand_example_passes_and_its_crooked_version_fails() -> None:
    report = verify_gradients(Line(), line_loss, line_batches())
    assert report.passed and report.culprit is None
    assert [t.verdict for t in report.tensors] == [Verdict.PASS, Verdict.PASS]

    crooked = verify_gradients(CrookedLine(), line_loss, line_batches())
    assert not crooked.passed
    causes = {t.name: t.cause for t in crooked.tensors}
    assert causes == {"w": Cause.MISMATCH, "b": Cause.NONE}
    # n = 1, so the error is exact: (15.6 - 15.5) / 15.6 of the expected derivative.
    assert crooked.tensors[0].relative_error == pytest.approx(0.1 / 15.6, rel=1e-4)
    assert crooked.culprit == "" and "CrookedLine" in crooked.reason


def test_leaves_no_trace() -> None:
    torch.manual_seed(3)
    model = Busy()
    model(torch.randn(4, 4))
    torch.autograd.backward(squared(model, torch.randn(4, 4)))
    model.norm.eval()
    batches = rows()
    torch.manual_seed(11)
    random.seed(11)
    before = _state(model, batches)

    report = verify_gradients(model, squared, batches)

    # An activation kept from the last forward is no hidden parameter.
    assert report.checks[0].name == "parameters_registered" and report.checks[0].passed
    after = _state(model, batches)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, key


def _state(model: Busy, batches: Sequence[Tensor]) -> dict[str, object]:
    state: dict[str, object] = {f"state {k}": v.clone() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        state[f"grad {name}"] = parameter.grad.clone()
        state[f"id {name}"] = (id(parameter), parameter.data_ptr(), parameter.requires_grad)
    for name, module in model.named_modules():
        state[f"module {name}"] = (module.training, len(module._forward_pre_hooks))
    state |= {f"batch {i}": batch.clone() for i, batch in enumerate(batches)}
    state["cache"] = model.cache[0].detach().clone()
    state["torch rng"] = torch.get_rng_state()
    state["python rng"] = random.getstate()
    state["ambient"] = (torch.get_default_dtype(), torch.is_grad_enabled())
    return state


def test_same_seed_gives_same_report_and_survives_json() -> None:
    model = Table()
    one, two = (verify_gradients(model, table_loss, table_batches(), seed=4) for _ in range(2))
    assert one.model_copy(update={"seconds": 0.0}) == two.model_copy(update={"seconds": 0.0})
    assert GradientReport.model_validate_json(one.model_dump_json()) == one


def test_the_process_random_state_does_not_change_the_report() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    reports = []
    for ambient in range(2):
        torch.manual_seed(ambient)
        report = verify_gradients(model, squared, rows())
        reports.append(report.model_copy(update={"seconds": 0.0}))
    assert reports[0] == reports[1]


def test_cost_on_the_pass_path() -> None:
    model = Table()
    calls = 0

    def counted(copied: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return table_loss(copied, batch)

    report = verify_gradients(model, counted, table_batches())
    assert report.passed and report.modes == ("train",)
    assert report.forwards == calls <= 2 * len(report.tensors) + 10
    assert report.backwards <= 8


def test_runs_under_no_grad_and_inference_mode() -> None:
    model = Table()
    with torch.no_grad():
        assert verify_gradients(model, table_loss, table_batches()).passed
    with torch.inference_mode():
        assert verify_gradients(model, table_loss, table_batches()).passed


@pytest.mark.parametrize(
    ("model", "loss", "batches", "expected"),
    [
        (Line(), line_loss, line_batches()[:2], "at least 3 small batches; got 2"),
        (Line(), line_loss, iter(line_batches()), "got list_iterator"),
        (nn.ReLU(), squared, rows(), "got 0 parameters"),
        (nn.Linear(4, 2).requires_grad_(False), squared, rows(), "none of them trainable"),
        (nn.LazyLinear(2), squared, rows(), "Run one forward"),
        (nn.Linear(4, 2), lambda m, x: m(x), rows(), r"shape \(4, 2\)"),
        (nn.Linear(4, 2), lambda m, x: m(x).sum().item(), rows(), "got float"),
    ],
)
def test_bad_arguments_say_rule_arrival_and_next_step(
    model: nn.Module, loss: object, batches: object, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        verify_gradients(model, loss, batches)  # type: ignore[arg-type]


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = Line()
    model.handle = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"survive copy\.deepcopy"):
        verify_gradients(model, line_loss, line_batches())


def test_a_report_cannot_claim_to_have_passed_against_its_evidence() -> None:
    failed = StepCheck(name="any", passed=False, detail="no")
    fields = {"tensors": (), "culprit": None, "reason": "", "modes": (), "seconds": 0.0}
    with pytest.raises(ValidationError, match="must follow"):
        GradientReport(passed=True, checks=(failed,), forwards=0, backwards=0, **fields)
