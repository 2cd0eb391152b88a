"""Every rule of the model contract fires on a model that breaks it, and on no sound one."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.contract_models import (
    ROWS,
    Attention,
    Classifier,
    ConvNet,
    Extended,
    Flights,
    KeepsActivation,
    OwnForward,
    ParametrizedNorms,
    Recurrent,
    RefusesTraining,
    Shared,
    Transformer,
    assert_fires,
    batches_of,
    flight_rows,
    metadata,
    only,
)
from torch import Tensor, nn
from torch.nn import functional

from components.contract import Model, ModelMetadata, TensorSpec
from components.validate.contract import verify_contract

PROBABILITIES = TensorSpec(name="probabilities", dtype="float32", shape=("batch", 3))

SOUND: list[tuple[Callable[[], Model], Any]] = [
    (Classifier, ROWS),
    (ConvNet, batches_of(1, 8, 8)),
    (Flights, flight_rows()),
    (Attention, batches_of(5, 8)),
    (Transformer, batches_of(5, 8)),
    (Recurrent, batches_of(6, 4)),
    (Shared, ROWS),
    (Extended, ROWS),
    (OwnForward, ROWS),
    (KeepsActivation, ROWS),
    (ParametrizedNorms, ROWS),
    (RefusesTraining, ROWS),
]


@pytest.mark.parametrize(("build", "rows"), SOUND, ids=[build.__name__ for build, _ in SOUND])
@pytest.mark.parametrize("training", [False, True])
def test_sound_models_raise_no_alarm(build: Any, rows: Any, training: bool) -> None:
    torch.manual_seed(0)
    report = verify_contract(build().train(training), rows)
    assert report.failures == ()
    assert report.passed
    assert report.culprit is None
    assert len(report.checks) == 14


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_script_modules_raise_no_alarm() -> None:
    model = Classifier()
    model.fc1 = torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    assert verify_contract(model, ROWS).failures == ()


def test_trained_model_with_history_and_gradients_raises_no_alarm() -> None:
    model = KeepsActivation()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for rows in ROWS:
        labels = torch.zeros(len(rows[0]), dtype=torch.long)
        torch.autograd.backward(functional.cross_entropy(model(*rows), labels))
        optimizer.step()
    assert verify_contract(model, ROWS).failures == ()


def test_large_values_and_badly_scaled_inputs_raise_no_alarm() -> None:
    torch.manual_seed(0)
    rows = [[batch[0] * 1e4 + 1e5] for batch in ROWS]
    assert verify_contract(Classifier(), rows).failures == ()


# conformance and metadata


def test_not_a_model() -> None:
    impostors: list[Any] = [nn.Linear(4, 3), print]
    report = verify_contract(impostors[0], ROWS)
    assert_fires(report, "conformance", "", "components.contract.Model", "Linear")
    assert "missing: get_model_metadata, predict." in report.checks[0].detail
    assert "has no attribute 'predict'" in " ".join(report.failures)
    report = verify_contract(impostors[1], ROWS)
    assert_fires(report, "conformance", "")


class Bypassing(nn.Linear):
    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


def test_overridden_call() -> None:
    model = Classifier()
    model.fc2 = Bypassing(8, 3)
    report = verify_contract(model, ROWS)
    assert_fires(report, "conformance", "fc2", "Bypassing")
    assert_fires(report, "hooks", "fc2")
    assert report.culprit == "fc2"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"inputs": ()}, "inputs of the metadata must not be empty"),
        ({"outputs": ()}, "outputs of the metadata must not be empty"),
        ({"classes": ()}, "classes of the metadata must not be empty"),
        ({"outputs": (TensorSpec(name="x", dtype="float32", shape=("batch", 3)),)}, "['x']"),
        ({"outputs": (TensorSpec(name="y", dtype="float32", shape=(3,)),)}, "first axis"),
        ({"outputs": (TensorSpec(name="y", dtype="float32", shape=("batch", "batch")),)}, "first"),
        ({"outputs": (TensorSpec(name="y", dtype="float32", shape=("batch", "a b", 3)),)}, "words"),
        ({"outputs": (PROBABILITIES.model_copy(update={"dtype": "float64"}),)}, "or int64; got"),
        ({"classes": ("a", "b", "a")}, "classes of the metadata must be unique; twice: ['a']"),
        ({"classes": ("a", "b")}, "the 2 classes of the metadata must be what an output tells"),
        ({"classes": ("a", "b", "c", "d")}, "must have 4 as its last axis; got probabilities"),
        ({"outputs": (PROBABILITIES.model_copy(update={"unit": " m"}),)}, "a printable word"),
    ],
)
def test_metadata(changes: dict[str, Any], word: str) -> None:
    class Declared(Classifier):
        def get_model_metadata(self) -> ModelMetadata:
            return metadata(("x", "float32", (4,)), **changes)

    assert_fires(verify_contract(Declared(), ROWS), "metadata", "", word)


def test_sequences_of_any_length() -> None:
    class Declared(Recurrent):
        features = ("sequence", 4)

    report = verify_contract(Declared(), [*batches_of(6, 4), *batches_of(2, 4)])
    assert report.failures == ()


@pytest.mark.parametrize(
    ("classes", "shape", "fits"),
    [
        (2, (), True),
        (2, (1,), True),
        (2, (2,), True),
        (3, (), False),
        (3, (1,), False),
        (3, (7, 3), True),
        (1, (), False),
        (1, (1,), True),
    ],
)
def test_class_labels_against_outputs(classes: int, shape: tuple[int, ...], fits: bool) -> None:
    class Labelled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.fc2 = nn.Sequential(nn.Linear(8, math.prod(shape)), nn.Unflatten(1, shape or (1,)))

        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return (self(*inputs) if shape else self(*inputs).squeeze(1),)

        def get_model_metadata(self) -> ModelMetadata:
            output = TensorSpec(name="y", dtype="float32", shape=("batch", *shape))
            labels = tuple("abcd"[:classes])
            return metadata(("x", "float32", (4,)), outputs=(output,), classes=labels)

    report = verify_contract(Labelled(), ROWS)
    assert only(report) == (set() if fits else {"metadata"}), report.failures


def test_probabilities_lie_between_0_and_1() -> None:
    class Measured(Classifier):
        def get_model_metadata(self) -> ModelMetadata:
            output = PROBABILITIES.model_copy(update={"unit": "probability"})
            return metadata(("x", "float32", (4,)), outputs=(output,))

    assert verify_contract(Measured(), ROWS).passed

    class Logits(Measured):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return (self(*inputs) - 2,)

    report = verify_contract(Logits(), ROWS)
    assert_fires(report, "outputs", "", "'probabilities' has the unit probability; got -")
    assert only(report) == {"outputs"}


def test_logits_of_train_mode_have_the_shape_of_eval_mode() -> None:
    class Wider(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            logits = super().forward(*inputs)
            return torch.cat([logits, logits], 1) if self.training else logits

    report = verify_contract(Wider(), ROWS)
    assert_fires(report, "outputs", "", "got (6, 6) float32 and (6, 3) float32")

    class Auxiliary(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            logits = super().forward(*inputs)
            return (logits, logits) if self.training else logits

    report = verify_contract(Auxiliary(), ROWS)
    assert_fires(report, "finite", "", "forward must return one tensor, the logits; got a tuple")


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_metadata_names_are_unique(kind: str) -> None:
    spec = TensorSpec(name="twin", dtype="float32", shape=("batch", 4))

    class Declared(Classifier):
        def get_model_metadata(self) -> ModelMetadata:
            return metadata(("x", "float32", (4,)), **{kind: (spec, spec)})

    assert_fires(verify_contract(Declared(), ROWS), "metadata", "", "['twin']")


def test_metadata_of_another_type() -> None:
    class Declared(Classifier):
        def get_model_metadata(self) -> Any:
            return {"inputs": []}

    report = verify_contract(Declared(), ROWS)
    assert_fires(report, "metadata", "", "must return a ModelMetadata; got a dict")
    assert only(report) == {"metadata", "inputs", "outputs"}
    assert len(report.failures) == 1


# inputs and outputs


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ([("x", "float32", (5,))], "must be (6, 5) float32 for 6 rows; got (6, 4) float32"),
        ([("x", "int64", (4,))], "must be (6, 4) int64"),
        ([("x", "float32", (4,)), ("z", "float32", (4,))], "are 2, tensors of a row 1"),
    ],
)
def test_inputs_against_metadata(inputs: Any, word: str) -> None:
    class Declared(Classifier):
        def get_model_metadata(self) -> ModelMetadata:
            return metadata(*inputs)

    report = verify_contract(Declared(), ROWS)
    assert_fires(report, "inputs", "", word, "pipeline's encoding")
    assert only(report) == {"inputs"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda p: (p, p), "outputs of the metadata are 1, of predict 2"),
        (lambda p: (p.double(),), "got (1, 3) float64"),
        (lambda p: (p > 0.5,), "got (1, 3) bool"),
        (lambda p: (p[:, :2],), "must be (1, 3) float32 for 1 rows; got (1, 2)"),
        (lambda p: (p.squeeze(0),), "for 1 rows; got (3,)"),
        (lambda p: [p], "must return a tuple of tensors; got a list"),
        (lambda p: p, "must return a tuple of tensors; got a Tensor"),
        (lambda p: (p.tolist(),), "must return a tuple of tensors"),
    ],
)
def test_outputs_against_metadata(change: Any, word: str) -> None:
    class Answering(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            answer: tuple[Tensor, ...] = change(super().predict(*inputs)[0])
            return answer

    assert_fires(verify_contract(Answering(), ROWS), "outputs", "", word)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda y: y.argmax(-1), "floating logits (1, ...); got (1,) int64"),
        (lambda y: y.mean(), "got () float32"),
        (lambda y: (y, y), "forward must return one tensor, the logits; got a tuple"),
    ],
)
def test_logits(change: Any, word: str) -> None:
    class Answering(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            logits: Tensor = change(super().forward(*inputs))
            return logits

        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            self(*inputs)
            return (torch.ones(len(inputs[0]), 3),)

    assert_fires(verify_contract(Answering(), ROWS), "outputs", "", word)
