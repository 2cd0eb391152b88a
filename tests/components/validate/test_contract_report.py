"""The contract's report, and the model after it was checked."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.contract_models import (
    ROWS,
    Classifier,
    Recurrent,
    Shared,
    assert_fires,
    batches_of,
    direct,
    only,
    plain,
)
from torch import Tensor, nn

from components.validate.call_audit import footprint
from components.validate.contract import verify_contract
from components.validate.contract_report import ContractReport


def test_all_failures_are_collected() -> None:
    class Rotten(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            return direct(self.fc2, self.fc1(inputs[0].mul_(2)))

        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return (self(*inputs).softmax(0) + torch.rand(1),)

    report = verify_contract(Rotten(), ROWS)
    assert only(report) == {"determinism", "independence", "inputs_kept", "hooks", "state_kept"}
    assert len(report.failures) >= 5
    assert all(sentence.endswith(".") for sentence in report.failures)


def test_report_is_frozen_json() -> None:
    for model in (Classifier(), plain("tensor")):
        report = verify_contract(model, ROWS)
        assert ContractReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError):
        report.passed = not report.passed
    with pytest.raises(ValidationError, match="must follow from checks"):
        ContractReport.model_validate({**report.model_dump(), "passed": True})


@pytest.mark.parametrize("build", [Classifier, Shared, Recurrent, lambda: plain("list of modules")])
@pytest.mark.parametrize("training", [False, True])
def test_model_is_left_unchanged(build: Callable[[], Classifier], training: bool) -> None:
    model = build().train(training)
    model.fc1.train()
    model.fc1.register_forward_hook(lambda *_: None)
    for weight in model.parameters():
        weight.grad = torch.rand_like(weight)
    rows = batches_of(*model.features)
    kept_rows = copy.deepcopy(rows)
    before, keys = footprint(model), [set(vars(m)) for m in model.modules()]
    tensors = {name: (id(t), t.data_ptr(), t._version) for name, t in model.named_parameters()}
    gradients = [id(weight.grad) for weight in model.parameters()]
    verify_contract(model, rows)
    after = footprint(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        other = after[key]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            assert torch.equal(value, other), key
        else:
            assert value == other, key
    assert keys == [set(vars(m)) for m in model.modules()]
    assert tensors == {n: (id(t), t.data_ptr(), t._version) for n, t in model.named_parameters()}
    assert gradients == [id(weight.grad) for weight in model.parameters()]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rows, kept_rows, strict=True))


def test_copy_that_reaches_back_is_reported_and_undone() -> None:
    class Reaching(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            # A copy keeps calling the norm of this very model.
            self.normalise: Callable[[Tensor], Tensor] = lambda x: self.norm(x)

        def forward(self, *inputs: Tensor) -> Any:
            return self.fc2(self.normalise(self.fc1(inputs[0])))

    model = Reaching()
    kept = copy.deepcopy(model.state_dict())
    assert_fires(verify_contract(model, ROWS), "copy", "norm", "running_mean")
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:2],
        [[ROWS[0][0][:3]], *ROWS[1:]],
        [*ROWS[:2], [ROWS[2][0][:0]]],
        [*ROWS[:2], []],
        [*ROWS[:2], [torch.tensor(1.0)]],
        [*ROWS[:2], [ROWS[0][0], ROWS[0][0][:2]]],
    ],
)
def test_too_little_to_check_with(rows: Any) -> None:
    with pytest.raises(ValueError, match="three or more batches"):
        verify_contract(Classifier(), rows)
