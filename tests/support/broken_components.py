"""Components as a user would hand them in: one that is right, and one for each classic mistake."""

import subprocess
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.contract import Model, ModelMetadata, TensorSpec
from components.data.encoding import Encoding, Features
from components.pipeline import Pipeline, QualityGate
from components.train.config import TrainConfig
from components.validate.waivers import Waiver, WaiverKind

print("this module says hello on stdout")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


class Right(Model):
    """Three classes from four numbers; every mistake below is made in one place of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.block: nn.Module = Residual()
        self.last = nn.Linear(8, 3)

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.last(self.block(self.first(inputs[0])))
        return logits

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self(*inputs).softmax(-1),)

    def get_model_metadata(self) -> ModelMetadata:
        return ModelMetadata(
            inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4), unit="m"),),
            outputs=(
                TensorSpec(name="p", dtype="float32", shape=("batch", 3), unit="probability"),
            ),
            classes=("a", "b", "c"),
            description="which of three",
        )


class DetachedBranch(Residual):
    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x).detach()


class Detached(Right):
    """A branch of a residual connection is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.block = DetachedBranch()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * ctx.saved_tensors[0]  # 2 is missing


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return Square.apply(self.fc(x))


class Factor(Right):
    """A function with a backward of its own forgets a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Squared()


class Direct(Right):
    """The forward of a submodule is called past its hooks."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.last(self.block.forward(self.first(inputs[0])))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [nn.Parameter(torch.eye(8))]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[0])


class PlainList(Right):
    """A parameter is kept in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Listed()


class TrainingNorm(Right):
    """A BatchNorm is left in train mode at predict."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.block[1].train()  # type: ignore[index]
        return super().predict(*inputs)


class NotANumber(Right):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs) / 0 * 0


class Incomplete(Model):
    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]


class Needy(Right):
    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()


class Raising(Right):
    def __init__(self) -> None:
        super().__init__()
        raise ZeroDivisionError("no such width")


class Leaving(Right):
    def forward(self, *inputs: Tensor) -> Tensor:
        raise SystemExit(0)


class Plain(nn.Module):
    """No Model, but it brings rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"y": self.fc(x) * mask}

    def example_inputs(self, rows: int) -> tuple[Tensor, ...]:
        return torch.randn(rows, 5), torch.ones(rows, 1)


class PlainDetached(Plain):
    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"y": self.fc(x) * mask + self.fc(x).detach()}


class Silent(nn.Module):
    """No Model, and nothing says what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 2)


class WrongExamples(Plain):
    def example_inputs(self, rows: int) -> Any:
        return torch.randn(rows, 5)


class Frozen(Right):
    """Its first layer is not trained, and that is declared."""

    waivers = (Waiver(tensor="first.*", kind=WaiverKind.FROZEN, reason="trained elsewhere"),)

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class Undeclared(Frozen):
    waivers = ()


class Misdeclared(Frozen):
    waivers = "first.*"


class Noisy(Right):
    """A child process of it writes to stdout."""

    def __init__(self) -> None:
        super().__init__()
        subprocess.run(["echo", "noise"], check=True)


class Fed(Right):
    """Looks up what its own rows must give: a number below three."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(self.table(inputs[0]).sum(1))

    def get_model_metadata(self) -> ModelMetadata:
        spec = TensorSpec(name="codes", dtype="int64", shape=("batch", 2))
        return super().get_model_metadata().model_copy(update={"inputs": (spec,)})

    def example_inputs(self, rows: int) -> tuple[Tensor, ...]:
        return (torch.randint(3, (rows, 2)),)


class Encoded(Right):
    """Built by a pipeline; one parameter is frozen and declared so."""

    def __init__(self, encoding: Encoding, config: TrainConfig) -> None:
        super().__init__()
        self._inputs = encoding.specs()
        self.table = nn.Embedding(len(encoding.categorical[0].vocabulary) + 1, 1)
        self.scale = nn.Parameter(torch.tensor([column.std for column in encoding.numeric]))

    def forward(self, *inputs: Tensor) -> Tensor:
        codes, numeric = inputs[:2]
        return super().forward(torch.cat([self.table(codes[:, 0]), numeric * self.scale], 1))

    def get_model_metadata(self) -> ModelMetadata:
        return super().get_model_metadata().model_copy(update={"inputs": self._inputs})


def build() -> Model:
    return Right()


def build_nothing() -> int:
    return 3


def build_with(width: int) -> Model:
    return Right()


def pipeline_of(model: type[Model], **changes: Any) -> Pipeline:
    values: dict[str, Any] = {
        "name": "encoded",
        "description": "a test's pipeline",
        "source": lambda at: None,
        "features": Features(label="y", classes=3, categorical=("c",), numeric=("a", "b", "d")),
        "model": model,
        "loss": functional.cross_entropy,
        "config": TrainConfig(),
        "metrics": lambda scored: {},
        "gates": (QualityGate(metric="accuracy", minimum=0.5),),
        "metric": "accuracy",
        "margin": 0.0,
        "dated": False,
        "frozen": ("first.*",),
    }
    return Pipeline(**{**values, **changes})


pipeline = pipeline_of(Encoded)
unfit = pipeline_of(Encoded, frozen=("nothing.*",))
instance = Right()
number = 3
