"""All checks of one model, in their order."""

import hashlib
import time
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from . import hardship, load
from .answers import Answers
from .golden import Golden
from .job import Job, attempt
from .outline import read_outline
from .session import Subject, check_provider, open_session


def check_model(ort: ModuleType, job: Job, failures: list[str]) -> dict[str, Any]:
    """Check bytes, session and answers in that order; measurements come back if all is well."""
    golden = attempt("golden file", failures, lambda: Golden(Path(job["golden"])))
    model = Path(job["model"]).read_bytes()
    if (sha256 := hashlib.sha256(model).hexdigest()) != job["sha256"]:
        # Bytes that nobody vouches for are never parsed, so the model's checks end here.
        failures.append(f"the model's sha256 must be {job['sha256']}; got {sha256}. Fetch it again")
        return {}
    outline = attempt("reading the model", failures, lambda: read_outline(model))
    if outline is None:
        return {}
    if faults := outline.faults():
        failures += faults
        return {}
    started = time.perf_counter()
    session = attempt("loading the model", failures, lambda: open_session(ort, model, job))
    load_ms = (time.perf_counter() - started) * 1e3
    if session is None:
        return {}
    failures += check_provider(session, job["provider"])
    if golden is None:
        return {}
    subject = Subject(session, golden)
    if faults := subject.signature_faults():
        failures += faults
        return {}
    examination = Examination(subject, job, failures, outline.operators)
    return {"load_ms": load_ms, **examination.report()}


ABORT_WHEN_EMPTY = frozenset({"GRU", "LSTM"})
"""Operators that make onnxruntime (1.31.1, CPU) end its process when they get no rows."""


class Examination:
    """One session under every check of its answers.

    ``parts_ms`` says how long each check took, and ``not_tried`` why one was left out.
    """

    def __init__(
        self, subject: Subject, job: Job, failures: list[str], operators: Set[str]
    ) -> None:
        self.subject = subject
        self.job = job
        self.failures = failures
        self.aborting = sorted(ABORT_WHEN_EMPTY & operators)
        self.parts_ms: dict[str, float] = {}
        self.not_tried: dict[str, str] = {}
        self.measured: dict[str, Any] = {}

    def report(self) -> dict[str, Any]:
        """Golden rows first; only a model that answers them is tried further and measured."""
        golden, answers = self.subject.golden, Answers(self.subject, self.job)
        self.check("the first run", self.first_run)
        for label, size in [
            ("golden rows", golden.rows),
            *((f"batch {size}", size) for size in self.job["batch_sizes"]),
        ]:
            self.check(label, partial(answers.batch_faults, size))
        if self.failures:
            return {}
        self.check("missing values", partial(hardship.missing_faults, self.subject))
        self.check("extreme values", partial(hardship.extreme_faults, self.subject))
        self.empty_batch()
        self.check("wrong inputs", partial(hardship.refusal_faults, self.subject))
        self.check("concurrency", self.concurrency)
        self.check("many calls", self.many_calls)
        self.check("throughput", self.throughput)
        return {
            "golden_rows": golden.rows,
            "max_difference": answers.largest,
            "batch_sizes": self.job["batch_sizes"],
            "first_run_ms": self.parts_ms["the first run"],
            "providers": self.subject.session.get_providers(),
            "parts_ms": self.parts_ms,
            "not_tried": self.not_tried,
            **self.measured,
        }

    def first_run(self) -> list[str]:
        """Answer one row; what it says is judged later."""
        self.subject.run(self.subject.sample(1))
        return []

    def empty_batch(self) -> None:
        """Call without rows, unless the engine is known not to live through it."""
        if self.aborting:
            self.not_tried["empty batch"] = f"onnxruntime aborts on {', '.join(self.aborting)}"
        else:
            self.check("empty batch", partial(hardship.empty_faults, self.subject))

    def concurrency(self) -> list[str]:
        """Call from many threads."""
        return load.concurrency_faults(self.subject, self.job["round_seconds"])

    def many_calls(self) -> list[str]:
        """Call with one row, often; memory and latency."""
        feed = self.subject.sample(1)
        call = partial(self.subject.session.run, self.subject.names, feed)
        best = load.single_rows(call, self.job)
        self.measured |= best._asdict()
        return load.single_row_faults(best, self.job)

    def throughput(self) -> list[str]:
        """Call with many rows."""
        rows_per_s = load.throughput(self.subject, self.job)
        self.measured["rows_per_s"] = rows_per_s
        return load.throughput_faults(rows_per_s, self.job)

    def check(self, what: str, step: Callable[[], list[str]]) -> None:
        """Take a step and its time, and collect what it found."""
        started = time.perf_counter()
        faults = attempt(what, self.failures, step) or []
        self.failures += [f"{what}: {fault}" for fault in faults]
        self.parts_ms[what] = round((time.perf_counter() - started) * 1e3, 3)
