"""Rows for a component that has no data yet: plausible, seeded, and of the declared shapes.

Legend: B = rows of a batch.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from statistics import NormalDist
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from components.contract import Model, TensorSpec
from components.data.encoding import Categorical, Encoding, Features, Folded, Numeric
from components.errors import ContractError
from components.pipeline import Pipeline
from components.train.objective import mean_loss
from components.validate.contract_report import Rows, private_copy
from components.validate.nests import tensors_in
from components.validate.waivers import Waiver, WaiverKind

Batch = tuple[Rows, Any]
"""Inputs, and what the loss compares the answers with."""
Loss = Callable[[nn.Module, Batch], Tensor]
Examples = Callable[[int], Rows]
"""Gives inputs of some number of rows."""

_AXIS = 5
"""Length of every dynamic axis but the batch."""
_VOCABULARY = ("a", "b", "c", "d")
_QUANTILES = tuple(NormalDist().inv_cdf(share / 10) for share in range(1, 10))


@runtime_checkable
class OffersExamples(Protocol):
    """A model that brings example inputs of its own."""

    def example_inputs(self, rows: int) -> tuple[Tensor, ...]:
        """Inputs of ``forward``, in order, each with ``rows`` rows."""
        ...


def synthetic_encoding(features: Features) -> Encoding:
    """An encoding as if it had been fitted: four categories a column, standard normal numbers."""
    return Encoding(
        categorical=tuple(
            Categorical(column=c, vocabulary=_VOCABULARY) for c in features.categorical
        ),
        numeric=tuple(
            Numeric(column=c, mean=0.0, std=1.0, quantiles=_QUANTILES) for c in features.numeric
        ),
        folded=tuple(Folded(column=c, shape=shape) for c, shape in features.tensors.items()),
    )


def examples_of(model: nn.Module, pipeline: Pipeline | None) -> Examples | None:
    """Where a model's inputs come from: itself, its pipeline, or its metadata; None if nowhere.

    Raises:
        Exception: Whatever the model's own ``get_model_metadata`` raises.
    """
    if isinstance(model, OffersExamples):
        return _checked(model)
    if pipeline is not None:
        return _rows_of(synthetic_encoding(pipeline.features).specs(), len(_VOCABULARY) + 1)
    return _rows_of(model.get_model_metadata().inputs, 2) if isinstance(model, Model) else None


def _checked(model: OffersExamples) -> Examples:
    def examples(rows: int) -> Rows:
        given: object = model.example_inputs(rows)
        fits = isinstance(given, tuple) and all(
            isinstance(t, Tensor) and t.ndim and len(t) == rows for t in given
        )
        if not fits or not given:
            raise ContractError(
                f"example_inputs({rows}) must return a tuple of tensors with {rows} rows each; got "
                f"{[tuple(t.shape) for t in tensors_in(given)]} in a {type(given).__name__}."
            )
        return tuple(tensors_in(given))

    return examples


def _rows_of(specs: Sequence[TensorSpec], codes: int) -> Examples:
    """Standard normal numbers, and whole numbers below ``codes``."""

    def examples(rows: int) -> Rows:
        return tuple(_random(spec, rows, codes) for spec in specs)

    return examples


def _random(spec: TensorSpec, rows: int, codes: int) -> Tensor:
    shape = (rows, *(axis if isinstance(axis, int) else _AXIS for axis in spec.shape[1:]))
    return torch.randn(shape) if spec.dtype == "float32" else torch.randint(codes, shape)


def pipeline_batches(pipeline: Pipeline, examples: Examples, sizes: Sequence[int]) -> list[Batch]:
    """Inputs with random labels (B,) int64."""
    return [(examples(n), torch.randint(pipeline.features.classes, (n,))) for n in sizes]


def pipeline_loss(pipeline: Pipeline) -> Loss:
    """The loss that the pipeline trains with, as a mean over the rows."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = batch
        return mean_loss(pipeline.loss(model(*inputs), labels))

    return loss


def pipeline_waivers(pipeline: Pipeline, model: nn.Module) -> tuple[Waiver, ...]:
    """The declared waivers, and one for every parameter that the pipeline freezes by name."""
    frozen = tuple(
        Waiver(tensor=name, kind=WaiverKind.FROZEN, reason="declared in the pipeline's frozen")
        for name, _ in model.named_parameters()
        if any(fnmatchcase(name, pattern) for pattern in pipeline.frozen)
    )
    return (*pipeline.waivers, *frozen)


def declared_waivers(model: nn.Module) -> tuple[Waiver, ...]:
    """Waivers that a class without a pipeline declares in its attribute ``waivers``.

    Raises:
        ContractError: The attribute holds something else.
    """
    waivers: object = getattr(type(model), "waivers", ())
    if not isinstance(waivers, tuple) or not all(isinstance(w, Waiver) for w in waivers):
        raise ContractError(
            f"{type(model).__name__}.waivers must be a tuple of Waiver; got {waivers!r}."
        )
    return waivers


def distance_batches(model: nn.Module, examples: Examples, sizes: Sequence[int]) -> list[Batch]:
    """Inputs with random targets of the shapes that the model answers with."""
    probe = private_copy(model).eval()
    batches = []
    for rows in sizes:
        inputs = examples(rows)
        with torch.no_grad():
            answers = _numbers(probe(*(tensor.clone() for tensor in inputs)))
        batches.append((inputs, tuple(torch.randn(t.shape) for t in answers)))
    return batches


def distance_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared distance of every answer from its target, summed up."""
    inputs, targets = batch
    pairs = zip(_numbers(model(*inputs)), targets, strict=False)
    return torch.stack([(answer - target).square().mean() for answer, target in pairs]).sum()


def _numbers(answer: object) -> list[Tensor]:
    return [tensor for tensor in tensors_in(answer) if tensor.is_floating_point()]
