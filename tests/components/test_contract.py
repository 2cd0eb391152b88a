"""An incomplete component is named by what it misses; inputs are compared with their specs."""

from collections.abc import Mapping

import numpy as np
import pytest
from torch import Tensor

from components.contract import (
    Arrays,
    DataSource,
    Model,
    ModelMetadata,
    Predictor,
    TensorSpec,
    check_inputs,
    instantiate,
)
from components.errors import ContractError, UsageError

SPECS = (
    TensorSpec(name="codes", dtype="int64", shape=("batch", 2)),
    TensorSpec(name="numbers", dtype="float32", shape=("batch", 3)),
)


class Half(Model):
    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]


class Whole(Half):
    def __init__(self, width: int, *, depth: int = 1) -> None:
        super().__init__()
        self.size = (width, depth)

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self(*inputs),)

    def get_model_metadata(self) -> ModelMetadata:
        return ModelMetadata(inputs=SPECS, outputs=(), classes=(), description="")


def arrays(rows: int = 5) -> dict[str, np.ndarray]:
    return {"numbers": np.zeros((rows, 3), np.float32), "codes": np.zeros((rows, 2), np.int64)}


def test_incomplete_model_names_the_missing_methods() -> None:
    with pytest.raises(ContractError, match="missing: get_model_metadata, predict") as raised:
        instantiate(Half)
    assert "Half" in str(raised.value)
    assert isinstance(raised.value, UsageError)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("base", "missing"),
    [
        (Model, "forward, get_model_metadata, predict"),
        (DataSource, "batches, excluded, prepare, schema, window"),
        (Predictor, "metadata, predict"),
    ],
)
def test_abstract_classes_name_all_their_methods(base: type, missing: str) -> None:
    class Empty(base):  # type: ignore[misc]
        pass

    with pytest.raises(ContractError, match=f"Empty must .* missing: {missing}\\."):
        instantiate(Empty)
    with pytest.raises(TypeError, match="abstract"):
        Empty()


def test_complete_class_is_built_with_its_arguments() -> None:
    assert instantiate(Whole, 3, depth=2).size == (3, 2)
    assert instantiate(lambda width: Whole(width), 4).size == (4, 1)


def test_errors_of_the_constructor_pass_through() -> None:
    with pytest.raises(TypeError, match="width"):
        instantiate(Whole)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_inputs_that_fit_in_any_order(rows: int) -> None:
    check_inputs(arrays(rows), SPECS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": np.zeros(5)}, r"must be named \['codes', 'numbers'\]; got .*'extra'"),
        ({"numbers": np.zeros((5, 3))}, r"'numbers' must be \(batch, 3\) float32; got .* float64"),
        ({"numbers": np.zeros((5, 4), np.float32)}, r"'numbers' .*; got \(5, 4\) float32"),
        ({"numbers": np.zeros(3, np.float32)}, r"'numbers' .*; got \(3,\) float32"),
        ({"numbers": np.float32(1)}, r"'numbers' .*; got \(\) float32"),
        ({"codes": np.zeros((4, 2), np.int64)}, r"share one batch size; got \[4, 5\]"),
    ],
)
def test_inputs_that_do_not_fit(change: Mapping[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_inputs({**arrays(), **change}, SPECS)  # type: ignore[dict-item]


def test_missing_input_is_named() -> None:
    given: Arrays = {"codes": arrays()["codes"]}
    with pytest.raises(ContractError, match=r"got \['codes'\]"):
        check_inputs(given, SPECS)


def test_all_differences_at_once() -> None:
    wrong: Arrays = {"codes": np.zeros((4, 2), np.int32), "numbers": np.zeros((5, 9), np.float32)}
    with pytest.raises(ContractError) as raised:
        check_inputs(wrong, SPECS)
    for words in ("'codes'", "int32", "'numbers'", "(5, 9)", "[4, 5]"):
        assert words in str(raised.value)
