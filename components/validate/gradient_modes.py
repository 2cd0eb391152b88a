"""Examines the gradients of a twin in train and eval mode and judges every tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import final

import torch

from components.validate.gradient_lint import repeat_checks
from components.validate.gradient_locate import nudged_slots
from components.validate.gradient_probe import (
    FAULTS,
    LOOSE,
    STRICT,
    Comparison,
    Outcome,
    Point,
    decide,
    survey,
)
from components.validate.gradient_report import Cause, StepCheck, Verdict
from components.validate.gradient_slots import Reading, Slot
from components.validate.gradient_twin import Twin

# Batches, each the data of one point; two of three points convict a tensor.
BATCHES = 3
# Identical evaluations beyond the first, taken only when two of them differ.
_NOISE_SAMPLES = 5
# Last digits that the weights are moved by to measure how the loss rounds, and its margin.
_ROUNDING_ULPS = 4.0
_ROUNDING_MARGIN = 8.0
_ROUNDING_SAMPLES = 2
# What rounding of numbers of order one can come to.
_ROUNDING_LIMIT = 1e-13
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
    """Findings per slot over all modes that were examined, and the training-step checks."""

    findings: tuple[Finding, ...]
    checks: tuple[StepCheck, ...]
    modes: tuple[bool, ...]


def examine(twin: Twin, training: bool, seed: int) -> Examination:
    """Judge every slot in the given mode, and in the other one where loss or gradient differ."""
    twin.set_mode(training)
    home = _first_reading(twin)
    checks, losses = repeat_checks(twin, home)
    twin.set_mode(not training)
    away = _first_reading(twin)
    readings = {training: _with_errors(twin, training, home, losses, seed)}
    if not _identical(home, away):
        again = _again(twin, not training)
        readings[not training] = _with_errors(twin, not training, away, [again], seed)
    per_mode = [_examine_mode(twin, mode, reading, seed) for mode, reading in readings.items()]
    findings = tuple(_worst(same_slot) for same_slot in zip(*per_mode, strict=True))
    return Examination(findings, tuple(checks), tuple(readings))


def _first_reading(twin: Twin) -> Reading:
    reading = twin.reading(0)
    clean = not twin.rewritten
    twin.note_rewrites()
    # Weights changed under the first reading; the next one is protected.
    return twin.reading(0) if clean and twin.rewritten else reading


def _again(twin: Twin, training: bool) -> float:
    twin.set_mode(training)
    return twin.value(0)


def _with_errors(
    twin: Twin, training: bool, reading: Reading, repeats: Sequence[float], seed: int
) -> Reading:
    """`reading` with its measured noise and rounding."""
    if not math.isfinite(reading.loss):
        return reading
    twin.set_mode(training)
    losses = [reading.loss, *repeats]
    if len(set(losses)) > 1:
        losses += [twin.value(0) for _ in range(_NOISE_SAMPLES)]
    noise = max(losses) - min(losses)
    return replace(reading, noise=noise, rounding=0.0 if noise else _rounding(twin, reading, seed))


def _rounding(twin: Twin, reading: Reading, seed: int) -> float:
    """How far last-digit changes of the weights move the loss, with a margin.

    |L| alone understates rounding where large terms cancel in the loss.
    """
    moves = [_last_digit_value(twin, seed + k) - reading.loss for k in range(_ROUNDING_SAMPLES)]
    rounding = _ROUNDING_MARGIN * max(map(abs, moves))
    # A jump or NaN on moving the last digit is no rounding; it must not loosen the tolerance.
    return rounding if rounding <= max(1e-9 * abs(reading.loss), _ROUNDING_LIMIT) else 0.0


def _last_digit_value(twin: Twin, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    kept = [slot.values().clone() for slot in twin.slots]
    for slot in twin.slots:
        values = slot.values()
        digits = _ROUNDING_ULPS * torch.finfo(values.dtype).eps
        values.mul_(1 + digits * slot.normal(generator))
    loss = twin.value(0)
    for slot, values in zip(twin.slots, kept, strict=True):
        slot.values().copy_(values)
    return loss


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


def _examine_mode(twin: Twin, training: bool, reading: Reading, seed: int) -> list[Finding]:
    twin.set_mode(training)
    spoiled = _non_finite(twin, reading)
    sound = [slot for slot in twin.slots if slot.name not in spoiled]
    points = [_LossPoint(twin, training, batch, reading, seed) for batch in range(BATCHES)]
    judged = {f.slot.name: f for f in _compare_all(twin, sound, points, training, seed)}
    return [
        Finding(slot, training, Verdict.FAIL, Cause.NON_FINITE, batch=spoiled[slot.name])
        if slot.name in spoiled
        else judged[slot.name]
        for slot in twin.slots
    ]


def _non_finite(twin: Twin, first: Reading) -> dict[str, int]:
    """Slots whose loss or gradient is NaN or infinite on the given weights, with the batch."""
    spoiled: dict[str, int] = {}
    for batch in range(BATCHES):
        reading = first if batch == 0 else twin.reading(batch)
        for slot in twin.slots:
            if not reading.finite_for(slot.name):
                spoiled.setdefault(slot.name, batch)
    return spoiled


def _compare_all(
    twin: Twin, slots: Sequence[Slot], points: Sequence[Point], training: bool, seed: int
) -> Iterator[Finding]:
    generator = torch.Generator().manual_seed(seed)
    first = LOOSE if twin.native else STRICT
    decided = {k: decide(v) for k, v in survey(points, slots, first, generator).items()}
    degraded: dict[str, Comparison | None] = {}
    if twin.lowered and not twin.native:
        suspects = [slot for slot in slots if _is_fault(decided[slot.name])]
        found = survey(points, suspects, LOOSE, generator)
        degraded = {name: decide(comparisons) for name, comparisons in found.items()}
    for slot in slots:
        lowered = twin.native or slot.name in degraded
        yield _finding(slot, training, degraded.get(slot.name, decided[slot.name]), lowered)


def _is_fault(comparison: Comparison | None) -> bool:
    return comparison is not None and comparison.outcome in FAULTS


def _finding(slot: Slot, training: bool, comparison: Comparison | None, lowered: bool) -> Finding:
    if comparison is None or comparison.outcome in (Outcome.NOISY, Outcome.HIDDEN):
        return Finding(slot, training, Verdict.UNVERIFIABLE, comparison=comparison)
    cause = _CAUSES.get(comparison.outcome, Cause.NONE)
    agreed = Verdict.DEGRADED if lowered else Verdict.PASS
    verdict = agreed if cause is Cause.NONE else Verdict.FAIL
    return Finding(slot, training, verdict, cause, comparison)


def _worst(findings: Sequence[Finding]) -> Finding:
    """The gravest finding over the modes; unused in one mode only is not unused."""
    used = [f for f in findings if f.cause is not Cause.UNUSED] or list(findings)
    return max(used, key=lambda f: _SEVERITY.index(f.verdict))


@final
class _LossPoint(Point):
    """The whole loss on one batch; beyond the first batch the weights are nudged as well.

    At a trained optimum or behind a zero-initialised layer gradients vanish; nudging shows them.
    """

    def __init__(self, twin: Twin, training: bool, batch: int, first: Reading, seed: int) -> None:
        self._twin = twin
        self._training = training
        self._batch = batch
        self._first = first
        self._seed = seed

    @contextmanager
    def settled(self) -> Iterator[Reading]:
        self._twin.set_mode(self._training)
        if self._batch == 0:
            yield self._first
            return
        with nudged_slots(self._twin.slots, self._seed + self._batch):
            reading = self._reading()
            if reading.finite:
                yield reading
                return
        # Nudged out of the function's domain, for example below a square root.
        yield self._reading()

    def value(self) -> float:
        return self._twin.value(self._batch)

    def _reading(self) -> Reading:
        reading = self._twin.reading(self._batch)
        return replace(reading, noise=self._first.noise, rounding=self._first.rounding)
