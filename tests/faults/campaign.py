"""Runs a detector over every operator, architecture and seed, and scores what it says."""

from __future__ import annotations

import functools
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from faults.architectures import ARCHITECTURES, Architecture
from faults.clean import CLEAN, Clean
from faults.operators import Injection, Loss, Operator
from faults.operators_backward import BACKWARD
from faults.operators_forward import FORWARD
from faults.operators_step import STEP
from faults.operators_structure import STRUCTURE
from faults.oracle import Truth, truth
from torch import nn

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import GradientReport, Verdict

OPERATORS: tuple[Operator, ...] = (*FORWARD, *BACKWARD, *STRUCTURE, *STEP)
# Places that are tried before an operator counts as not applicable to an architecture.
ATTEMPTS = 6
LARGE = 1e-2


@dataclass(frozen=True)
class Subject:
    """What a detector is given."""

    model: nn.Module
    loss: Loss
    batches: list[Any]
    optimizer: torch.optim.Optimizer | None = None
    waivers: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a detector says; `tensors` and `culprit` None where it does not say."""

    alarm: bool
    tensors: frozenset[str] | None = None
    culprit: str | None = None
    reason: str = ""
    forwards: int = 0
    backwards: int = 0


Detector = Callable[[Subject], Answer | None]  # None: it cannot judge this subject


@dataclass(frozen=True)
class Outcome:
    """One fault and what a detector made of it."""

    operator: str
    family: str
    architecture: str
    seed: int
    culprits: tuple[str, ...]
    tensors: frozenset[str]
    undecided: frozenset[str]
    error: float
    answer: Answer | None
    silent: bool  # the detector raises no alarm on the same model without the fault
    seconds: float

    @property
    def caught(self) -> bool:
        """Whether the detector tells the faulty model from the correct one."""
        return self.answer is not None and self.answer.alarm and self.silent

    @property
    def large(self) -> bool:
        """A wrong gradient with a relative error that nobody may miss."""
        return self.family == "wrong_gradient" and self.error >= LARGE

    @property
    def tensors_right(self) -> bool:
        """Whether the failing tensors are those of the truth; undecided ones do not count."""
        if self.answer is None or self.answer.tensors is None:
            return False
        return self.caught and self.answer.tensors - self.undecided == self.tensors

    @property
    def module_right(self) -> bool | None:
        """Whether the culprit is a module that holds the fault; None where no module does.

        A path counts only if it is exactly one of the truth's: neither its parent nor its child.
        """
        if not self.culprits or self.answer is None:
            return None
        return self.caught and self.answer.culprit in self.culprits


def verified(subject: Subject) -> Answer:
    """This project's own detector."""
    try:
        report = verify_gradients(
            subject.model,
            subject.loss,
            subject.batches,
            waivers=subject.waivers,
            optimizer=subject.optimizer,
        )
    except Exception as error:  # noqa: BLE001 - a crash of the detector is no verdict, so no alarm
        return Answer(False, reason=f"{type(error).__name__}: {error}")
    return answered(report)


def answered(report: GradientReport) -> Answer:
    """A report in the campaign's terms."""
    failing = frozenset(t.name for t in report.tensors if t.verdict is Verdict.FAIL)
    checks = [c.name for c in report.checks if not c.passed]
    return Answer(
        alarm=not report.passed,
        tensors=failing,
        culprit=report.culprit,
        reason=f"{checks} {report.reason}" if not report.passed else report.reason,
        forwards=report.forwards,
        backwards=report.backwards,
    )


def injected(
    operator: Operator, architecture: Architecture, seed: int
) -> tuple[Callable[[], Injection], Truth] | None:
    """A maker of one faulty model and the truth about it; None where the operator finds no place.

    Places are drawn until one has an effect, at most `ATTEMPTS` times.
    """
    batches = architecture.batches(seed)
    for attempt in range(ATTEMPTS):

        def make(attempt: int = attempt) -> Injection | None:
            model = built(architecture, seed)
            draw = zlib.crc32(f"{operator.name} {architecture.name} {seed} {attempt}".encode())
            return operator.inject(model, torch.Generator().manual_seed(draw))

        injection = make()
        if injection is None:
            return None
        found = truth(injection, architecture.loss, batches)
        if found is not None:
            return make, found  # type: ignore[return-value]
    return None


def built(case: Architecture | Clean, seed: int) -> nn.Module:
    """A fresh model of an architecture or clean case, from a seed, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.build()


def try_fault(
    operator: Operator, architecture: Architecture, seed: int, detectors: Sequence[Detector]
) -> list[Outcome] | None:
    """One outcome per detector; None where the operator does not apply."""
    found = injected(operator, architecture, seed)
    if found is None:
        return None
    make, known = found
    outcomes = []
    for detector in detectors:
        injection = make()
        loss = injection.loss(architecture.loss) if injection.loss else architecture.loss
        optimizer = injection.optimizer(injection.model) if injection.optimizer else None
        subject = Subject(injection.model, loss, architecture.batches(seed), optimizer)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a faulty model may well provoke some
            answer = detector(subject)
        seconds = time.perf_counter() - started
        outcomes.append(
            Outcome(
                operator.name,
                operator.family,
                architecture.name,
                seed,
                known.culprits,
                known.tensors,
                known.undecided,
                known.largest,
                answer,
                silent(architecture, seed, detector),
                seconds,
            )
        )
    return outcomes


@functools.cache
def silent(architecture: Architecture, seed: int, detector: Detector) -> bool:
    """Whether the detector raises no alarm on the architecture without any fault."""
    answer = try_clean(architecture, seed, detector)
    return answer is None or not answer.alarm


def try_clean(case: Architecture | Clean, seed: int, detector: Detector) -> Answer | None:
    """What a detector says of a correct model, which half of the time comes with an optimiser."""
    model = built(case, seed)
    optimizer = torch.optim.AdamW(model.parameters()) if seed % 2 else None
    waivers = getattr(case, "waivers", ())
    return detector(Subject(model, case.loss, case.batches(seed), optimizer, waivers))


@dataclass(frozen=True)
class Score:
    """Shares of a set of outcomes; a share of nothing is None."""

    cases: int
    caught: float | None
    large_caught: float | None
    tensors_right: float | None
    module_right: float | None


def score(outcomes: Iterable[Outcome]) -> Score:
    """How a detector did; outcomes that it could not judge are left out."""
    judged = [o for o in outcomes if o.answer is not None]
    return Score(
        len(judged),
        share(o.caught for o in judged),
        share(o.caught for o in judged if o.large),
        share(o.tensors_right for o in judged),
        share(o.module_right for o in judged if o.module_right is not None),
    )


def share(flags: Iterable[bool]) -> float | None:
    """The share of true ones, None of none."""
    listed = list(flags)
    return sum(listed) / len(listed) if listed else None


CASES = tuple(
    (operator.name, architecture.name) for operator in OPERATORS for architecture in ARCHITECTURES
)
BY_NAME = {operator.name: operator for operator in OPERATORS}
ARCHITECTURE_BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
CLEAN_CASES: tuple[Architecture | Clean, ...] = (*ARCHITECTURES, *CLEAN)
