"""Models of twelve usual kinds, with metadata: what an export must not refuse.

Ten are the modules into which gradient faults are injected; two more have several inputs and
outputs, and a sequence of any length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from faults.architectures import ARCHITECTURES, TOKENS, WORDS
from torch import Tensor, nn

from components.contract import Arrays, Model, ModelMetadata, TensorSpec

Axes = tuple[str | int, ...]
Outputs = Callable[[Tensor], tuple[Tensor, ...]]


class Wrapped(Model):
    """A plain module as a model; ``answer`` makes the outputs from its logits."""

    def __init__(self, net: nn.Module, metadata: ModelMetadata, answer: Outputs) -> None:
        super().__init__()
        self.net, self.metadata, self.answer = net, metadata, answer

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(*inputs)
        return logits

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.answer(self(*inputs))

    def get_model_metadata(self) -> ModelMetadata:
        return self.metadata


class Pair(Model):
    """Two inputs, of numbers and of codes; three outputs, one of them whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 4)
        self.hidden = nn.Linear(4 + 3 * 4, 8)
        self.head = nn.Linear(8, 3)
        self.score = nn.Linear(8, 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self._hidden(*inputs))

    def _hidden(self, numbers: Tensor, codes: Tensor) -> Tensor:
        return self.hidden(torch.cat([numbers, self.table(codes).flatten(1)], 1)).relu()

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        logits = self(*inputs)
        score = self.score(self._hidden(*inputs)).squeeze(-1)
        return logits.softmax(-1), logits.argmax(-1), score

    def get_model_metadata(self) -> ModelMetadata:
        return describe(
            {"numbers": (4,), "codes": (3,)},
            {"probabilities": (3,), "label": (), "score": ()},
            whole=("codes", "label"),
        )


class Pooling(Model):
    """A GRU over a sequence of any length, pooled by attention whose weights are an output."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(4, 8, batch_first=True, bidirectional=True)
        self.weigh = nn.Linear(16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._pooled(*inputs)[0]

    def _pooled(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.recurrent(steps)
        weights = self.weigh(states).softmax(1)
        return self.head((states * weights).sum(1)), weights.squeeze(-1)

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        logits, weights = self._pooled(*inputs)
        return logits.softmax(-1), weights

    def get_model_metadata(self) -> ModelMetadata:
        return describe(
            {"steps": ("sequence", 4)}, {"probabilities": (3,), "weights": ("sequence",)}
        )


def describe(
    inputs: dict[str, Axes], outputs: dict[str, Axes], *, whole: tuple[str, ...] = ()
) -> ModelMetadata:
    """Metadata from the axes after the batch; names in ``whole`` are int64."""

    def specs(axes: dict[str, Axes]) -> tuple[TensorSpec, ...]:
        kinds = {True: "int64", False: "float32"}
        return tuple(
            TensorSpec.model_validate(
                {"name": n, "dtype": kinds[n in whole], "shape": ("batch", *a)}
            )
            for n, a in axes.items()
        )

    last = next(axes[-1] for axes in outputs.values() if axes)
    classes = tuple(f"class {number}" for number in range(int(last)))
    return ModelMetadata(
        inputs=specs(inputs), outputs=specs(outputs), classes=classes, description="a test's model"
    )


@dataclass(frozen=True)
class Exportable:
    """A model to export; its weights are always the same."""

    name: str
    make: Callable[[], Model]

    def build(self) -> Model:
        """The model in eval mode."""
        torch.manual_seed(0)
        return self.make().eval()


def rows_of(metadata: ModelMetadata, count: int) -> Arrays:
    """Standard normal numbers and codes of words; dynamic axes have different lengths."""
    rng = np.random.default_rng(3)
    names = dict.fromkeys(a for spec in metadata.inputs for _, a in spec.axes if a != "batch")
    lengths = {"batch": count, **{axis: TOKENS - at for at, axis in enumerate(names)}}
    made = {}
    for spec in metadata.inputs:
        shape = [int(size) for size in spec.sized(lengths)]
        whole = spec.dtype == "int64"
        made[spec.name] = rng.integers(0, WORDS, shape) if whole else rng.normal(size=shape)
    return {n: a if a.dtype == np.int64 else a.astype(np.float32) for n, a in made.items()}


def example_of(metadata: ModelMetadata) -> list[Tensor]:
    """Two rows, as tensors in order."""
    return [torch.from_numpy(array) for array in rows_of(metadata, 2).values()]


def _softmax(axis: int) -> Outputs:
    return lambda logits: (logits.softmax(axis),)


def _plain(logits: Tensor) -> tuple[Tensor, ...]:
    return (logits,)


def _with_label(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.softmax(-1), logits.argmax(-1)


_CHANCES: dict[str, Axes] = {"probabilities": (3,)}
_WRAPPED: dict[str, tuple[ModelMetadata, Outputs]] = {
    "mlp": (describe({"numbers": (6,)}, _CHANCES), _softmax(-1)),
    "conv_batchnorm": (
        describe({"image": (1, 8, 8)}, {**_CHANCES, "label": ()}, whole=("label",)),
        _with_label,
    ),
    "residual": (describe({"numbers": (6,)}, {"estimates": (2,)}), _plain),
    "lstm": (describe({"words": ("sequence",)}, _CHANCES, whole=("words",)), _softmax(-1)),
    "transformer": (describe({"words": (TOKENS,)}, _CHANCES, whole=("words",)), _softmax(-1)),
    "tied_embedding": (
        describe({"words": (TOKENS,)}, {"next": (TOKENS, WORDS)}, whole=("words",)),
        _softmax(-1),
    ),
    "mixture": (describe({"numbers": (6,)}, {"estimates": (2,)}), _plain),
    "unet": (describe({"image": (1, 6, 6)}, {"mask": (2, 6, 6)}), _softmax(1)),
    "seq2seq": (
        describe(
            {"source": ("sentence",), "target": ("translation",)},
            {"next": ("translation", WORDS)},
            whole=("source", "target"),
        ),
        _softmax(-1),
    ),
    "cross_attention": (
        describe({"left": ("queries", 4), "right": ("memory", 3)}, {"estimate": (1,)}),
        _plain,
    ),
}


def _wrapped(build: Callable[[], nn.Module], name: str) -> Callable[[], Model]:
    return lambda: Wrapped(build(), *_WRAPPED[name])


EXPORTABLE = (
    *(Exportable(a.name, _wrapped(a.build, a.name)) for a in ARCHITECTURES),
    Exportable("pair", Pair),
    Exportable("pooling", Pooling),
)
