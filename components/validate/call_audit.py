"""What a call of a model did: modules entered, values given, state left behind, answers compared.

Everything here undoes its own hooks and wrappers.
"""

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.validate.contract_report import NoAnswerError, Rows
from components.validate.forward_entries import entries_counted
from components.validate.nests import tensors_in

Footprint = Mapping[tuple[str, str, str], object]
"""Everything a call may leave behind, by (kind, module path, name)."""

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


@dataclass(frozen=True)
class Step:
    """One return of one module, with private copies of the tensors that it took and gave."""

    path: str
    taken: Rows
    given: Rows


def hookable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, without those compiled by TorchScript, which accept no hooks."""
    found = model.named_modules()
    return [(path, m) for path, m in found if not isinstance(m, torch.jit.ScriptModule)]


def count_calls(model: nn.Module, call: Callable[[], object]) -> dict[str, tuple[int, int]]:
    """Per module path: how often its forward was entered, and how often its hooks fired.

    The two differ where forward was called directly. Modules that are read without being called,
    as nn.MultiheadAttention reads the weight of its out_proj, count zero on both sides.
    """
    fired: Counter[str] = Counter()
    modules = hookable(model)
    with ExitStack() as stack:
        entered = stack.enter_context(entries_counted(modules))
        for path, module in modules:
            probe = functools.partial(_count, fired, path)
            stack.callback(module.register_forward_pre_hook(probe).remove)
        call()
    return {path: (entered[path], fired[path]) for path, _ in modules}


def _count(counter: Counter[str], path: str, *_: object) -> None:
    counter[path] += 1


def trace(model: nn.Module, call: Callable[[], object]) -> list[Step]:
    """Steps in the order of return, children first; what came before an exception if one rises."""
    steps: list[Step] = []
    pending: dict[str, list[Rows]] = {}

    def enter(path: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        pending.setdefault(path, []).append(copies((args, kwargs)))

    def leave(path: str, _module: nn.Module, _args: Any, given: Any) -> None:
        steps.append(Step(path, pending[path].pop(), copies(given)))

    with ExitStack() as stack, suppress(NoAnswerError):
        for path, module in hookable(model):
            before, after = (functools.partial(enter, path), functools.partial(leave, path))
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        call()
    return steps


def first_divergence(
    left: Sequence[Step], right: Sequence[Step], same: Callable[[Tensor, Tensor], bool]
) -> str:
    """The first module that took the same in both traces and gave something else, or ``''``."""

    def agree(a: Rows, b: Rows) -> bool:
        return len(a) == len(b) and all(map(same, a, b))

    for a, b in zip(left, right, strict=False):
        if a.path != b.path:
            break
        if agree(a.taken, b.taken) and not agree(a.given, b.given):
            return a.path
    return ""


def first_non_finite(steps: Sequence[Step]) -> str:
    """The first module that made NaN or infinity out of finite values, or else passed it on."""
    bad = [step for step in steps if not all(map(is_finite, step.given))]
    made = [step for step in bad if all(map(is_finite, step.taken))]
    return next((step.path for step in (*made, *bad)), "")


def first_writer(model: nn.Module, rows: Rows, call: Callable[[], object]) -> str:
    """The innermost module that was running when ``rows`` were first seen changed, or ``''``."""
    kept = [row.clone() for row in rows]
    running, writers = [""], list[str]()

    def look() -> None:
        if not all(map(same_bits, rows, kept)):
            writers.append(running[-1])

    def enter(path: str, *_: object) -> None:
        look()
        running.append(path)

    def leave(*_: object) -> None:
        look()
        running.pop()

    with ExitStack() as stack, suppress(NoAnswerError):
        for path, module in hookable(model):
            before = functools.partial(enter, path)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        call()
    return next(iter(writers), "")


def footprint(model: nn.Module) -> Footprint:
    """Private copies of values and gradients, with flags, hooks and the ambient state."""
    seen: dict[tuple[str, str, str], object] = {
        ("ambient", "", "torch random state"): torch.get_rng_state(),
        ("ambient", "", "numpy random state"): numpy_state(),
        ("ambient", "", "python random state"): random.getstate(),
        ("ambient", "", "gradient mode"): torch.is_grad_enabled(),
        ("ambient", "", "default dtype"): torch.get_default_dtype(),
    }
    for index, state in enumerate(cuda_states()):
        seen["ambient", "", f"cuda:{index} random state"] = state
    for path, module in model.named_modules():
        seen["mode", path, "training"] = module.training
        for kind in _HOOKS:
            seen["hooks", path, kind.strip("_")] = tuple(vars(module).get(kind, ()))
        for name, tensor in _own_tensors(module):
            seen["value", path, name] = tensor.detach().clone()
            seen["mode", path, f"{name}.requires_grad"] = tensor.requires_grad
            grad = tensor.grad if tensor.is_leaf else None
            seen["grad", path, f"{name}.grad"] = None if grad is None else grad.detach().clone()
    return seen


def changed(before: Footprint, after: Footprint, *kinds: str) -> dict[str, list[str]]:
    """Names that differ, by module path in the order of the model."""
    found: dict[str, list[str]] = {}
    missing = object()
    for key in {**before, **after}:
        kind, path, name = key
        if kind in kinds and not _equal(before.get(key, missing), after.get(key, missing)):
            found.setdefault(path, []).append(name)
    return found


def restore(model: nn.Module, before: Footprint) -> None:
    """Put values, gradients and training flags back where they differ."""
    for path, module in model.named_modules():
        if module.training != before.get(("mode", path, "training"), module.training):
            module.training = not module.training
        for name, tensor in _own_tensors(module):
            value = before.get(("value", path, name))
            grad = before.get(("grad", path, f"{name}.grad"))
            if isinstance(value, Tensor) and not same_bits(tensor, value):
                tensor.data.copy_(value)
            if tensor.is_leaf and not _equal(grad, tensor.grad):
                tensor.grad = grad if isinstance(grad, Tensor) else None


@contextmanager
def isolated() -> Iterator[None]:
    """Gradients on; random states, gradient mode and default dtype are restored on leaving."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda, dtype = cuda_states(), torch.get_default_dtype()
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
        torch.set_default_dtype(dtype)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes, so that NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.detach().contiguous().reshape(-1) for t in (a, b))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def is_finite(tensor: Tensor) -> bool:
    """True when no element is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())


@dataclass(frozen=True)
class Arrangement:
    """Rows in another company: row ``at[i]`` here is row ``of[i]`` of the first batch."""

    words: str
    rows: Rows
    at: Tensor
    of: Tensor


def arrangements(batches: Sequence[Rows]) -> Iterator[Arrangement]:
    """Rows of the first batch alone, in another order, and beside the rows of other batches."""
    rows, count = batches[0], len(batches[0][0])
    for i in range(min(count, 8)):
        alone = tuple(row[i : i + 1] for row in rows)
        yield Arrangement("when it stands alone", alone, torch.tensor([0]), torch.tensor([i]))
    places = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    moved = tuple(row[places.to(row.device)] for row in rows)
    yield Arrangement("when the rows change places", moved, torch.arange(count), places)
    kept = torch.arange(count // 2)
    for other in batches[1:]:
        if [(r.shape[1:], r.dtype) for r in rows] == [(r.shape[1:], r.dtype) for r in other]:
            mixed = tuple(torch.cat([r[: len(kept)], o]) for r, o in zip(rows, other, strict=True))
            yield Arrangement("when other rows stand beside it", mixed, kept, kept)


def row_change(got: Tensor, want: Tensor, case: Arrangement) -> float:
    """Largest change of a row, given a tensor over ``case.rows`` and one over the first batch."""
    # Tensors without one entry per row are the business of other checks.
    if not got.ndim or not want.ndim:
        return 0.0
    if len(got) != len(case.rows[0]) or len(want) <= int(case.of.max()):
        return 0.0
    return farthest((got[case.at.to(got.device)],), (want[case.of.to(want.device)],))


def same_answers(left: Rows, right: Rows) -> bool:
    """As many tensors, each with the same bits."""
    return len(left) == len(right) and all(map(same_bits, left, right))


def farthest(left: Rows, right: Rows) -> float:
    """Largest absolute difference; NaN equals NaN, and other shapes are infinitely far apart."""
    distances = [0.0]
    for a, b in zip(left, right, strict=False):
        if a.shape != b.shape:
            return float("inf")
        gaps = (a.double() - b.double()).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0)
        distances += [float(gaps.nan_to_num(float("inf")).max())] if gaps.numel() else []
    return max(distances)


def largest(tensor: Tensor) -> float:
    """Largest absolute value; NaN and infinity count as nothing."""
    return float(tensor.detach().nan_to_num(0, 0, 0).abs().max()) if tensor.numel() else 0.0


def copies(nest: Any) -> Rows:
    """Private copies of the tensors of a nest, in order."""
    return tuple(tensor.detach().clone() for tensor in tensors_in(nest))


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_bits(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def numpy_state() -> tuple[object, ...]:
    """NumPy's global random state, fit to be compared."""
    # The array as bytes: arrays have no single truth value to compare by.
    return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in np.random.get_state())


def cuda_states() -> list[Tensor]:
    """Random states of all CUDA devices; none while CUDA is not in use."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if started else []
