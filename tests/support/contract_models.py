"""Models that keep the contract, two ways to break it, and what tests ask of its report."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.contract import Model, ModelMetadata, TensorSpec
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


def direct(module: nn.Module, *inputs: Tensor) -> Tensor:
    """The mistake under test: the method instead of the module."""
    answer: Tensor = module.forward(*inputs)
    return answer


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
