"""Modules are called through their hooks, and an error is laid at the module that raised it."""

import threading
from typing import Any

from support.contract_models import (
    ROWS,
    Classifier,
    OwnForward,
    Shared,
    assert_fires,
    direct,
    only,
)
from torch import Tensor, nn

from components.contract import ModelMetadata
from components.validate.contract import verify_contract

# hooks


def test_forward_of_a_module_called_directly() -> None:
    class Direct(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            return direct(self.fc2, self.fc1(inputs[0]))

    report = verify_contract(Direct(), ROWS)
    assert_fires(report, "hooks", "fc2", "'fc2' ran 1 times and its hooks 0 times")
    assert only(report) == {"hooks"}
    assert report.culprit == "fc2"


def test_predict_calls_forward_of_the_model() -> None:
    class Direct(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return (direct(self, *inputs).softmax(-1),)

    report = verify_contract(Direct(), ROWS)
    assert_fires(report, "hooks", "", "during predict the forward of the model itself")
    assert only(report) == {"hooks"}


def test_direct_call_in_train_mode_only() -> None:
    class Direct(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            hidden = direct(self.fc1, *inputs) if self.training else self.fc1(inputs[0])
            return self.fc2(hidden)

    assert_fires(verify_contract(Direct(), ROWS), "hooks", "fc1")


def test_direct_call_of_a_shared_and_of_an_instance_forward() -> None:
    class Direct(Shared):
        def forward(self, *inputs: Tensor) -> Any:
            return super().forward(*inputs) + direct(self.again, self.fc1(inputs[0]))[:, :3]

    assert_fires(verify_contract(Direct(), ROWS), "hooks", "mix", "ran 4 times and its hooks 3")

    class DirectOwn(OwnForward):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return (direct(self, *inputs),)

    assert_fires(verify_contract(DirectOwn(), ROWS), "hooks", "")


def test_predict_goes_past_the_model() -> None:
    class Past(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return (self.fc2(self.fc1(inputs[0])),)

    assert_fires(verify_contract(Past(), ROWS), "hooks", "", "predict must call self(...)")


# errors of the model's own code


def test_findings_before_an_exception_are_kept() -> None:
    class Decaying(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            if self.training:
                raise RuntimeError("cannot train")
            return self.fc2(direct(self.fc1, inputs[0])) / 0

    report = verify_contract(Decaying(), ROWS)
    assert_fires(report, "finite", "", "forward in eval mode must give finite", "cannot train.")
    assert_fires(report, "hooks", "fc1", "forward of 'fc1'", "cannot train.")


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("no such thing\nsecond line")


def test_exception_names_the_innermost_module() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), Failing())
    report = verify_contract(model, ROWS)
    assert_fires(report, "outputs", "fc1.1", "'fc1.1' raised ZeroDivisionError: no such thing")
    assert report.culprit == "fc1.1"
    assert "second line" not in report.failures[0]
    assert len(report.checks) == 14
    assert len(report.failures) == 2  # one of forward, one of predict


def test_exception_in_an_operator() -> None:
    model = Classifier()
    model.fc2 = nn.Linear(9, 3)
    assert_fires(verify_contract(model, ROWS), "outputs", "fc2", "RuntimeError", "shapes")


def test_exception_in_predict_and_in_metadata() -> None:
    class Broken(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            raise KeyError

        def get_model_metadata(self) -> ModelMetadata:
            raise NotImplementedError("later")

    report = verify_contract(Broken(), ROWS)
    assert_fires(report, "metadata", "", "NotImplementedError: later")
    assert_fires(report, "finite", "", "predict must not raise", "KeyError: (no message)")


def test_model_that_cannot_be_copied() -> None:
    class Locked(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    report = verify_contract(Locked(), ROWS)
    assert_fires(report, "copy", "", "copy.deepcopy", "TypeError")
    assert len(report.failures) == 1
