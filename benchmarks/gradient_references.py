"""The references for verify_gradients: three other checks of the loss as a function of weights.

Each sees a float64 copy of the model through `torch.func.functional_call`, on the first batch, in
the mode that the model is in, from one seed. Tolerances are the defaults of their authors.
None stands for a model that cannot be run in this way.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from faults.campaign import Answer, Subject
from faults.oracle import double_precision, widened, widened_model
from torch import Tensor, nn

SEED = 0
# The slow mode takes two losses per element; more elements than this are left out.
SLOW_ELEMENTS = 800
# Step, tolerance for float64: jax.test_util.check_grads (jax/_src/public_test_util.py).
JAX_STEP, JAX_TOLERANCE = 1e-4, 1e-5


class FailedAlreadyError(Exception):
    """The fast gradcheck has failed and repeats everything in slow mode for its message."""


class Objective(nn.Module):
    """The loss on one batch as a module, so that its weights can be handed in."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model = widened_model(copy.deepcopy(subject.model))
        self._loss, self._batch = subject.loss, widened(subject.batches[0])
        self.calls = 0
        self.limit = math.inf

    def forward(self) -> Tensor:
        """The loss, always from the same random state."""
        self.calls += 1
        if self.calls > self.limit:
            raise FailedAlreadyError
        torch.manual_seed(SEED)
        return self._loss(self.model, self._batch)

    def weights(self) -> dict[str, Tensor]:
        """Independent leaves with the values of all parameters that are trained."""
        return {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def at(self, weights: dict[str, Tensor]) -> Tensor:
        """The loss with these weights."""
        return torch.func.functional_call(self, weights, ())


def gradcheck_slow(subject: Subject) -> Answer | None:
    """torch.autograd.gradcheck of every element; None for models of too many."""
    elements = sum(p.numel() for p in subject.model.parameters())
    return _gradcheck(subject, fast=False) if elements <= SLOW_ELEMENTS else None


def gradcheck_fast(subject: Subject) -> Answer | None:
    """torch.autograd.gradcheck with one random projection per tensor."""
    return _gradcheck(subject, fast=True)


def one_direction(subject: Subject) -> Answer | None:
    """One Gaussian direction over all weights, as in the reverse mode of JAX's check_grads."""
    return _judged(subject, _along_one_direction)


def _gradcheck(subject: Subject, *, fast: bool) -> Answer | None:
    def passes(objective: Objective, weights: dict[str, Tensor]) -> bool:
        # A pass takes two losses per tensor and a few more.
        objective.limit = 2 * len(weights) + 10 if fast else math.inf
        return torch.autograd.gradcheck(
            lambda *values: objective.at(dict(zip(weights, values, strict=True))),
            tuple(weights.values()),
            fast_mode=fast,
            raise_exception=False,
        )

    return _judged(subject, passes)


def _along_one_direction(objective: Objective, weights: dict[str, Tensor]) -> bool:
    generator = torch.Generator().manual_seed(SEED)
    loss = objective.at(weights)
    gradients: Any = [None] * len(weights)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in weights.items()
    }
    with torch.no_grad():
        ahead, behind = (
            float(objective.at({n: w + sign * JAX_STEP * direction[n] for n, w in weights.items()}))
            for sign in (1, -1)
        )
    expected = (ahead - behind) / (2 * JAX_STEP)
    found = sum(
        float((g.conj() * z).sum().real)  # conj: some weights are complex
        for g, z in zip(gradients, direction.values(), strict=True)
        if g is not None
    )
    # Not-a-number fails every comparison, so it counts as a failure here as it does there.
    return abs(found - expected) <= JAX_TOLERANCE * (1 + abs(expected))


def _judged(
    subject: Subject, passes: Callable[[Objective, dict[str, Tensor]], bool]
) -> Answer | None:
    with double_precision():
        objective = Objective(subject)
        alarm, reason = True, ""
        try:
            alarm = not passes(objective, objective.weights())
        except FailedAlreadyError:
            reason = "gradcheck failed"
        except (RuntimeError, ValueError) as error:  # a refusal is an alarm to whoever calls it
            reason = f"{type(error).__name__}: {error}"
        except (AttributeError, TypeError):  # a loss that asks for parameters by name, for example
            return None
    return Answer(alarm, reason=reason, forwards=objective.calls)
