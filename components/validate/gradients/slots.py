"""The tensors to verify, once each, and what was read of the loss at one point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.validate.nests import as_real


@dataclass(frozen=True)
class Slot:
    """One tensor to verify: its leaves share storage, so writing the first writes them all."""

    name: str
    leaves: tuple[Tensor, ...]
    aliases: tuple[str, ...] = ()
    pinned_row: int | None = None

    def values(self) -> Tensor:
        """The real view that perturbations are added to."""
        return as_real(self.leaves[0].detach())

    @property
    def size(self) -> int:
        """Number of real elements of `values()`."""
        return self.values().numel()

    def normal(self, generator: torch.Generator) -> Tensor:
        """N(0, I) of the shape of `values()`; zero on an embedding's padding row.

        nn.Embedding documents that padding_idx receives no gradient, so moving it proves nothing.
        """
        here = self.values()
        z = torch.randn(here.shape, generator=generator, dtype=torch.float64, device="cpu").to(here)
        if self.pinned_row is not None:
            z[self.pinned_row] = 0.0
        return z

    def dense(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """Sum over the leaves of their gradients, dense and real; None if no leaf has one.

        A single gradient is not copied, only seen as real numbers.
        """
        total: Tensor | None = None
        for gradient in gradients:
            if gradient is None:
                continue
            full = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
            real = as_real(full)
            total = real if total is None else total + real
        if total is not None and self.pinned_row is not None and total[self.pinned_row].any():
            total = total.clone()
            total[self.pinned_row] = 0.0
        return total


@dataclass(frozen=True)
class Reading:
    """A loss and its gradients at one point, with the errors to expect of repeated losses.

    `magnitude` is the size of the numbers the loss was summed from (|L| unless known better),
    `noise` the spread of identical evaluations, `rounding` the measured effect of last-digit
    changes of the weights. All in units of the loss.
    """

    loss: float
    gradients: dict[str, Tensor | None]
    magnitude: float
    noise: float = 0.0
    rounding: float = 0.0

    def finite_for(self, name: str) -> bool:
        """True when the loss and this slot's gradient hold no NaN and no infinity."""
        gradient = self.gradients[name]
        clean = gradient is None or bool(torch.isfinite(gradient).all())
        return clean and math.isfinite(self.loss)

    @property
    def finite(self) -> bool:
        """True when the loss and every gradient are finite."""
        return math.isfinite(self.loss) and all(map(self.finite_for, self.gradients))


def generator_for(seed: int, *stream: int) -> torch.Generator:
    """A generator of its own for each `seed` and tuple of small integers."""
    mixed = seed
    for number in stream:
        mixed = (mixed * 1_000_003 + number + 17) % 2**63
    return torch.Generator().manual_seed(mixed)


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same elements in the same layout."""
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def slots_of(original: nn.Module, twin: nn.Module) -> list[Slot]:
    """A slot per trainable parameter storage of `original`, on the leaves of its deep copy."""
    pinned = padding_rows(twin)
    copies = dict(twin.named_parameters(remove_duplicate=False))
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in original.named_parameters(remove_duplicate=False):
        if parameter.numel():
            groups.setdefault(storage_key(parameter), []).append(name)
    slots = []
    for names in groups.values():
        leaves = list({id(copies[name]): copies[name] for name in names}.values())
        for leaf in leaves[1:]:
            # A deep copy unties parameters that share storage without being one object.
            leaf.data = leaves[0].data
        if any(leaf.requires_grad for leaf in leaves):
            row = next((pinned[id(leaf)] for leaf in leaves if id(leaf) in pinned), None)
            slots.append(Slot(names[0], tuple(leaves), tuple(names[1:]), row))
    return slots


def padding_rows(model: nn.Module) -> dict[int, int]:
    """padding_idx by id of the embedding table that it is a row of."""
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    return {id(m.weight): m.padding_idx for m in tables if m.padding_idx is not None}
