"""Every rule of the model contract fires on a model that breaks it, and on no sound one."""

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from components.contract import Model, ModelMetadata, TensorSpec
from components.validate.call_audit import footprint
from components.validate.contract import verify_contract
from components.validate.contract_report import Check, ContractReport

Shape = tuple[Any, ...]


class Classifier(Model):
    """Three classes from one float32 input (B, 4), unless a test says otherwise."""

    features: Shape = (4,)
    fc1: nn.Module
    fc2: nn.Module
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fc2(self.fc1(inputs[0]).relu())

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self(*inputs).softmax(-1),)

    def get_model_metadata(self) -> ModelMetadata:
        return metadata(("x", "float32", self.features))


def metadata(*inputs: tuple[str, Any, Shape], **changes: Any) -> ModelMetadata:
    specs = [TensorSpec(name=n, dtype=d, shape=("batch", *s)) for n, d, s in inputs]
    fields = {
        "inputs": tuple(specs),
        "outputs": (TensorSpec(name="probabilities", dtype="float32", shape=("batch", 3)),),
        "classes": ("a", "b", "c"),
        "description": "test",
    }
    return ModelMetadata(**{**fields, **changes})


def batches_of(*shape: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [[torch.randn(rows, *shape, generator=generator)] for rows in (6, 4, 5)]


ROWS = batches_of(4)


def check_named(report: ContractReport, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def assert_fires(report: ContractReport, name: str, culprit: str | None, *words: str) -> None:
    check = check_named(report, name)
    assert not report.passed
    assert not check.passed, report.failures
    assert check.culprit == culprit, check.detail
    for word in words:
        assert word in check.detail


def only(report: ContractReport) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


# Sound models, none of which may raise an alarm.


class ConvNet(Classifier):
    features = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Identity()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AvgPool2d(2)
        )
        self.fc2 = nn.Linear(36, 3)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fc2(self.body(inputs[0]).flatten(1))


class Flights(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(10, 4), nn.Embedding(7, 4)])
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("steps", torch.arange(4), persistent=False)
        self.fc1 = nn.Linear(11, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, *inputs: Tensor) -> Any:
        categorical, numeric = inputs
        looked_up = [table(categorical[:, i]) for i, table in enumerate(self.tables)]
        # A missing number arrives as NaN.
        known = (numeric - self.mean).nan_to_num()
        return self.fc2(self.drop(self.fc1(torch.cat([*looked_up, known], 1)).relu()))

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        probabilities = self(*inputs).softmax(-1)
        return probabilities, probabilities.argmax(-1)

    def get_model_metadata(self) -> ModelMetadata:
        outputs = (
            TensorSpec(name="probabilities", dtype="float32", shape=("batch", 3)),
            TensorSpec(name="label", dtype="int64", shape=("batch",)),
        )
        return metadata(
            ("categorical", "int64", (2,)), ("numeric", "float32", (3,)), outputs=outputs
        )


class Attention(Classifier):
    features = (5, 8)

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Identity()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, *inputs: Tensor) -> Any:
        x = inputs[0]
        return self.fc2(self.attend(x, x, x, need_weights=False)[0].mean(1))


class Transformer(Classifier):
    features = (5, 8)

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Identity()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fc2(self.encoder(inputs[0]).mean(1))


class Recurrent(Classifier):
    features = (6, 4)

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Identity()
        self.lstm = nn.LSTM(4, 8, num_layers=2, batch_first=True, dropout=0.2)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fc2(self.lstm(inputs[0])[0][:, -1])


class Shared(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.again = self.mix
        self.out = nn.Linear(8, 3, bias=False)
        self.fc2.weight = self.out.weight

    def forward(self, *inputs: Tensor) -> Any:
        x = self.mix(self.again(self.mix(self.fc1(inputs[0]))))
        return self.fc2(x) + self.out(x)


class LoudLinear(nn.Linear):
    """Overrides forward at class level and goes on through super()."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input) * 2


class Extended(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = LoudLinear(4, 8)

    def forward(self, *inputs: Tensor) -> Any:
        return super().forward(*inputs) + 1


class OwnForward(Classifier):
    """Chooses its forward per instance."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["forward"] = self.fast

    def fast(self, *inputs: Tensor) -> Any:
        return self.fc2(self.fc1(inputs[0]).tanh())


class KeepsActivation(Classifier):
    """Shows its last activation to whoever asks, and holds a constant and a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(2.0)
        self.views = [self.fc1.weight, self.fc2.bias]

    def forward(self, *inputs: Tensor) -> Any:
        self.hidden = self.fc1(inputs[0]) * self.scale
        return self.fc2(self.hidden)


class ParametrizedNorms(Classifier):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.fc1)
        nn.utils.parametrizations.spectral_norm(self.fc2)


class RefusesTraining(Classifier):
    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.training:
            raise RuntimeError("call eval() first")
        return super().predict(*inputs)


def flight_rows() -> list[list[Tensor]]:
    rows = []
    for count in (8, 5, 1):
        numeric = torch.randn(count, 3)
        numeric[0, 1] = torch.nan
        rows.append([torch.randint(0, 7, (count, 2)), numeric])
    return rows


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
    assert len(report.checks) == 13


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
    ],
)
def test_metadata(changes: dict[str, Any], word: str) -> None:
    class Declared(Classifier):
        def get_model_metadata(self) -> ModelMetadata:
            return metadata(("x", "float32", (4,)), **changes)

    assert_fires(verify_contract(Declared(), ROWS), "metadata", "", word)


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


# finiteness


class Overflow(nn.Module):
    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        return x / 0 if self.when == "always" or self.training else x


@pytest.mark.parametrize(("when", "word"), [("always", "in eval mode"), ("train", "in train mode")])
def test_not_finite(when: str, word: str) -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), Overflow(when), nn.BatchNorm1d(8))
    report = verify_contract(model, ROWS)
    assert_fires(report, "finite", "fc1.1", word)


def test_predict_not_finite() -> None:
    class LogOfZero(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return ((self(*inputs) * 0).log(),)

    report = verify_contract(LogOfZero(), ROWS)
    assert_fires(report, "finite", "", "predict in eval mode")
    assert only(report) == {"finite"}


def test_missing_value_is_passed_on() -> None:
    rows = batches_of(4)
    rows[2][0][1, 1] = torch.nan
    assert_fires(verify_contract(Classifier(), rows), "finite", "fc1", "real rows")


# determinism


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-6 * torch.rand_like(x)


def test_randomness_at_predict() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), Noisy())
    report = verify_contract(model, ROWS)
    assert_fires(report, "determinism", "fc1.1", "same bits twice")
    assert_fires(report, "state_kept", "", "torch random state")


def test_functional_dropout_forgets_the_mode() -> None:
    class Dropping(Classifier):
        def forward(self, *inputs: Tensor) -> Any:
            return self.fc2(functional.dropout(self.fc1(inputs[0]), 0.5))

    assert_fires(verify_contract(Dropping(), ROWS), "determinism", "")


def test_state_between_calls() -> None:
    class Counting(Classifier):
        calls = 0

        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            self.calls += 1
            return (self(*inputs) + self.calls,)

    assert_fires(verify_contract(Counting(), ROWS), "determinism", "")


# independence of the rows of a batch


class StuckNorm(nn.BatchNorm1d):
    """Normalises by the batch even in eval mode, and alone by nothing."""

    def forward(self, input: Tensor) -> Any:
        return input if len(input) == 1 else (input - input.mean(0)) / (input.std(0) + 1e-5)


def test_batch_statistics_at_predict() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), StuckNorm(8))
    report = verify_contract(model, ROWS)
    assert_fires(report, "independence", "fc1.1", "stands alone", "other rows stand beside it")
    assert only(report) == {"independence"}


def test_batch_norm_left_in_train_mode() -> None:
    class Forgetful(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, *inputs: Tensor) -> Any:
            return self.fc2(self.norm(self.fc1(inputs[0])))

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.norm.training = True
            return self

    report = verify_contract(Forgetful(), ROWS)
    assert_fires(report, "independence", "norm", "more than 1 value per channel")
    assert_fires(report, "weights_kept", "norm", "running_mean, running_var")
    assert_fires(report, "state_kept", "norm", "eval() must reach every module")
    assert report.culprit == "norm"


@pytest.mark.parametrize(
    "leak",
    [
        lambda y: y.softmax(0),
        lambda y: y - y.mean(),
        lambda y: y + 0.01 * y.sum(0),
        lambda y: y + 0.01 * torch.arange(len(y))[:, None],
        lambda y: y + 0.01 * y.roll(1, 0),
        lambda y: y.cumsum(0),
    ],
)
def test_rows_leak_into_each_other(leak: Callable[[Tensor], Tensor]) -> None:
    class Leaking(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return (leak(self(*inputs)),)

    report = verify_contract(Leaking(), ROWS)
    assert_fires(report, "independence", "", "must not depend on its batch")
    assert only(report) == {"independence"}


def test_attention_over_the_batch_axis() -> None:
    model = Attention()
    model.attend = nn.MultiheadAttention(8, 2, batch_first=False)
    assert_fires(verify_contract(model, batches_of(5, 8)), "independence", "attend")


def test_integer_output_may_not_change() -> None:
    class Ranking(Flights):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            probabilities, _ = super().predict(*inputs)
            return probabilities, probabilities[:, 0].argsort().argsort()

    report = verify_contract(Ranking(), flight_rows())
    assert_fires(report, "independence", "", "output 1")


# what a call may not touch


def test_input_written_by_a_module() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 8))
    report = verify_contract(model, ROWS)
    assert_fires(report, "inputs_kept", "fc1.0", "forward must not write", "predict must not write")
    assert only(report) == {"inputs_kept"}


def test_input_written_by_predict() -> None:
    class Imputing(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            inputs[0][inputs[0] < 0] = 0
            return super().predict(*inputs)

    report = verify_contract(Imputing(), ROWS)
    assert_fires(report, "inputs_kept", "", "predict must not write")
    assert "forward must not" not in check_named(report, "inputs_kept").detail


class Tally(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x


def test_buffer_written_at_predict() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), Tally())
    report = verify_contract(model, ROWS)
    assert_fires(report, "weights_kept", "fc1.1", "it changed seen of 'fc1.1'")
    assert only(report) == {"weights_kept"}


def drops_gradients(model: Classifier) -> None:
    model.zero_grad()


def adds_gradients(model: Classifier) -> None:
    torch.autograd.backward(next(model.fc2.parameters()).sum())


MEDDLERS: list[tuple[Callable[[Classifier], object], str, str]] = [
    (lambda m: m.train(), "training", ""),
    (lambda m: m.fc1.train(not m.fc1.training), "training", "fc1"),
    (lambda m: m.fc1.requires_grad_(False), "weight.requires_grad", "fc1"),
    (drops_gradients, "weight.grad, bias.grad", "fc1"),
    (adds_gradients, "weight.grad", "fc2"),
    (lambda m: m.fc2.register_forward_hook(lambda *_: None), "forward_hooks", "fc2"),
    (lambda _: torch.manual_seed(3), "torch random state", ""),
    (lambda _: np.random.default_rng(np.random.randint(9)), "numpy random state", ""),
    (lambda _: random.random(), "python random state", ""),
    (lambda _: torch.set_grad_enabled(False), "gradient mode", ""),
]


@pytest.mark.parametrize(("meddle", "word", "culprit"), MEDDLERS, ids=[m[1] for m in MEDDLERS])
def test_predict_leaves_state_alone(meddle: Any, word: str, culprit: str) -> None:
    class Meddling(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                answer = super().predict(*inputs)
            if meddle is adds_gradients:
                torch.set_grad_enabled(True)
            meddle(self)
            return tuple(a.detach() for a in answer)

    model = Meddling()
    before = torch.is_grad_enabled(), torch.get_rng_state(), random.getstate()
    report = verify_contract(model, ROWS)
    assert_fires(report, "state_kept", culprit, word)
    assert only(report) == {"state_kept"}
    assert before[0] == torch.is_grad_enabled()
    assert torch.equal(before[1], torch.get_rng_state())
    assert before[2] == random.getstate()


def test_predict_calls_eval_and_stays_there() -> None:
    class Switching(Classifier):
        def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            self.eval()
            return super().predict(*inputs)

    assert_fires(verify_contract(Switching(), ROWS), "state_kept", "", "training")


# hooks


def direct(module: nn.Module, *inputs: Tensor) -> Tensor:
    """The mistake under test: the method instead of the module."""
    answer: Tensor = module.forward(*inputs)
    return answer


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


# round trip of the state


def plain(kind: str) -> Classifier:
    """A model whose second layer is kept outside the state."""

    class Plain(Classifier):
        def __init__(self) -> None:
            super().__init__()
            fc2: Any = self.fc2
            self.fc2 = nn.Identity()
            weight = fc2.weight.detach().clone().requires_grad_(True)
            self.store: Any = {
                "list of parameters": [nn.Parameter(weight.detach())],
                "tensor": weight,
                "dict of tensors": {"w": weight},
                "list of modules": [fc2],
            }[kind]

        def forward(self, *inputs: Tensor) -> Any:
            hidden, store = self.fc1(inputs[0]), self.store
            if kind == "list of modules":
                return store[0](hidden)
            weight = store if kind == "tensor" else store[0 if "list" in kind else "w"]
            return functional.linear(hidden, weight)

    return Plain()


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("list of parameters", "store[0]"),
        ("tensor", "store"),
        ("dict of tensors", "store['w']"),
        ("list of modules", "store[0].weight"),
    ],
)
def test_weights_outside_the_state(kind: str, path: str) -> None:
    report = verify_contract(plain(kind), ROWS)
    assert_fires(report, "round_trip", "", f"caused by {path}", "nn.ModuleList")
    assert only(report) == {"round_trip"}


class RunningMean(nn.Module):
    """Learns a statistic in train mode and keeps it in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


def test_statistic_outside_the_state() -> None:
    model = Classifier()
    model.fc1 = nn.Sequential(nn.Linear(4, 8), RunningMean())
    report = verify_contract(model, ROWS)
    assert_fires(report, "round_trip", "fc1.1", "caused by fc1.1.mean")


class Cached(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 8)
        self.folded: Tensor | None = None

    def forward(self, input: Tensor) -> Any:
        if self.folded is None:
            self.folded = self.weight.detach() * 2
        return functional.linear(input, self.folded)


def test_cache_outlives_the_weights() -> None:
    model = Classifier()
    model.fc1 = Cached()
    report = verify_contract(model, ROWS)
    assert_fires(report, "round_trip", "fc1")


class Stateful(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        del state


def test_state_that_is_not_a_tensor() -> None:
    model = Classifier()
    model.fc1 = Stateful(4, 8)
    assert_fires(verify_contract(model, ROWS), "round_trip", "fc1", "fc1._extra_state")


def test_state_that_does_not_load() -> None:
    class Renaming(Classifier):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {f"net.{k}": v for k, v in super().state_dict(*args, **kwargs).items()}

    report = verify_contract(Renaming(), ROWS)
    assert_fires(report, "round_trip", "", "load_state_dict", "must not raise")


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
    assert len(report.checks) == 13
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


# the report and the model afterwards


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
