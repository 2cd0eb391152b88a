"""Surveys many tensors over several points and takes their votes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from components.validate.gradients.probe import (
    AGREEMENTS,
    FAULTS,
    PLATEAU_STEPS,
    Comparison,
    Outcome,
    Point,
    Precision,
    Rung,
    compare,
    has_gradient,
    plateau_reach,
    reaction,
    rounding_floor,
)
from components.validate.gradients.slots import Reading, Slot

# Outcomes that need no other point, unless a fault was seen at one before.
CONCLUSIVE = frozenset({Outcome.AGREES, Outcome.NOISY})


def survey(
    points: Iterable[Point],
    slots: Sequence[Slot],
    precision: Precision,
    generator: torch.Generator,
    enough: frozenset[Outcome] = CONCLUSIVE,
) -> dict[str, list[Comparison]]:
    """Compare every slot at the first point, and at further points only while in doubt.

    A kink (ReLU, max) or a vanishing gradient at one point is no verdict, so only inconclusive
    slots move on. Where the loss or the slot's gradient is not finite, nothing is compared.
    """
    found: dict[str, list[Comparison]] = {slot.name: [] for slot in slots}
    doubtful = list(slots)
    for point in points:
        if not doubtful:
            break
        with point.settled() as reading:
            sound = [slot for slot in doubtful if reading.finite_for(slot.name)]
            for slot, comparison in compare_each(sound, point, reading, precision, generator):
                found[slot.name].append(comparison)
        doubtful = [slot for slot in doubtful if not _is_settled(found[slot.name], enough)]
    return found


def compare_each(
    slots: Sequence[Slot],
    point: Point,
    reading: Reading,
    precision: Precision,
    generator: torch.Generator,
) -> Iterator[tuple[Slot, Comparison]]:
    """Compare slots at one settled point; those without gradient together, if none is read.

    Two forwards tell whether the loss reacts to any of them; only then each is moved alone.
    """
    empty = [s for s in slots if not has_gradient(reading, s)]
    unread: dict[str, Comparison] = {}
    if len(empty) > 1:
        silent = _silence(empty, point, reading, precision, generator)
        unread = {slot.name: silent for slot in empty} if silent else {}
    for slot in slots:
        alone = unread.get(slot.name)
        yield slot, alone or compare(slot, point, reading, precision, generator)


def reads_none(
    slots: Sequence[Slot],
    point: Point,
    reading: Reading,
    precision: Precision,
    generator: torch.Generator,
) -> bool:
    """True when the function does not react to large steps of all these slots together."""
    if not slots:
        return True
    return _silence(slots, point, reading, precision, generator) is not None


def _silence(
    slots: Sequence[Slot],
    point: Point,
    reading: Reading,
    precision: Precision,
    generator: torch.Generator,
) -> Comparison | None:
    if reading.loss == 0.0:
        return None
    kept = [slot.values().clone() for slot in slots]
    floor = rounding_floor(reading, precision)
    moves = []
    try:
        for h in PLATEAU_STEPS:
            for slot, values in zip(slots, kept, strict=True):
                z = slot.normal(generator)
                slot.values().copy_(values).add_(
                    z, alpha=h * plateau_reach(slot) / (z.norm() or 1.0)
                )
            moves.append(abs(point.value() - reading.loss))
    finally:
        for slot, values in zip(slots, kept, strict=True):
            slot.values().copy_(values)
    if not max(moves) <= reaction(reading, precision):
        return None
    rung = Rung(PLATEAU_STEPS[-1], 0.0, 0.0, max(moves), max(moves), floor, floor, noisy=False)
    return Comparison(Outcome.SILENT, rung)


def decide(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The comparison that stands for all; None if there was no usable point.

    Two faults out of three convict. One fault convicts only if no point showed an agreement.
    """
    faults = [c for c in comparisons if c.outcome in FAULTS]
    agreements = [c for c in comparisons if c.outcome in AGREEMENTS]
    noisy = [c for c in comparisons if c.outcome is Outcome.NOISY]
    if noisy:
        return noisy[0]
    if len(faults) >= 2 or (faults and not agreements):
        return max(faults, key=lambda c: c.rung.error / (c.rung.scale or 1.0))
    if agreements:
        return min(agreements, key=lambda c: c.outcome is Outcome.UNRESOLVED)
    hidden = [c for c in comparisons if c.outcome is Outcome.HIDDEN]
    return next(iter([*hidden, *comparisons]), None)


def _is_settled(comparisons: Sequence[Comparison], enough: frozenset[Outcome]) -> bool:
    outcomes = [c.outcome for c in comparisons]
    faults = sum(outcome in FAULTS for outcome in outcomes)
    return faults >= 2 if faults else not enough.isdisjoint(outcomes)
