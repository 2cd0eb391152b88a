"""The truth about an injected fault, worked out by autograd on the sound model in float64.

Independent of every detector: no finite differences, no replay, no rules about hooks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from faults.operators import Injection, Loss
from torch import Tensor, nn

# A gradient is at fault from this relative error on; below, rounding could be the reason.
THRESHOLD = 1e-6
# Gradients this much smaller than the whole gradient are rounding (a bias before a batch norm).
ROUNDING = 1e-12
SCALE = 2.0**16
SEED = 0

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """What a report on this injection should say.

    `errors` holds the relative error of each wrong gradient, `tensors` all parameters at fault.
    `undecided` are those whose right gradient is zero but for rounding, such as the bias of an
    attention's keys: to call such a tensor broken or sound is right either way.
    """

    errors: Mapping[str, float]
    tensors: frozenset[str]
    undecided: frozenset[str]
    culprits: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest relative error of a gradient, 0 where all are right."""
        return max(self.errors.values(), default=0.0)


def truth(injection: Injection, loss: Loss, batches: list[Any]) -> Truth | None:
    """The truth about `injection`, or None where nothing is wrong that could be seen.

    None also where the faulty model cannot compute its loss at all, which nobody overlooks, or
    where it computes another one than the sound model, so that no gradients can be compared.
    Converts the injection's models to float64 and leaves gradients in them.
    """
    faulty_loss = injection.loss(loss) if injection.loss else loss
    sound_loss = injection.sound_loss(loss) if injection.sound_loss else loss
    with double_precision():
        faulty = _Subject(injection.model, faulty_loss, batches)
        sound = _Subject(injection.sound, sound_loss, batches) if injection.sound else None
        try:
            errors = _errors(injection, faulty, sound)
            if errors is None or not _effective(injection, faulty, errors):
                return None
            undecided = _without_gradient(sound or faulty) - {*errors, *injection.tensors}
        except _Crash:
            return None
    tensors = frozenset(errors) | frozenset(injection.tensors)
    return Truth(errors, tensors, undecided, injection.culprits)


@contextmanager
def double_precision() -> Iterator[None]:
    """float64 as default, random state that is restored, and no warnings of faulty models."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


class _Crash(Exception):
    """The model does not run."""


class _Subject:
    """A model in float64; every evaluation starts from the same weights, buffers and seed."""

    def __init__(self, model: nn.Module, loss: Loss, batches: list[Any]) -> None:
        self.model = widened_model(model)
        self._loss = loss
        self.batches = [widened(batch) for batch in batches]
        self._start = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def loss(self, batch: Any, *, training: bool) -> Tensor:
        """The loss on one batch, in train or eval mode."""
        self.model.load_state_dict(self._start)
        self.model.train(training)
        torch.manual_seed(SEED)
        try:
            return self._loss(self.model, batch)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise _Crash from error

    def gradients(
        self, batch: Any, *, training: bool, scale: float = 1.0
    ) -> tuple[float, Gradients]:
        """Loss and `.grad` of every parameter, zeros where there is none."""
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self.loss(batch, training=training)
        if loss.requires_grad:
            try:
                (loss * scale).backward()
            except RuntimeError as error:
                raise _Crash from error
        return float(loss.detach()), {
            name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone() / scale
            for name, p in self.model.named_parameters()
        }


def widened_model(model: nn.Module) -> nn.Module:
    """The model itself in float64, with the tensors that it holds outside of its registry."""
    model.double()
    for module in model.modules():
        for held in vars(module).values():
            for value in held if isinstance(held, list) else [held]:
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.data = value.data.double()
    return model


def widened(nest: Any) -> Any:
    """A batch with its floating-point tensors in float64."""
    return _mapped(nest, lambda t: t.double() if t.is_floating_point() else t)


def _mapped(nest: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, dict):
        return {key: _mapped(value, change) for key, value in nest.items()}
    if isinstance(nest, (tuple, list)):
        values = [_mapped(value, change) for value in nest]
        return type(nest)(*values) if hasattr(nest, "_fields") else type(nest)(values)
    return nest


def _errors(
    injection: Injection, faulty: _Subject, sound: _Subject | None
) -> dict[str, float] | None:
    """Relative errors above the threshold, of most batches in one mode; None if losses differ."""
    if sound is None:
        return {}
    worst: dict[str, float] = {}
    for training in (True, False):
        by_batch = []
        for ours, theirs in zip(faulty.batches, sound.batches, strict=True):
            loss, gradients = faulty.gradients(ours, training=training)
            expected, right = sound.gradients(theirs, training=training)
            if injection.effect == "flat":
                by_batch.append(_lost(gradients, right))
                continue
            if not math.isclose(loss, expected, rel_tol=1e-9, abs_tol=1e-12):
                return None
            by_batch.append(relative_errors(gradients, right))
        for name in by_batch[0]:
            found = sorted(errors[name] for errors in by_batch)[len(by_batch) // 2]
            if found > THRESHOLD:
                worst[name] = max(found, worst.get(name, 0.0))
    return worst


def _without_gradient(subject: _Subject) -> frozenset[str]:
    """Tensors whose gradient is zero but for rounding, in both modes."""
    names = frozenset(name for name, _ in subject.model.named_parameters())
    for training in (True, False):
        _, gradients = subject.gradients(subject.batches[0], training=training)
        floor = ROUNDING * size_of(gradients)
        names &= {name for name, g in gradients.items() if float(g.norm()) <= floor}
    return names


def size_of(gradients: Gradients) -> float:
    """Norm of all gradients together."""
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


def relative_errors(gradients: Gradients, right: Gradients) -> dict[str, float]:
    """|g - right| / |right| of every tensor; 1 where g is not finite or right is zero."""
    whole = size_of(right)
    return {
        name: _relative_error(gradients[name], expected, whole) for name, expected in right.items()
    }


def _relative_error(gradient: Tensor, right: Tensor, whole: float) -> float:
    gap = float((gradient - right).norm())
    if not math.isfinite(gap):
        return 1.0
    size = float(right.norm())
    if gap <= ROUNDING * whole:
        return 0.0
    return gap / size if size > ROUNDING * whole else 1.0


def _lost(gradients: Gradients, before: Gradients) -> dict[str, float]:
    """1 for every tensor that had a gradient and has none now, else 0."""
    whole = size_of(before)
    return {
        name: float(float(g.norm()) > ROUNDING * whole and not gradients[name].any())
        for name, g in before.items()
    }


def _effective(injection: Injection, faulty: _Subject, errors: Mapping[str, float]) -> bool:
    effect = injection.effect
    if effect in ("gradient", "flat"):
        return bool(errors)
    if effect == "rows":
        return _rows_differ(faulty)
    if effect == "scale":
        _, once = faulty.gradients(faulty.batches[0], training=True)
        _, scaled = faulty.gradients(faulty.batches[0], training=True, scale=SCALE)
        return max(relative_errors(scaled, once).values()) > THRESHOLD
    if effect == "update":
        return _updates_differ(injection, faulty)
    return effect == "always" or _reached(faulty, injection.culprits[0])


def _rows_differ(subject: _Subject) -> bool:
    """In eval mode, the mean loss of single rows is not the loss of the batch."""
    batch = subject.batches[0]
    whole = float(subject.loss(batch, training=False).detach())
    if not math.isfinite(whole):
        return False
    try:
        rows = [
            float(
                subject.loss(_mapped(batch, lambda t, i=i: t[i : i + 1]), training=False).detach()
            )
            for i in range(_length(batch))
        ]
    except _Crash:
        return True
    return abs(sum(rows) / len(rows) - whole) > THRESHOLD * abs(whole)


def _updates_differ(injection: Injection, subject: _Subject) -> bool:
    """A step from the same weights and gradients ends elsewhere than a sound optimiser's."""
    assert injection.optimizer is not None
    assert injection.sound_optimizer is not None
    start = _weights(subject.model)
    moves = []
    for make in (injection.optimizer, injection.sound_optimizer):
        subject.gradients(subject.batches[0], training=True)
        make(subject.model).step()
        moves.append({n: w - start[n] for n, w in _weights(subject.model).items()})
        with torch.no_grad():
            for name, parameter in subject.model.named_parameters():
                parameter.copy_(start[name])
    return max(relative_errors(*moves).values()) > THRESHOLD


def _weights(model: nn.Module) -> Gradients:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _length(batch: Any) -> int:
    lengths: list[int] = []
    _mapped(batch, lambda t: lengths.append(t.shape[0]) or t)
    return lengths[0]


def _reached(subject: _Subject, path: str) -> bool:
    """Whether the module's forward runs when the loss is computed."""
    module = subject.model.get_submodule(path)
    kind, entries = type(module), []

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entries.append(1)
        return kind.forward(self, *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"forward": counted})
    try:
        subject.loss(subject.batches[0], training=True)
    finally:
        module.__class__ = kind
    return bool(entries)
