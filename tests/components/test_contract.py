"""An incomplete component is named by what it misses; inputs are compared with their specs."""

import functools
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.contract import (
    Arrays,
    DataSource,
    Model,
    ModelMetadata,
    Predictor,
    TensorSpec,
    admit,
    axis_lengths,
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


async def coroutine(self: object, *inputs: Tensor) -> Tensor:
    return inputs[0]


def generator(self: object, *inputs: Tensor) -> Iterator[Tensor]:
    yield inputs[0]


def without_rows(self: object) -> Tensor:
    raise NotImplementedError


def keyword_only(self: object, *, x: Tensor) -> Tensor:
    return x


def of_number(self: object, split: str, as_of: date) -> int:
    return 0


def of_tuple(self: object, *inputs: Tensor) -> tuple[Tensor, ...]:
    return inputs


def of_tensor(self: object, *inputs: Tensor) -> Tensor:
    return inputs[0]


def with_argument(self: object, name: str) -> ModelMetadata:
    raise NotImplementedError


def of_dict(self: object) -> dict[str, int]:
    return {}


MISTYPED: list[tuple[type, str, Any, str]] = [
    (Model, "forward", 3, "forward must be a method; got an int"),
    (Model, "forward", coroutine, "forward must be a plain method; got an async one"),
    (Model, "forward", generator, "forward must return its value; got a generator"),
    (Model, "forward", property(without_rows), "forward must be a method; got a property"),
    (Model, "forward", without_rows, "forward must take (self, *inputs); got (self: object)"),
    (Model, "forward", keyword_only, "forward must take (self, *inputs); got (self: object, *, x"),
    (Model, "forward", of_tuple, "forward must return a Tensor; its annotation says tuple"),
    (Model, "predict", coroutine, "predict must be a plain method; got an async one"),
    (Model, "predict", of_tensor, "predict must return a tuple; its annotation says Tensor"),
    (Model, "predict", staticmethod(without_rows), "predict must return a tuple"),
    (Model, "get_model_metadata", with_argument, "get_model_metadata must take (self); got"),
    (Model, "get_model_metadata", of_dict, "must return a ModelMetadata; its annotation says dict"),
    (Model, "get_model_metadata", "text", "get_model_metadata must be a method; got a str"),
    (DataSource, "batches", lambda self, split: [], "batches must take (self, split, as_of)"),
    (DataSource, "batches", of_number, "batches must return an Iterable; its annotation says"),
    (DataSource, "window", lambda self: "", "window must take (self, as_of); got (self)"),
    (DataSource, "prepare", 0, "prepare must be a method; got an int"),
    (Predictor, "metadata", of_dict, "metadata must be a property; got a method"),
    (Predictor, "metadata", property(of_dict), "metadata must return a ModelMetadata"),
    (Predictor, "predict", without_rows, "predict must take (self, inputs); got (self: object)"),
]


@pytest.mark.parametrize(("base", "name", "member", "words"), MISTYPED)
def test_mistyped_member_is_refused_where_the_class_is_defined(
    base: type, name: str, member: Any, words: str
) -> None:
    with pytest.raises(ContractError) as raised:
        type("Wrong", (base,), {name: member})
    assert "Wrong must fit its base class; " in str(raised.value)
    assert words in str(raised.value)


def test_all_that_is_wrong_with_a_class_is_said_at_once() -> None:
    members = {"forward": coroutine, "get_model_metadata": 3}
    with pytest.raises(ContractError) as raised:
        type("Wrong", (Model,), members)
    for words in ("missing: predict", "forward must be", "get_model_metadata must be a method"):
        assert words in str(raised.value)


def test_inherited_members_are_looked_at_too() -> None:
    class Mixin:
        predict = None
        forward = coroutine

    with pytest.raises(ContractError, match="Mixed must fit .*async"):
        type("Mixed", (Mixin, Model), {})


def test_what_was_assigned_later_is_found_when_it_is_built() -> None:
    class Late(Whole):
        pass

    Late.forward = 3  # type: ignore[assignment, method-assign]
    with pytest.raises(ContractError, match="forward must be a method; got an int"):
        instantiate(Late, 3)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x,
        lambda self, x, mask=None, *, scale=1: x,
        lambda self, *args, **kwargs: args[0],
        torch.no_grad()(lambda self, x: x),
        staticmethod(lambda x: x),
        functools.partialmethod(of_tensor),
    ],
)
def test_many_ways_to_write_a_method_fit(forward: Any) -> None:
    assert issubclass(type("Fits", (Half,), {"forward": forward}), Model)


def test_annotations_that_say_little_fit() -> None:
    def unknown(self: object, *inputs: Tensor) -> "Nowhere":  # type: ignore[name-defined]  # noqa: F821
        return inputs[0]

    def anything(self: object, *inputs: Tensor) -> Any:
        return inputs[0]

    def either(self: object, *inputs: Tensor) -> Tensor | None:
        return inputs[0]

    for forward in (unknown, anything, either):
        assert issubclass(type("Fits", (Half,), {"forward": forward}), Model)


def test_units_are_kept_and_leave_no_trace_where_there_are_none() -> None:
    plain = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
    assert plain.model_dump_json() == '{"name":"x","dtype":"float32","shape":["batch",2]}'
    timed = TensorSpec(name="x", dtype="float32", shape=("batch", 2), unit="minutes")
    assert timed.model_dump()["unit"] == "minutes"
    for spec in (plain, timed):
        assert TensorSpec.model_validate_json(spec.model_dump_json()) == spec
        assert spec.unitless == plain


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


SEQUENCES = (
    TensorSpec(name="words", dtype="int64", shape=("batch", "sequence")),
    TensorSpec(name="vectors", dtype="float32", shape=("batch", "sequence", 8)),
)


def sequences(words: int = 5, vectors: int = 5) -> Arrays:
    return {
        "words": np.zeros((3, words), np.int64),
        "vectors": np.zeros((3, vectors, 8), np.float32),
    }


@pytest.mark.parametrize("length", [1, 5, 9])
def test_a_named_axis_takes_any_length(length: int) -> None:
    given = sequences(length, length)
    check_inputs(given, SEQUENCES)
    lengths = axis_lengths([given["words"], given["vectors"]], SEQUENCES)
    assert lengths == {"batch": 3, "sequence": length}
    assert SEQUENCES[1].sized(lengths) == (3, length, 8)


def test_a_named_axis_has_one_length() -> None:
    with pytest.raises(ContractError, match=r"share one length of axis 'sequence'; got \[4, 5\]"):
        check_inputs(sequences(5, 4), SEQUENCES)


def test_text_of_any_width_is_a_string() -> None:
    spec = TensorSpec(name="carrier", dtype="string", shape=("batch",))
    check_inputs({"carrier": np.array(["AA", "longer"])}, (spec,))
    with pytest.raises(ContractError, match=r"'carrier' must be \(batch\) string; got .* object"):
        check_inputs({"carrier": np.array(["AA"], dtype=object)}, (spec,))


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        ((("batch", 4), ("batch", 4, 8)), True),
        ((("batch", "sequence"), ("batch", "sequence", 8)), True),
        ((("batch", 4), ("batch", 5, 8)), False),
        ((("batch", 4), ("batch", 4, 7)), False),
        ((("batch", 4), ("batch", 4)), False),
        (((3, 4), ("batch", 4, 8)), False),
    ],
)
def test_fixed_sizes_fit_declared_names(shapes: Any, fits: bool) -> None:
    given = [
        spec.model_copy(update={"shape": shape})
        for spec, shape in zip(SEQUENCES, shapes, strict=True)
    ]
    assert admit(SEQUENCES, given) is fits
    assert not admit(SEQUENCES, given[:1])
    assert not admit(given, SEQUENCES) or tuple(given) == SEQUENCES
