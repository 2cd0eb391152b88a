"""Parts of a batch evaluated alone, and which of their tensors are the same rows.

Legend: B = rows of the whole batch, b = rows of a part.
"""

from __future__ import annotations

import inspect
import random
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from components.validate.call_audit import (
    Step,
    copies,
    cuda_states,
    hookable,
    numpy_state,
    trace,
)
from components.validate.contract_report import Finding, NoAnswerError, Rows
from components.validate.gradients.twin import Twin
from components.validate.nests import is_differentiable

# Largest change of an output that another batch size may bring, relative to its largest element:
# matrix products of another shape round differently. The second is for numbers below float64.
_OUTPUT_BOUND, _LOWERED_BOUND = 1e-9, 1e-2


@dataclass(frozen=True)
class OuterCall:
    """One call of a module from outside of all modules; `drew` if it drew random numbers."""

    path: str
    taken: Rows
    given: Rows
    drew: bool


@dataclass
class Part:
    """An evaluation of some rows of a batch of `count`: what came of it, or what ended it.

    `projections` keep each slot's gradient in two numbers: its product with a direction that is
    the same for all parts, and its norm.
    """

    rows: slice
    count: int
    loss: float = 0.0
    calls: list[OuterCall] = field(default_factory=list)
    error: Exception | None = None
    projections: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Rows in this part."""
        return len(range(self.count)[self.rows])


@contextmanager
def outer_calls(model: nn.Module) -> Iterator[list[OuterCall]]:
    """Record the calls of modules that the loss makes itself, outermost only.

    That is the model, or, where the loss calls other methods of it, the modules called by those.
    """
    calls: list[OuterCall] = []
    running: list[nn.Module] = []
    pending: list[tuple[Rows, object]] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not running and not _in_backward():
            pending[:] = [(copies((args, kwargs)), _random_state())]
        running.append(module)

    def leave(path: str, module: nn.Module, _args: Any, given: Any) -> None:
        # Modules above have ended by an exception, which this one caught.
        while running and running.pop() is not module:
            pass
        if not running and pending:
            taken, state = pending.pop()
            outputs = tuple(t for t in copies(given) if is_differentiable(t))
            calls.append(OuterCall(path, taken, outputs, state != _random_state()))

    with ExitStack() as stack:
        for path, module in hookable(model):
            before = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(partial(leave, path)).remove)
        yield calls


def evaluated(twin: Twin, batch: int, rows: slice, count: int) -> Part:
    """Loss, outer calls and projected gradients of these rows; an exception is kept, not raised."""
    part = Part(rows, count)
    twin.clear_gradients()
    with outer_calls(twin.model) as part.calls:
        try:
            part.loss = twin.backward(batch, rows=rows)
        except Exception as error:  # noqa: BLE001  judged later, whatever the user's code raises
            part.error = error
    if part.error is None:
        part.projections = projections(twin, {s.name: twin.gradient(s) for s in twin.slots})
    twin.clear_gradients()
    return part


def projections(
    twin: Twin, gradients: Mapping[str, Tensor | None]
) -> dict[str, tuple[float, float]]:
    """Product with a fixed Gaussian direction, and norm, per slot."""
    found = {}
    for index, slot in enumerate(twin.slots):
        gradient = gradients[slot.name]
        if gradient is None:
            found[slot.name] = (0.0, 0.0)
            continue
        direction = slot.normal(torch.Generator().manual_seed(index))
        found[slot.name] = (float((gradient * direction).sum()), float(gradient.norm()))
    return found


def traced(twin: Twin, rows: slice) -> list[Step]:
    """Every call of a module on these rows of batch 0, up to an exception if one rises."""

    def call() -> None:
        try:
            twin.backward(0, rows=rows)
        except Exception as error:
            raise NoAnswerError(Finding(str(error))) from error

    steps = trace(twin.model, call)
    twin.clear_gradients()
    return steps


def raised_in(model: nn.Module, part: Part) -> str | None:
    """Path of the innermost module on the stack of the part's exception; None if there is none."""
    if part.error is None:
        return None
    paths = {id(module): path for path, module in model.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(part.error.__traceback__):
        code = frame.f_code
        if code.co_argcount:
            # A method's first argument is its module, but so may be that of a loss.
            owner = frame.f_locals.get(code.co_varnames[0])
            if id(owner) in paths and _is_method(type(owner), code):
                found = paths[id(owner)]
    return found


def _is_method(kind: type, code: CodeType) -> bool:
    method = inspect.unwrap(getattr(kind, code.co_name, None) or _is_method)
    return getattr(method, "__code__", None) is code


def output_bound(twin: Twin) -> float:
    """Relative difference that rounding may make between outputs for the same rows."""
    return _LOWERED_BOUND if twin.lowered else _OUTPUT_BOUND


def took_same(whole: Rows, cut: Rows, part: Part, bound: float) -> bool:
    """True when each tensor of `cut` is that of `whole`, or the part's rows of it."""
    if len(whole) != len(cut):
        return False
    for a, b in zip(whole, cut, strict=True):
        change = _difference(a, b, a) if a.shape == b.shape else row_change(a, b, part)
        if change is None or change > bound:
            return False
    return True


def row_change(whole: Tensor, cut: Tensor, part: Part) -> float | None:
    """Largest difference of `cut` from the part's rows of `whole`, relative to its size.

    None where the shapes do not say which rows these are. They lie along the one axis that
    differs, (B m) in `whole` and (b m) in `cut`: row by row, or, as in time-major sequences and
    stacked views, (m B) and (m b). The closer of the two readings counts.
    """
    axes = [i for i, (a, b) in enumerate(zip(whole.shape, cut.shape, strict=False)) if a != b]
    if whole.ndim != cut.ndim or len(axes) != 1:
        return None
    axis = axes[0]
    each, rest = divmod(whole.shape[axis], part.count)
    if rest or not each or cut.shape[axis] != each * part.size:
        return None
    start = range(part.count)[part.rows].start
    by_row = whole.narrow(axis, start * each, part.size * each)
    apart = torch.unflatten(whole, axis, (each, part.count)).narrow(axis + 1, start, part.size)
    readings = (by_row, apart.flatten(axis, axis + 1))
    return min(_difference(rows, cut, whole) for rows in readings)


def _difference(rows: Tensor, cut: Tensor, whole: Tensor) -> float:
    if rows.dtype != cut.dtype:
        return torch.inf
    if not rows.numel():
        return 0.0
    if not is_differentiable(rows):
        return float(not torch.equal(rows, cut))
    gap = (rows - cut).abs().masked_fill((rows == cut) | (rows.isnan() & cut.isnan()), 0)
    size = float(whole.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return float(gap.nan_to_num(torch.inf, torch.inf).max()) / (size or 1.0)


def _in_backward() -> bool:
    # Checkpointed segments call their modules again there.
    return int(torch._C._current_graph_task_id()) != -1


def _random_state() -> tuple[object, ...]:
    states = [torch.get_rng_state(), *cuda_states()]
    return (random.getstate(), numpy_state(), *(state.numpy().tobytes() for state in states))
