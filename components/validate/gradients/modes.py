"""Plans which slot is compared where, in train and eval mode, and judges every slot.

The cheapest plan that leaves nothing out: each slot alone in one mode, all together in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from components.validate.gradients.balance import Balance, find_suspects
from components.validate.gradients.outputs import shows_in_outputs
from components.validate.gradients.points import Errors, LossPoint
from components.validate.gradients.probe import (
    AGREEMENTS,
    FAULTS,
    LOOSE,
    STRICT,
    Comparison,
    Outcome,
    has_gradient,
    is_visible,
)
from components.validate.gradients.report import Cause, Verdict
from components.validate.gradients.slots import Reading, Slot, generator_for
from components.validate.gradients.survey import CONCLUSIVE, decide, survey
from components.validate.gradients.twin import Twin

# Batches, each the data of one point; two of three points convict a tensor.
BATCHES = 3
# More tensors than this are first compared all together in both modes.
ALONE_LIMIT = 500
_SEVERITY = (Verdict.PASS, Verdict.DEGRADED, Verdict.UNVERIFIABLE, Verdict.FAIL)
_CAUSES = {
    Outcome.MISMATCH: Cause.MISMATCH,
    Outcome.BROKEN_PATH: Cause.BROKEN_PATH,
    Outcome.SURROGATE: Cause.SURROGATE,
    Outcome.SILENT: Cause.UNUSED,
}


@dataclass(frozen=True)
class Finding:
    """The judgement on one slot in one mode, before waivers; `batch` is where it showed."""

    slot: Slot
    training: bool
    verdict: Verdict
    cause: Cause = Cause.NONE
    comparison: Comparison | None = None
    batch: int = 0


@dataclass(frozen=True)
class Examination:
    """One finding per slot, the gravest over the modes that were examined (train mode first)."""

    findings: tuple[Finding, ...]
    modes: tuple[bool, ...]


def examine(twin: Twin, home: Reading, repeated: float, away: Reading, seed: int) -> Examination:
    """Judge every slot, given readings of batch 0 in train mode (`home`) and eval mode (`away`).

    `repeated` is a second loss in train mode. The gradients of `away` are dropped once they are no
    longer needed, so that memory need not hold three sets of them.
    """
    plan = _Plan(twin, home, away, seed)
    found = _spoiled_at_once(twin, home, training=True)
    if plan.both:
        found += _spoiled_at_once(twin, away, training=False)
    names = {finding.slot.name for finding in found}
    sound = [slot for slot in twin.slots if slot.name not in names]
    if plan.both:
        found += _examine_away(plan, sound)
    idle = plan.without_path()
    away.gradients.clear()
    found += _examine_home(plan, sound, repeated)
    worst = (_worst(slot, [f for f in found if f.slot is slot]) for slot in twin.slots)
    idle = _never_reached(twin, idle)
    findings = tuple(
        Finding(f.slot, True, Verdict.FAIL, Cause.UNUSED)
        if f.slot.name in idle and f.verdict is not Verdict.FAIL
        else f
        for f in worst
    )
    return Examination(findings, (True, False) if plan.both else (True,))


@final
class _Plan:
    """Where each slot's gradient can be seen, worked out once from the two readings."""

    def __init__(self, twin: Twin, home: Reading, away: Reading, seed: int) -> None:
        self.twin = twin
        self.seed = seed
        self.precision = LOOSE if twin.native else STRICT
        self.both = not _identical(home, away)
        self.few = len(twin.slots) <= ALONE_LIMIT
        self._readings = {True: home, False: away}
        shown = {
            training: {s.name for s in twin.slots if is_visible(s, reading, self.precision)}
            for training, reading in self._readings.items()
        }
        self.in_home = shown[True]
        self.in_away_only = shown[False] - shown[True] if self.both else set()
        self.in_neither = {s.name for s in twin.slots} - shown[True] - self.in_away_only

    def excused_if_blind(self, finding: Finding) -> Finding:
        """A pass where the loss is blind to a tensor that is on its graph and changes outputs."""
        rung = finding.comparison.rung if finding.comparison else None
        flat = finding.cause is Cause.UNUSED or (
            # It reacts to long steps only; where no tensor has a gradient, it is a staircase.
            finding.cause is Cause.BROKEN_PATH and rung is not None and rung.agrees and self.in_home
        )
        if not flat or self._readings[True].gradients[finding.slot.name] is None:
            return finding
        self.twin.set_mode(True)
        blind = shows_in_outputs(self.twin, finding.slot, finding.batch, self.seed)
        return replace(finding, verdict=Verdict.PASS, cause=Cause.NONE) if blind else finding

    def without_path(self) -> set[str]:
        """Slots that the loss reads in eval mode, and on batch 0 does not reach in train mode."""
        home = self._readings[True].gradients
        return {name for name in self.in_away_only if home[name] is None}

    def drop_readings(self) -> None:
        """Let the gradients at the given weights go; nothing is compared there any more."""
        for reading in self._readings.values():
            reading.gradients.clear()

    def points(self, training: bool) -> list[LossPoint]:
        """The three points of one mode, with their own record of noise and rounding."""
        first, errors = self._readings[training], Errors()
        batches = range(BATCHES)
        return [LossPoint(self.twin, training, b, first, errors, self.seed) for b in batches]


def _examine_away(plan: _Plan, sound: Sequence[Slot]) -> list[Finding]:
    """Eval mode: all slots along one direction, and alone those that do not show in train mode."""
    points = plan.points(False)
    shown = [slot for slot in sound if slot.name not in plan.in_neither]
    if plan.twin.native:
        return _alone(plan, shown, points, training=False)
    alone = {s.name for s in find_suspects(shown, points, plan.precision, plan.seed)}
    if plan.few:
        alone |= plan.in_away_only
    return _alone(plan, [s for s in shown if s.name in alone], points, training=False)


def _examine_home(plan: _Plan, sound: Sequence[Slot], repeated: float) -> list[Finding]:
    """Train mode: each slot alone where it shows, or all along one direction if there are many."""
    points = plan.points(True)
    points[0].note_repeated(repeated)
    unseen = [slot for slot in sound if slot.name in plan.in_neither]
    shown = [slot for slot in sound if slot.name not in plan.in_neither]
    found: list[Finding] = []
    if plan.few and not plan.twin.native:
        found += _each(plan, shown, points)
        if any(finding.cause is Cause.MISMATCH for finding in found):
            found += _second_look(plan, found, points)
    else:
        suspects = shown
        if not plan.twin.native:
            suspects = find_suspects(shown, points, plan.precision, plan.seed)
        found += _alone(plan, suspects, points, training=True)
    if unseen:
        found += _behind_nothing(plan, unseen, points)
    found += [
        Finding(slot, True, Verdict.FAIL, Cause.NON_FINITE, batch=1)
        for slot in sound
        if slot.name in points[1].spoiled
    ]
    plan.drop_readings()  # so that memory need not hold another set of gradients beside them
    # The reading at the first nudged point has served for batch 1 as well.
    return found + _spoiled_later(plan.twin, sound, (2,) if unseen else (1, 2))


def _each(plan: _Plan, shown: Sequence[Slot], points: Sequence[LossPoint]) -> list[Finding]:
    """Every slot alone. Those without a visible gradient here ride along with the first one.

    They are to contribute nothing, so that this needs no forward of its own if it is so.
    """
    alone = [slot for slot in shown if slot.name in plan.in_home]
    riders = [slot for slot in shown if slot.name not in plan.in_home]
    found: list[Finding] = []
    if riders:
        with points[0].settled() as reading:
            balance = Balance(points[0], reading, plan.precision, plan.seed)
            rung = balance.agreement([*alone[:1], *riders])
        if rung is None:
            alone += find_suspects(riders, points, plan.precision, plan.seed)
        else:
            together = Comparison(Outcome.AGREES, rung)
            found = [_finding(slot, True, together, lowered=False) for slot in alone[:1]]
            alone = alone[1:]
    return found + _alone(plan, alone, points, training=True)


def _second_look(
    plan: _Plan, found: Sequence[Finding], points: Sequence[LossPoint]
) -> list[Finding]:
    """What another direction shows of slots that passed where others are wrong.

    One direction misses an error of a hundred tolerances in about one slot of a hundred, and a
    fault is rarely in one alone.
    """
    passed = [finding.slot for finding in found if finding.verdict is Verdict.PASS]
    again = _alone(plan, passed, points, training=True, stream=2)
    return [finding for finding in again if finding.cause is Cause.MISMATCH]


def _behind_nothing(
    plan: _Plan, unseen: Sequence[Slot], points: Sequence[LossPoint]
) -> list[Finding]:
    """Slots without a visible gradient at the given weights, at nudged ones first.

    An agreement there is enough, even one below rounding: some gradients are zero everywhere.
    """
    order = [points[1], points[2], points[0]]
    alone, found = list(unseen), list[Finding]()
    if not plan.few and not plan.twin.native:
        with points[1].settled() as reading:
            woken = [s for s in unseen if reading.finite_for(s.name) and has_gradient(reading, s)]
            balance = Balance(points[1], reading, plan.precision, plan.seed)
            suspects = [] if balance.agreement(woken) else balance.narrowed(woken)
        settled = {slot.name for slot in woken} - {slot.name for slot in suspects}
        alone = [slot for slot in unseen if slot.name not in settled]
    found += _alone(plan, alone, order, training=True, enough=_AGREED_OR_NOISY)
    return [plan.excused_if_blind(finding) for finding in found]


_AGREED_OR_NOISY = AGREEMENTS | {Outcome.NOISY}


def _alone(
    plan: _Plan,
    slots: Sequence[Slot],
    points: Sequence[LossPoint],
    *,
    training: bool,
    enough: frozenset[Outcome] = CONCLUSIVE,
    stream: int | None = None,
) -> list[Finding]:
    """Judge slots one by one; those that touch float32 inside the model also at its accuracy.

    Another `stream` of random numbers gives other directions.
    """
    twin = plan.twin
    generator = generator_for(plan.seed, int(training) if stream is None else stream)
    found = survey(points, slots, plan.precision, generator, enough)
    decided = {name: decide(comparisons) for name, comparisons in found.items()}
    degraded: dict[str, Comparison | None] = {}
    if twin.lowered and not twin.native:
        suspects = [slot for slot in slots if _is_fault(decided[slot.name])]
        loose = survey(points, suspects, LOOSE, generator)
        degraded = {name: decide(comparisons) for name, comparisons in loose.items()}
    return [
        _finding(
            slot,
            training,
            degraded.get(slot.name, decided[slot.name]),
            lowered=twin.native or slot.name in degraded,
        )
        for slot in slots
    ]


def _never_reached(twin: Twin, idle: set[str]) -> set[str]:
    """Those of `idle` that no batch reaches in train mode: they stay as they were initialised."""
    twin.set_mode(True)
    for batch in range(1, BATCHES):
        if idle:
            gradients = twin.reading(batch).gradients
            idle = {name for name in idle if gradients[name] is None}
    return idle


def _spoiled_at_once(twin: Twin, reading: Reading, *, training: bool) -> list[Finding]:
    return [
        Finding(slot, training, Verdict.FAIL, Cause.NON_FINITE)
        for slot in twin.slots
        if not reading.finite_for(slot.name)
    ]


def _spoiled_later(twin: Twin, slots: Sequence[Slot], batches: Sequence[int]) -> list[Finding]:
    """Slots whose loss or gradient is NaN or infinite on further batches at the given weights."""
    twin.set_mode(True)
    if len(batches) == 2 and _finite_together(twin, *batches):
        return []
    found: dict[str, int] = {}
    for batch in batches:
        for name in _not_finite(twin.reading(batch)):
            found.setdefault(name, batch)
    return [
        Finding(slot, True, Verdict.FAIL, Cause.NON_FINITE, batch=found[slot.name])
        for slot in slots
        if slot.name in found
    ]


def _finite_together(twin: Twin, one: int, other: int) -> bool:
    """True where one pass over the rows of both batches shows that all is finite."""
    both = twin.joined(one, other)
    if both is None:
        return False
    try:
        return not _not_finite(twin.reading(both))
    except Exception:  # noqa: BLE001  a model of fixed batch size is asked batch by batch
        return False


def _not_finite(reading: Reading) -> list[str]:
    # Takes the reading over, so that it is gone before the next one is made.
    return [name for name in reading.gradients if not reading.finite_for(name)]


def _identical(one: Reading, other: Reading) -> bool:
    if one.loss != other.loss:
        return False
    for name, gradient in one.gradients.items():
        match = other.gradients[name]
        if gradient is None or match is None:
            if gradient is not match:
                return False
        elif not torch.equal(gradient, match):
            return False
    return True


def _is_fault(comparison: Comparison | None) -> bool:
    return comparison is not None and comparison.outcome in FAULTS


def _finding(
    slot: Slot, training: bool, comparison: Comparison | None, *, lowered: bool
) -> Finding:
    if comparison is None or comparison.outcome in (Outcome.NOISY, Outcome.HIDDEN):
        return Finding(slot, training, Verdict.UNVERIFIABLE, comparison=comparison)
    cause = _CAUSES.get(comparison.outcome, Cause.NONE)
    agreed = Verdict.DEGRADED if lowered else Verdict.PASS
    verdict = agreed if cause is Cause.NONE else Verdict.FAIL
    return Finding(slot, training, verdict, cause, comparison)


def _worst(slot: Slot, findings: Sequence[Finding]) -> Finding:
    """The gravest finding over the modes; unused in one mode only is not unused.

    A slot without a finding of its own was part of directions that agreed.
    """
    if not findings:
        return Finding(slot, True, Verdict.PASS)
    used = [f for f in findings if f.cause is not Cause.UNUSED] or list(findings)
    return max(used, key=lambda f: (_SEVERITY.index(f.verdict), f.cause is Cause.NON_FINITE))
