"""The exception tree: exit codes, messages, and what a gate's refusal carries."""

import copy
import pickle

import pytest

from components import errors
from components.errors import (
    AssayError,
    ConfigError,
    ContractError,
    DataError,
    GateError,
    InfrastructureError,
    UsageError,
)


def subclasses(kind: type[AssayError]) -> set[type[AssayError]]:
    """The class and everything below it."""
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UsageError, 2),
        (ConfigError, 2),
        (DataError, 2),
        (ContractError, 2),
        (GateError, 3),
        (InfrastructureError, 1),
    ],
)
def test_the_family_decides_the_exit_code(kind: type[AssayError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, AssayError)
    assert issubclass(kind, UsageError) == (code == 2)


def test_every_error_is_drawn_in_the_tree() -> None:
    tree = errors.__doc__ or ""
    named = {kind.__name__ for kind in subclasses(AssayError) if kind.__module__ == errors.__name__}
    assert named == {name for name in vars(errors) if name.endswith("Error")}
    assert {name for name in named if name not in tree} == set()
    assert all(kind.__doc__ for kind in subclasses(AssayError))


def test_a_refusal_is_neither_a_mistake_nor_a_failure() -> None:
    assert not issubclass(GateError, UsageError | InfrastructureError)


def test_a_refusal_carries_every_failure() -> None:
    error = GateError("validate", ["too slow", "too wrong"], culprit="head.0", metrics={"auc": 0.5})
    assert str(error) == "validate rejected the candidate: too slow; too wrong"
    assert (error.stage, error.failures) == ("validate", ("too slow", "too wrong"))
    assert (error.culprit, error.metrics, error.rejection) == ("head.0", {"auc": 0.5}, None)


def test_a_refusal_keeps_its_own_metrics() -> None:
    metrics = {"auc": 0.5}
    error = GateError("validate", ["no"], metrics=metrics)
    metrics["auc"] = 1.0
    assert error.metrics == {"auc": 0.5}


def test_a_refusal_without_a_reason_cannot_be_made() -> None:
    with pytest.raises(AssertionError):
        GateError("validate", [])


def test_a_refusal_survives_a_copy_to_another_process() -> None:
    error = GateError("export", ["a", "b"], culprit="x", metrics={"y": 1.0})
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(again) == str(error)
        assert again.failures == error.failures
        assert (again.stage, again.culprit, again.metrics) == ("export", "x", {"y": 1.0})
