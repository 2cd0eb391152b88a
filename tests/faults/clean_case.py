"""What one clean model is, and what the files of clean models share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.validate.waivers import Waiver, WaiverKind

ROWS = 4


@dataclass(frozen=True)
class Clean:
    """A correct model on which every alarm is a false one.

    What it does on purpose against the rules of ordinary training is declared in `waivers`.
    """

    name: str
    build: Callable[[], nn.Module]  # uses torch's global random state: the caller seeds it
    batches: Callable[[int], list[Any]]  # seed -> three small batches
    loss: Callable[[nn.Module, Any], Tensor]
    waivers: tuple[Waiver, ...] = ()


def waive(tensor: str, kind: str, reason: str) -> Waiver:
    return Waiver(tensor=tensor, kind=WaiverKind(kind), reason=reason)


def three(make: Callable[[torch.Generator], Any]) -> Callable[[int], list[Any]]:
    """Three batches drawn one after the other from one seed."""

    def batches(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        return [make(generator) for _ in range(3)]

    return batches


def vectors(*shapes: tuple[int, ...]) -> Callable[[int], list[Any]]:
    """Batches of normal numbers, a tensor (ROWS, *shape) for each shape."""
    return three(lambda g: tuple(torch.randn(ROWS, *shape, generator=g) for shape in shapes))


def labelled(classes: int, *shape: int) -> Callable[[int], list[Any]]:
    """Batches of (inputs (ROWS, *shape), labels (ROWS,))."""
    return three(
        lambda g: (
            torch.randn(ROWS, *shape, generator=g),
            torch.randint(classes, (ROWS,), generator=g),
        )
    )


def words(count: int, *shape: int) -> Callable[[int], list[Any]]:
    """Batches of whole numbers (ROWS, *shape) below `count`."""
    return three(lambda g: torch.randint(count, (ROWS, *shape), generator=g))


def labelled_words(count: int, classes: int, length: int) -> Callable[[int], list[Any]]:
    """Batches of (words (ROWS, length), labels (ROWS,))."""
    return three(
        lambda g: (
            torch.randint(count, (ROWS, length), generator=g),
            torch.randint(classes, (ROWS,), generator=g),
        )
    )


def classify(model: nn.Module, batch: Any) -> Tensor:
    *inputs, label = batch
    return functional.cross_entropy(model(*inputs), label)


def regress(model: nn.Module, batch: Any) -> Tensor:
    *inputs, target = batch
    return functional.mse_loss(model(*inputs), target)


def next_word(model: nn.Module, sentence: Tensor) -> Tensor:
    return functional.cross_entropy(model(sentence[:, :-1]).transpose(1, 2), sentence[:, 1:])
