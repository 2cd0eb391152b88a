"""Training in several processes: what a worker is told, what it does, and how its result is read.

Whoever starts the workers gives them a process group and a payload. All of them read the snapshot
and the checkpoints; process 0 writes the latter, the last of which is the result.
"""

import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.data.snapshot import Snapshot, open_snapshot
from components.errors import ConfigError, InfrastructureError
from components.pipeline import Pipeline, load_pipeline
from components.plan import code_digest
from components.storage import Storage
from components.train.checkpoint import Checkpoints, Epoch
from components.train.environment import training_environment
from components.train.loop import SILENT, Reports, Trained
from components.train.parallel import Group
from components.train.run import run_training

ENTRY = "components.train.together:train_worker"
_STEPS_EVERY_S = 2.0

Report = Callable[[dict[str, Any]], None]


class Assignment(BaseModel):
    """What every worker is told; places are absolute, or URLs, and reached from everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pipeline: str
    config: dict[str, str | int | float | bool]
    code_digest: str
    snapshots: str
    fingerprint: str
    checkpoints: str
    key: str
    every_s: float


def train_worker(payload: str, report: Report) -> None:
    """Train in the current process group; process 0 reports.

    Reports are ``{"epoch": ...}``, ``{"resumed": [...]}``, ``{"steps": [done, planned]}``,
    ``{"warning": ...}`` and, when training has ended, ``{"environment": ..., "device": ...}``.

    Raises:
        ConfigError: The worker has other code, or does not reach the snapshot.
        AssayError: As :func:`~components.train.run.run_training`.
    """
    given = Assignment.model_validate_json(payload)
    pipeline = load_pipeline(given.pipeline)
    group = Group.current()
    warn = _warner(report) if group.rank == 0 else lambda text: None
    trained, _ = run_training(
        pipeline,
        type(pipeline.config).model_validate(given.config),
        _snapshot(given, pipeline),
        checkpoints=Checkpoints(Storage(given.checkpoints), given.key, warn),
        every_s=given.every_s,
        group=group,
        reports=_reports(report) if group.rank == 0 else SILENT,
    )
    if group.rank == 0:
        environment = training_environment(trained.device)
        report({"environment": environment, "device": trained.device})


def read_result(given: Assignment, device: str) -> Trained:
    """What the workers left.

    Raises:
        InfrastructureError: There is no checkpoint of a training that has ended.
    """
    troubles: list[str] = []
    found = Checkpoints(Storage(given.checkpoints), given.key, troubles.append).load()
    if found is None or not found.progress.finished:
        raise InfrastructureError(
            "the workers' last checkpoint must be readable here, at ASSAY_CHECKPOINT_ROOT; "
            f"{given.checkpoints} holds no finished one. {' '.join(troubles)} Let it name a place "
            "that every worker and this process reach."
        )
    progress = found.progress
    best = {n.removeprefix("best/"): t for n, t in found.tensors.items() if n.startswith("best/")}
    return Trained(best, tuple(progress.history), progress.history[progress.best - 1], device)


def _snapshot(given: Assignment, pipeline: Pipeline) -> Snapshot:
    here = code_digest(pipeline)
    if here != given.code_digest:
        raise ConfigError(
            f"every worker must have the job's code; pipeline {given.pipeline!r} has the digest "
            f"{here[:12]} on this worker and {given.code_digest[:12]} in the job. Install the same "
            "versions of assay and of the pipeline's package on all of them."
        )
    snapshot = open_snapshot(Storage(given.snapshots), given.fingerprint)
    if snapshot is None:
        raise ConfigError(
            f"every worker must reach the job's rows; {given.snapshots} has no snapshot "
            f"{given.fingerprint[:12]} there. Let ASSAY_SNAPSHOT_ROOT name a place that all of "
            "them reach."
        )
    return snapshot


def _warner(report: Report) -> Callable[[str], None]:
    return lambda text: report({"warning": text})


def _reports(report: Report) -> Reports:
    shown = 0.0

    def steps(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _STEPS_EVERY_S:  # a report waits for whoever listens
            shown = time.monotonic()
            report({"steps": [done, total]})

    def epoch(ended: Epoch) -> None:
        report({"epoch": ended.model_dump()})

    return Reports(
        epoch=epoch,
        resumed=lambda epochs: report({"resumed": [e.model_dump() for e in epochs]}),
        steps=steps,
        warn=_warner(report),
    )
