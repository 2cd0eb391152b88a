"""Rows of a batch must not interact: a batch cut in two gives each row what the whole gave it.

In eval mode the first row and the remaining ones are evaluated apart. The model's outputs for a
row may not depend on the other rows, one row alone must be accepted, and where the loss is a mean
or a sum over rows, so must be its gradient: otherwise micro-batches of unequal size accumulate to
something else than the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from components.validate.call_audit import Step
from components.validate.gradients.lint import (
    StepFinding,
    common_module,
    covers,
    finding,
    label,
    listed,
)
from components.validate.gradients.parts import (
    OuterCall,
    Part,
    evaluated,
    output_bound,
    projections,
    raised_in,
    row_change,
    took_same,
    traced,
)
from components.validate.gradients.slots import Reading, Slot
from components.validate.gradients.twin import Twin
from components.validate.waivers import Waiver, WaiverKind

_SPLITS = (slice(0, 1), slice(1, None))
# How far a loss may be from its rows' mean or sum, and, relative to the norms summed, a gradient
# along one direction. The last is for both where numbers below float64 are inside.
_LOSS_BOUND, _GRADIENT_BOUND, _LOWERED_BOUND = 1e-9, 1e-7, 1e-2
# A weighted mean may be within a percent of the mean by chance, so losses are held to float32.
_LOWERED_LOSS_BOUND = 1e-5
# Share of the largest gradient norm that may be rounding: a key's bias in attention, or one before
# a normalisation, has a gradient that is zero but for it.
_ROUNDING_SHARE = 1e-11
# Waivers of tensors whose gradient is not the derivative of the loss on purpose.
_UNTRUE = frozenset({WaiverKind.HOOK, WaiverKind.SURROGATE, WaiverKind.STOP_GRADIENT})
_TWICE = "mean, divided by the number of rows"
_NAMES = ("rows_independent", "batch_sizes", "accumulation_unequal")


def row_checks(
    twin: Twin, whole: Reading, calls: Sequence[OuterCall], waivers: Sequence[Waiver]
) -> list[StepFinding]:
    """Three checks on batch 0 in the twin's present mode: rows, batch sizes, accumulation.

    `whole` and `calls` are the reading of the whole batch. Two forwards and backwards where the
    batch can be cut; more after a disagreement.
    """
    count = twin.rows(0)
    if count is None or count < 2:
        why = "not applicable: the batch's tensors do not share a first axis of two rows or more"
        return [finding(name, why) for name in _NAMES]
    parts = [evaluated(twin, 0, rows, count) for rows in _SPLITS]
    excuses = [w for w in waivers if w.kind is WaiverKind.ROWS]
    return [
        _independence(twin, calls, parts, excuses),
        _sizes(twin, calls, parts, excuses),
        _accumulation(twin, whole, parts, waivers),
    ]


def _independence(
    twin: Twin, calls: Sequence[OuterCall], parts: Sequence[Part], excuses: Sequence[Waiver]
) -> StepFinding:
    name, compared = "rows_independent", 0
    for part in parts:
        leak, agreeing = _compared(calls, part, output_bound(twin))
        compared += agreeing
        if leak is None:
            continue
        path, change = leak
        culprit = _first_mixer(twin, part)
        culprit = path if culprit is None else culprit
        used = [w for w in excuses if fnmatchcase(culprit, w.tensor)]
        detail = (
            f"in eval mode the output of {label(twin.model, path)} for a row changes by "
            f"{change:.1e} of its size when the batch's other rows are absent; they first meet in "
            f"{label(twin.model, culprit)}; "
        ) + ("waived" if used else "keep rows apart or waive it with kind 'rows'")
        return finding(name, detail, passed=bool(used), culprit=culprit, in_use=used)
    if compared:
        return finding(name, "in eval mode outputs for a row do not depend on the other rows")
    return finding(
        name,
        "not applicable: no output has an entry per row for equal inputs (the loss changes the "
        "inputs, random numbers in eval mode, or a first axis that is not the batch)",
    )


def _compared(
    calls: Sequence[OuterCall], part: Part, bound: float
) -> tuple[tuple[str, float] | None, int]:
    """The first call that gives a row something else (path, relative change); outputs that agree.

    Only calls that took the same are compared: a loss may draw noise or pair rows by itself.
    """
    agreeing = 0
    for whole, cut in zip(calls, part.calls, strict=False):
        if whole.path != cut.path or not took_same(whole.taken, cut.taken, part, bound):
            break
        if whole.drew or cut.drew or len(whole.given) != len(cut.given):
            continue
        for a, b in zip(whole.given, cut.given, strict=True):
            change = row_change(a, b, part)
            if change is None or not bool(torch.isfinite(a).all()):
                continue
            if change > bound:
                return (whole.path, change), agreeing
            agreeing += 1
    return None, agreeing


def _first_mixer(twin: Twin, part: Part) -> str | None:
    """Path of the first module that takes the same for the rows and gives something else."""
    bound = output_bound(twin)
    for a, b in zip(traced(twin, slice(None)), traced(twin, part.rows), strict=False):
        if a.path != b.path:
            break
        if len(a.given) == len(b.given) and took_same(a.taken, b.taken, part, bound):
            changes = (row_change(x, y, part) for x, y in zip(a.given, b.given, strict=True))
            if any(change is not None and change > bound for change in changes):
                return a.path
    return None


def _sizes(
    twin: Twin, calls: Sequence[OuterCall], parts: Sequence[Part], excuses: Sequence[Waiver]
) -> StepFinding:
    name, count = "batch_sizes", parts[0].count
    raised = [(part, path) for part in parts if (path := raised_in(twin.model, part)) is not None]
    if len(raised) == len(parts) and count > len(parts) and _is_square(calls, count):
        why = "not applicable: other axes of the batch are as long as the first, so it has no rows"
        return finding(name, why)
    if raised:
        part, path = raised[0]
        # Shapes that a module upstream spoiled raise further down.
        lost = _lost_axis(traced(twin, slice(None)), traced(twin, part.rows))
        path = path if lost is None else lost[0]
        message = (str(part.error).strip().splitlines() or ["no message"])[0]
        lost_words = (
            "" if lost is None else f" gives shape {lost[2]}, not {lost[1]}, then the model"
        )
        what = (
            f"{label(twin.model, path)}{lost_words} raised {type(part.error).__name__}: {message}"
        )
        return _size_fault(part, path, what, excuses)
    for part in parts:
        lost = _lost_axis(calls, part.calls)
        if lost is not None:
            path, before, after = (
                _lost_axis(traced(twin, slice(None)), traced(twin, part.rows)) or lost
            )
            what = f"{label(twin.model, path)} gives shape {after}, but {before} for the batch"
            return _size_fault(part, path, what, excuses)
    errors = [type(part.error).__name__ for part in parts if part.error is not None]
    if errors:
        return finding(name, f"not applicable: the loss itself needs more rows ({errors[0]})")
    return finding(name, f"batches of 1, {count - 1} and {count} rows are accepted")


def _size_fault(part: Part, path: str, what: str, excuses: Sequence[Waiver]) -> StepFinding:
    used = [w for w in excuses if fnmatchcase(path, w.tensor)]
    remedy = "waived" if used else "accept every batch size or waive it with kind 'rows'"
    detail = f"with {part.size} of {part.count} rows {what}; {remedy}"
    return finding("batch_sizes", detail, passed=bool(used), culprit=path, in_use=used)


def _is_square(calls: Sequence[OuterCall], count: int) -> bool:
    """True where an input has a second axis of that length, as a graph's adjacency matrix has."""
    return any(count in taken.shape[1:] for call in calls for taken in call.taken)


def _lost_axis(
    calls: Sequence[OuterCall | Step], cut: Sequence[OuterCall | Step]
) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """The first module whose output lost its axis of rows (by squeeze, say), and both shapes."""
    for whole, piece in zip(calls, cut, strict=False):
        if whole.path != piece.path or len(whole.given) != len(piece.given):
            break
        for a, b in zip(whole.given, piece.given, strict=True):
            if a.ndim == b.ndim + 1 and a.shape[1:] == b.shape:
                return whole.path, tuple(a.shape), tuple(b.shape)
    return None


def _accumulation(
    twin: Twin, whole: Reading, parts: Sequence[Part], waivers: Sequence[Waiver]
) -> StepFinding:
    name, count = "accumulation_unequal", parts[0].count
    named = [w for w in waivers if w.kind in _UNTRUE]
    slots = [
        slot
        for slot in twin.slots
        if whole.finite_for(slot.name)
        and not any(covers(w, slot.name, slot.aliases) for w in named)
    ]
    batch = Part(slice(None), count, whole.loss, projections=projections(twin, whole.gradients))
    reduction, wrong = _additivity(twin, batch, parts, slots)
    if reduction == _TWICE:
        detail = (
            f"the loss is the mean over rows, divided by the number of rows ({count}) once more; "
            "take the mean once"
        )
        return finding(name, detail, passed=False)
    if not reduction:
        return finding(
            name,
            "not applicable: the loss of a batch is neither mean nor sum of its rows' losses, so "
            "it must not be accumulated over micro-batches",
        )
    wrong = _confirmed(twin, wrong, slots) if wrong else []
    detail = (
        f"the loss is the {reduction} over rows, but its gradient for 1 and {count - 1} rows is "
        f"not for {listed(wrong)}; a backward or a hook divides by the size of its batch"
        if wrong
        else f"gradients of 1 and {count - 1} rows give that of the batch ({reduction} over rows)"
    )
    culprit = (common_module(wrong) or None) if wrong else None
    return finding(name, detail, passed=not wrong, culprit=culprit)


def _additivity(
    twin: Twin, whole: Part, parts: Sequence[Part], slots: Sequence[Slot]
) -> tuple[str, list[str]]:
    """How the loss is reduced over rows ('' if neither way), and slots whose gradient is not."""
    if any(part.error is not None for part in parts):
        return "", []
    bound = _LOWERED_LOSS_BOUND if twin.lowered else _LOSS_BOUND
    found: tuple[str, list[str]] = ("", [])
    for power, reduction in enumerate(("sum", "mean", _TWICE)):
        weights = [(part.size / part.count) ** power for part in parts]
        losses = [w * part.loss for w, part in zip(weights, parts, strict=True)]
        if abs(whole.loss - sum(losses)) <= bound * (abs(whole.loss) + sum(map(abs, losses))):
            wrong = [s.name for s in slots if not _adds(twin, s.name, whole, parts, weights)]
            # Both hold where losses vanish; the one whose gradients add is meant.
            if not wrong:
                return reduction, []
            found = (reduction, wrong) if reduction != _TWICE else found
    return found


def _adds(
    twin: Twin, name: str, whole: Part, parts: Sequence[Part], weights: Sequence[float]
) -> bool:
    gap, size = whole.projections[name]
    floor = _ROUNDING_SHARE * max(norm for _, norm in whole.projections.values())
    for weight, part in zip(weights, parts, strict=True):
        product, norm = part.projections[name]
        gap, size = gap - weight * product, size + weight * norm
    return abs(gap) <= (_LOWERED_BOUND if twin.lowered else _GRADIENT_BOUND) * size + floor


def _confirmed(twin: Twin, wrong: Sequence[str], slots: Sequence[Slot]) -> list[str]:
    """Those of `wrong` that another batch shows too: ties broken by rounding do not repeat."""
    count = twin.rows(1)
    if count is None or count < 2:
        return list(wrong)
    whole, *parts = (evaluated(twin, 1, rows, count) for rows in (slice(None), *_SPLITS))
    reduction, again = _additivity(twin, whole, parts, slots)
    return [name for name in wrong if name in again] if reduction else list(wrong)
