"""A private float64 copy of a model on which losses and gradients can be taken freely."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from components.validate.gradients.hooks import Hooks, is_hooked, same_values
from components.validate.gradients.precision import PrecisionWatch, WidenConstants
from components.validate.gradients.random_state import kept_random_state, seed_everything
from components.validate.gradients.slots import Reading, Slot, slots_of
from components.validate.gradients.spectral import settle_spectral_norms
from components.validate.nests import (
    as_real,
    common_rows,
    is_differentiable,
    map_tensors,
    stray_tensors,
    tensors_in,
    widened,
)

_OTHER_PRECISION = re.compile(r"dtype|scalar type|Double|Float")

LossFn = Callable[[nn.Module, Any], Tensor]


class Twin:
    """Copy of (model, batches); every evaluation is reseeded and leaves no trace in buffers.

    `native` means that the model could not run in float64 and is checked in its own precision.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], seed: int, *, native: bool
    ) -> None:
        self.native = native
        self.lowered = native
        self.forwards = 0
        self.backwards = 0
        self.rewritten: set[str] = set()
        self._loss_fn = loss_fn
        self._seed = seed
        self.model, memo = _deep_copy(model)
        if not native:
            _widen_in_place(self.model)
        settle_spectral_norms(self.model)
        self.slots: list[Slot] = slots_of(model, self.model)
        given: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        if is_hooked(model):
            # A hook may write to the model that it closes over.
            given = {name: p.detach().clone() for name, p in given.items()}
        self._given = {slot.name: given[slot.name].detach() for slot in self.slots}
        of_slots = {name for slot in self.slots for name in (slot.name, *slot.aliases)}
        self._frozen = [
            (name, copied, given[name].detach())
            for name, copied in self.model.named_parameters()
            if not copied.requires_grad and name not in of_slots
        ]
        self._hooks = Hooks(self.model, _pairs(model, self.model), memo)
        self._batches = [_private_batch(batch, native=native) for batch in batches]
        self._buffers = _registered_buffers(self.model)
        self._odd_modes = [m for m in self.model.modules() if m.training != self.model.training]
        self._cuda = sorted({t.device for t in self._all_tensors() if t.is_cuda}, key=str)

    def set_mode(self, training: bool) -> None:
        """Train or eval, except for modules that were given in another mode than the model."""
        odd = [(module, module.training) for module in self._odd_modes]
        self.model.train(training)
        for module, flag in odd:
            module.training = flag

    def value(self, batch: int) -> float:
        """The loss on batch number `batch`; one forward. Autograd stays on, as in training."""
        with self._evaluating(batch):
            return float(self._loss(batch).detach())

    def backward(self, batch: int, *, rows: slice | None = None, scale: float = 1.0) -> float:
        """One forward and backward of `scale` times the loss; adds into the twin's `.grad`.

        `rows` takes these rows of every tensor of the batch. Returns the loss without the scale.
        """
        with self._evaluating(batch):
            loss = self._loss(batch, rows)
            self.backwards += 1
            if loss.requires_grad:
                torch.autograd.backward(loss if scale == 1.0 else loss * scale)
            return float(loss.detach())

    def reading(self, batch: int, *, keep: bool = False) -> Reading:
        """Loss and fresh gradients of every slot on batch number `batch`.

        The gradients are taken over from `.grad`, which is left empty; with `keep` they are copied
        and `.grad` stays in place.
        """
        self.clear_gradients()
        watch = PrecisionWatch()
        with watch:
            loss = self.backward(batch)
        self.lowered = self.lowered or watch.lowered
        if keep:
            return Reading(loss, self.gradients(), magnitude=abs(loss))
        gradients = {slot.name: self.gradient(slot) for slot in self.slots}
        self.clear_gradients()
        return Reading(loss, gradients, magnitude=abs(loss))

    def gradient(self, slot: Slot) -> Tensor | None:
        """What `.grad` holds now for one slot; may share its memory."""
        return slot.dense([leaf.grad for leaf in slot.leaves])

    def gradients(self) -> dict[str, Tensor | None]:
        """Copies of what `.grad` holds now, per slot."""
        found = {slot.name: self.gradient(slot) for slot in self.slots}
        return {name: None if g is None else g.clone() for name, g in found.items()}

    def clear_gradients(self) -> None:
        """Set `.grad` of every slot to None, without the model's own zero_grad."""
        for slot in self.slots:
            for leaf in slot.leaves:
                leaf.grad = None

    def rows(self, batch: int) -> int | None:
        """Length of the first axis that all tensors of that batch share; None if they do not."""
        return common_rows(self._batches[batch])

    def joined(self, one: int, other: int) -> int | None:
        """Number of a batch of the rows of both; None where their tensors do not fit together."""
        first, second = self._batches[one], self._batches[other]
        if common_rows(first) is None or common_rows(second) is None:
            return None
        rest = list(tensors_in(second))
        shapes = [tensor.shape[1:] for tensor in tensors_in(first)]
        if shapes != [tensor.shape[1:] for tensor in rest]:
            return None
        following = iter(rest)
        self._batches.append(
            map_tensors(first, lambda tensor: torch.cat([tensor, next(following)]))
        )
        return len(self._batches) - 1

    @property
    def has_hooks(self) -> bool:
        """True when a backward pass runs hooks of parameters or modules."""
        return self._hooks.present

    def hooks_off(self) -> AbstractContextManager[None]:
        """Inside, backward passes run no hooks of parameters and modules."""
        return self._hooks.off()

    @contextmanager
    def _evaluating(self, batch: int) -> Iterator[None]:
        with self.isolated():
            try:
                yield
            except Exception as error:
                mode = "train" if self.model.training else "eval"
                error.add_note(f"while gradients were verified: batch {batch}, {mode} mode")
                raise

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Seeded random state, math attention, float64 default; buffers restored on leaving."""
        default = torch.get_default_dtype()
        written = any(slot.name in self.rewritten for slot in self.slots)
        weights = self._weights() if written else []
        with ExitStack() as stack:
            stack.enter_context(kept_random_state(self._cuda))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            for kind in {"cpu", *(d.type for d in self._cuda)}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            try:
                seed_everything(self._seed, self._cuda)
                if not self.native:
                    torch.set_default_dtype(torch.float64)
                    stack.enter_context(WidenConstants())
                yield
            finally:
                torch.set_default_dtype(default)
                self._restore_buffers()
                for values, kept in weights:
                    values.copy_(kept)
                for name, copied, given in self._frozen:
                    if name in self.rewritten:
                        copied.data.copy_(given)

    def note_rewrites(self) -> bool:
        """Find parameters that an evaluation wrote to, undo it, and from now on undo it every time.

        True if there are any that were not known before.
        """
        known = len(self.rewritten)
        for slot in self.slots:
            values = self._given_values(slot)
            if not same_values(slot.values(), values):
                self.rewritten.add(slot.name)
                slot.values().copy_(values)
        for name, copied, given in self._frozen:
            if not same_values(copied.detach(), given.to(copied.dtype)):
                self.rewritten.add(name)
                copied.data.copy_(given)
        return len(self.rewritten) > known

    def reset(self, slot: Slot) -> None:
        """Give a slot the values that the model was given with."""
        slot.values().copy_(self._given_values(slot))

    def _given_values(self, slot: Slot) -> Tensor:
        # Widened each time: a copy would cost as much memory as the twin.
        given = self._given[slot.name]
        return as_real(given if self.native else widened(given))

    def _weights(self) -> list[tuple[Tensor, Tensor]]:
        return [(slot.values(), slot.values().clone()) for slot in self.slots]

    def _loss(self, batch: int, rows: slice | None = None) -> Tensor:
        self.forwards += 1
        change = _fresh if rows is None else lambda tensor: _fresh(tensor[rows])
        loss = self._loss_fn(self.model, map_tensors(self._batches[batch], change))
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise ValueError(
                "loss_fn must return one real floating-point number as a tensor; got "
                f"{_described(loss)}. Reduce the loss with .mean() or .sum()."
            )
        return loss.reshape(())

    def _restore_buffers(self) -> None:
        for module, name, tensor, kept in self._buffers:
            tensor.data.copy_(kept)
            # nn.Module.register_buffer semantics without its name checks: forward may rebind.
            module._buffers[name] = tensor

    def _all_tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from tensors_in(self._batches)


def build_twin(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], seed: int
) -> tuple[Twin, Reading]:
    """A twin in train mode and its first reading; `.grad` holds the gradients still.

    In float64, or in the model's own precision when hard-coded float32 makes float64 impossible.
    """
    twin = Twin(model, loss_fn, batches, seed, native=False)
    try:
        return twin, _first_reading(twin)
    except RuntimeError as error:
        if not needs_native(twin, error):
            raise
    return build_native_twin(model, loss_fn, batches, seed, twin)


def build_native_twin(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], seed: int, failed: Twin
) -> tuple[Twin, Reading]:
    """The same in the model's own precision, after `failed` could not run in float64."""
    native = Twin(model, loss_fn, batches, seed, native=True)
    native.forwards, native.backwards = failed.forwards, failed.backwards
    return native, _first_reading(native)


def needs_native(twin: Twin, error: RuntimeError) -> bool:
    """True when a float64 twin raised this because float32 is hard-coded in the model."""
    return not twin.native and bool(_OTHER_PRECISION.search(str(error)))


def _first_reading(twin: Twin) -> Reading:
    twin.set_mode(True)
    reading = twin.reading(0, keep=True)
    # Weights changed under this reading; the next one is protected.
    return twin.reading(0, keep=True) if twin.note_rewrites() else reading


def _pairs(model: nn.Module, twin: nn.Module) -> list[tuple[Tensor, Tensor]]:
    copies = dict(twin.named_parameters())
    return [(p, copies[name]) for name, p in model.named_parameters() if name in copies]


def _deep_copy(model: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """The copy, and the memo that leads from the model's objects to the copy's."""
    held = [*model.buffers(), *(stray.tensor for stray in stray_tensors(model))]
    # deepcopy refuses results of a computation, such as an activation kept by the last forward.
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if not t.is_leaf}
    try:
        # With a graph, copies of modules compiled by TorchScript would hold no leaves.
        with torch.no_grad():
            copied = copy.deepcopy(model, memo)
        for given, own in _pairs(model, copied):
            own.requires_grad_(given.requires_grad)
        return copied, memo
    except Exception as error:
        raise ValueError(
            "model must survive copy.deepcopy, because it is verified on a copy; "
            f"{type(model).__name__} raised {type(error).__name__}: {error}. "
            "Remove locks, handles and graph-bound tensors from its attributes."
        ) from error


def _widen_in_place(model: nn.Module) -> None:
    strays = [stray.tensor for stray in stray_tensors(model)]
    for tensor in (*model.parameters(), *model.buffers(), *strays):
        tensor.grad = None
        if is_differentiable(tensor):
            tensor.data = widened(tensor.data)


def _registered_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    return [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


def _private_batch(batch: Any, *, native: bool) -> Any:
    return map_tensors(batch, _fresh if native else lambda tensor: _fresh(tensor, widen=True))


def _fresh(tensor: Tensor, *, widen: bool = False) -> Tensor:
    copied = tensor.detach().clone()
    return (widened(copied) if widen else copied).requires_grad_(tensor.requires_grad)


def _described(loss: Any) -> str:
    if isinstance(loss, Tensor):
        return f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
    return f"{type(loss).__name__}"
