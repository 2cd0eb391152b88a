"""The one line for a team's own tests: what it returns, and what it says when it raises."""

import importlib.util
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.validate import testing
from components.validate.gradients import verify_gradients
from components.validate.gradients.report import (
    Cause,
    GradientReport,
    StepCheck,
    TensorCheck,
    Verdict,
)
from components.validate.testing import SHOWN_TENSORS, assert_gradients, describe_failure
from components.validate.waivers import Waiver, WaiverKind


class Net(nn.Module):
    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).tanh()
        return self.head(hidden.detach() if self.detached else hidden)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator))
        for _ in range(3)
    ]


def report(*tensors: TensorCheck, checks: tuple[StepCheck, ...] = ()) -> GradientReport:
    return GradientReport(
        passed=False,
        tensors=tensors,
        culprit=None,
        reason="as given",
        checks=checks,
        modes=("train",),
        forwards=1,
        backwards=1,
        seconds=0.1,
    )


def tensor(name: str, verdict: Verdict, cause: Cause = Cause.NONE) -> TensorCheck:
    return TensorCheck(name=name, module="", verdict=verdict, cause=cause)


def test_a_right_model_gives_its_report() -> None:
    torch.manual_seed(0)
    model = Net()
    found = assert_gradients(model, loss, batches(), seed=5)
    assert found.passed
    assert len(found.tensors) == 4
    assert found.tensors == verify_gradients(model, loss, batches(), seed=5).tensors
    assert found.tensors != verify_gradients(model, loss, batches()).tensors


def test_a_broken_model_raises_with_the_explanation() -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError) as raised:
        assert_gradients(Net(detached=True), loss, batches())
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("gradients of Net are not verified: 2 of 4 tensors fail")
    assert "module at fault: the model itself" in lines
    start = lines.index("failing tensors (2 of 4):")
    table = [line.split() for line in lines[start + 1 :]]
    assert table[0] == ["tensor", "verdict", "cause", "mode", "error", "tolerance"]
    assert [row[:3] for row in table[1:]] == [
        ["body.weight", "FAIL", "broken_path"],
        ["body.bias", "FAIL", "broken_path"],
    ]
    assert all(float(row[4]) > float(row[5]) > 0 for row in table[1:])


def test_columns_are_aligned() -> None:
    rows = (tensor("a", Verdict.FAIL, Cause.MISMATCH), tensor("a.long.name", Verdict.UNVERIFIABLE))
    lines = describe_failure(report(*rows), "Net").splitlines()[-3:]
    words = ("cause", "mismatch", "none")
    starts = {line.index(word) for line, word in zip(lines, words, strict=True)}
    assert starts == {len("  a.long.name  UNVERIFIABLE  ")}


def test_checks_that_failed_are_told_and_others_are_not() -> None:
    checks = (
        StepCheck(name="freezes_declared", passed=False, detail="requires_grad=False: w"),
        StepCheck(name="modes_consistent", passed=True, detail="all in train mode"),
    )
    text = describe_failure(report(tensor("w", Verdict.PASS), checks=checks), "Net")
    assert text.splitlines()[1:] == ["failed checks:", "  freezes_declared: requires_grad=False: w"]


def test_a_long_table_is_cut() -> None:
    rows = [tensor(f"w{i}", Verdict.FAIL, Cause.MISMATCH) for i in range(SHOWN_TENSORS + 5)]
    lines = describe_failure(report(*rows), "Net").splitlines()
    assert lines[-1] == "  and 5 more"
    assert len([line for line in lines if "mismatch" in line]) == SHOWN_TENSORS


def test_options_reach_the_verification() -> None:
    torch.manual_seed(0)
    detached = Net(detached=True)
    stopped = Waiver(tensor="body.*", kind=WaiverKind.STOP_GRADIENT, reason="on purpose")
    assert assert_gradients(detached, loss, batches(), waivers=(stopped,)).passed
    forgetful = torch.optim.SGD(detached.head.parameters(), lr=0.1)
    with pytest.raises(AssertionError, match=r"not in any parameter group: body\.weight"):
        assert_gradients(detached, loss, batches(), waivers=(stopped,), optimizer=forgetful)


def test_the_traceback_ends_at_the_test() -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError) as raised:
        assert_gradients(Net(detached=True), loss, batches())
    shown = raised.traceback.filter(raised)
    assert [entry.name for entry in shown] == ["test_the_traceback_ends_at_the_test"]


def test_it_needs_no_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)  # an import of it would raise
    spec = importlib.util.find_spec(testing.__name__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
