"""Faults of a training step: rows that interact, losses, zero_grad and optimisers."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from faults.operators import (
    Effect,
    Inject,
    Injection,
    Loss,
    MakeOptimizer,
    Operator,
    at_output,
    pick,
)
from torch import Tensor, nn


def zero_grad_disabled(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """The model's zero_grad does nothing."""
    kind = type(model)

    def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
        return None

    model.__class__ = type(kind.__name__, (kind,), {"zero_grad": zero_grad})
    return Injection(model, None, ("",), "always")


def zero_grad_forgets(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """The model's zero_grad leaves out one tensor."""
    name = pick(generator, [name for name, _ in model.named_parameters()])
    if name is None:
        return None
    kind = type(model)

    def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
        for key, parameter in self.named_parameters():
            if key != name:
                parameter.grad = None

    model.__class__ = type(kind.__name__, (kind,), {"zero_grad": zero_grad})
    return Injection(model, None, ("",), "always")


def loss_over_rows(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """The loss, a mean already, is divided by the number of rows once more."""

    def wrap(loss: Loss) -> Loss:
        return lambda module, batch: loss(module, batch) / rows_in(batch)

    return Injection(model, None, (), "always", loss=wrap)


def loss_over_itself(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """The loss is divided by a detached value of its own."""

    def wrap(loss: Loss) -> Loss:
        return lambda module, batch: _compressed(loss(module, batch), torch.Tensor.detach)

    def sound(loss: Loss) -> Loss:
        return lambda module, batch: _compressed(loss(module, batch), lambda value: value)

    copied = copy.deepcopy(model)
    return Injection(model, copied, (), loss=wrap, sound_loss=sound)


def _compressed(loss: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    return loss / (1 + read(loss))


def rows_in(batch: Any) -> int:
    """Length of the first axis of the first tensor in a batch."""
    first = next(_tensors(batch))
    return first.shape[0]


def _tensors(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    else:
        for value in nest.values() if isinstance(nest, dict) else nest:
            yield from _tensors(value)


class Forgetful(torch.optim.SGD):
    """Updates all tensors but one."""

    forgotten = 0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        held = [p for group in self.param_groups for p in group["params"]][self.forgotten]
        gradient, held.grad = held.grad, None
        result = super().step(closure)
        held.grad = gradient
        return result


class Hasty(torch.optim.AdamW):
    """Moves every tensor 5 % further than AdamW says."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        result = super().step(closure)
        for parameter, start in zip(parameters, before, strict=True):
            parameter.add_(0.05 * (parameter - start))
        return result


class Keeping(torch.optim.SGD):
    """Its zero_grad does nothing."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        return None


class Clipping(torch.optim.SGD):
    """Clips the gradients by itself before every update."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1e-3)
        return super().step(closure)


def optimised_by(make: MakeOptimizer, sound: MakeOptimizer, effect: Effect = "update") -> Inject:
    """A faulty optimiser; no module of the model is to blame."""

    def inject(model: nn.Module, generator: torch.Generator) -> Injection | None:
        return Injection(model, None, (), effect, optimizer=make, sound_optimizer=sound)

    return inject


def optimizer_skips(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """The optimiser leaves out one of its tensors."""
    number = pick(generator, range(len(list(model.parameters()))))

    def make(held: nn.Module) -> torch.optim.Optimizer:
        optimizer = Forgetful(held.parameters(), lr=0.1)
        optimizer.forgotten = number or 0
        return optimizer

    return optimised_by(make, sgd)(model, generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def optimizer_misses(model: nn.Module, generator: torch.Generator) -> Injection | None:
    """The optimiser was built without one parameter."""
    name = pick(generator, [name for name, _ in model.named_parameters()])
    if name is None:
        return None

    def make(held: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for key, p in held.named_parameters() if key != name], lr=0.1)

    return Injection(model, None, (), "always", optimizer=make)


def _shared(self: nn.Module, y: Tensor) -> Tensor:
    return y + 0.1 * y.mean(0, keepdim=True)


def _standardised(self: nn.Module, y: Tensor) -> Tensor:
    return (y - y.mean(0)) / (1 + y.std(0, unbiased=False))


def _attending(self: nn.Module, y: Tensor) -> Tensor:
    flat_BF = y.flatten(1)
    weights_BB = (flat_BF @ flat_BF.T / flat_BF.shape[1] ** 0.5).softmax(-1)
    return (weights_BB @ flat_BF).reshape(y.shape)


def _neighbour(self: nn.Module, y: Tensor) -> Tensor:
    return y + 0.01 * y.roll(1, 0)


def _squeezed(self: nn.Module, y: Tensor) -> Tensor:
    return y.squeeze(0)


def _single_row(self: nn.Module, y: Tensor) -> Tensor:
    return 0.9 * y if y.shape[0] == 1 else y


STEP = (
    Operator("rows_share_their_mean", "step", at_output(_shared, _shared, "rows")),
    Operator("rows_standardised", "step", at_output(_standardised, _standardised, "rows")),
    Operator("rows_attend", "step", at_output(_attending, _attending, "rows")),
    Operator("row_sees_neighbour", "step", at_output(_neighbour, _neighbour, "rows")),
    Operator("squeezed_at_one_row", "step", at_output(_squeezed, _squeezed, "rows")),
    Operator("other_at_one_row", "step", at_output(_single_row, _single_row, "rows")),
    Operator("zero_grad_disabled", "step", zero_grad_disabled),
    Operator("zero_grad_forgets", "step", zero_grad_forgets),
    Operator("loss_divided_by_rows", "step", loss_over_rows),
    Operator("loss_divided_by_detached", "wrong_gradient", loss_over_itself),
    Operator("optimizer_misses_parameter", "step", optimizer_misses),
    Operator("optimizer_skips_update", "step", optimizer_skips),
    Operator(
        "optimizer_goes_too_far",
        "step",
        optimised_by(lambda model: Hasty(model.parameters(), lr=0.01), adamw),
    ),
    Operator(
        "optimizer_keeps_gradients",
        "step",
        optimised_by(lambda model: Keeping(model.parameters(), lr=0.1), sgd, "always"),
    ),
    Operator(
        "optimizer_clips",
        "step",
        optimised_by(lambda model: Clipping(model.parameters(), lr=0.1), sgd),
    ),
)
