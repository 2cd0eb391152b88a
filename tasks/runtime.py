"""What every stage shares: its workspace, its cache key, and what happens when it fails."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, final

from prefect.context import TaskRunContext
from prefect.runtime import flow_run

from components.adapters.mlflow_registry import CHAMPION, Registry
from components.adapters.mlflow_tracking import Tracking, connect
from components.adapters.prefect_events import announce
from components.adapters.prefect_runtime import load_block_settings, publish_rejection, run_logger
from components.digest import digest_json
from components.errors import AssayError, GateError, InfrastructureError
from components.interruption import interrupt_received
from components.records import (
    Artifact,
    Job,
    Record,
    RegisteredModel,
    Rejection,
    Stage,
    StageRecord,
    job_of,
    lineage,
    mlflow_run,
)
from components.settings import Settings, load_settings
from components.state import storage_errors, sweep
from components.threads import single_threaded

RecordT = TypeVar("RecordT", bound=Record)
LEFT_S = 7 * 24 * 3600.0
"""Seconds after which what a killed or abandoned run left is deleted."""


def current_settings() -> Settings:
    """Settings from the environment and, where one is named, from a Prefect block."""
    settings = load_settings()
    if not settings.credentials_block:
        return settings
    return load_settings(load_block_settings(settings.credentials_block))


def keyed(stage: str) -> Callable[[TaskRunContext, dict[str, Any]], str]:
    """A cache key function: the stage, the key of the record it is given, and the MLflow store.

    A result refers to artifacts in MLflow, so it counts only where these are.
    """

    def cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
        (record,) = parameters.values()
        store = connect(current_settings()).identity(job_of(record).pipeline)
        return f"{stage}-{digest_json([record.key, store])}"

    return cache_key


@final
class Workspace:
    """A stage at work: settings, tracking store, a folder that goes when it ends, and a log.

    ``run_id`` is the MLflow run of the candidate; the train stage sets it.
    """

    def __init__(
        self, stage: str, settings: Settings, tracking: Tracking, folder: Path, run_id: str
    ) -> None:
        self.stage = stage
        self.settings = settings
        self.tracking = tracking
        self.folder = folder
        self.run_id = run_id
        self.log = run_logger()
        self._started = time.perf_counter()

    def put(self, name: str, content: bytes | str) -> Artifact:
        """Write a file and upload it to the stage's folder in the MLflow run."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.upload(path)

    def upload(self, path: Path) -> Artifact:
        """Upload a file to the stage's folder in the MLflow run."""
        return self.tracking.put(self.run_id, path, self.stage)

    def fetch(self, artifact: Artifact) -> Path:
        """Download an artifact, its sha256 checked."""
        return self.tracking.fetch(artifact, self.folder)

    def ended(self) -> Stage:
        """Seconds since the stage began, and the flow run that it belongs to."""
        return Stage(
            seconds=round(time.perf_counter() - self._started, 3), flow_run_id=str(flow_run.id)
        )

    def keep(self, record: RecordT, name: str = "") -> RecordT:
        """Store a record, by default the stage's, in the MLflow run, where others find it."""
        path = self.folder / f"{name or self.stage}.json"
        path.write_text(record.model_dump_json(indent=1))
        self.tracking.put(self.run_id, path, "records")
        return record


@contextlib.contextmanager
def stage(name: str, given: Job | StageRecord, run_id: str = "") -> Iterator[Workspace]:
    """Open a workspace; a failure inside ends the MLflow run and says why on it.

    Args:
        name: The stage's name.
        given: The record that the stage works on.
        run_id: The MLflow run to work in, if it is not the record's.

    Raises:
        InfrastructureError: The state folder or MLflow cannot be used.
    """
    settings = current_settings()
    work = settings.root / "work"
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        sweep(work, LEFT_S)  # of processes that were killed
        folder = tempfile.TemporaryDirectory(dir=work, prefix=f"{name}-")
    with folder, single_threaded():
        run_id = run_id or mlflow_run(given)
        space = Workspace(name, settings, connect(settings), Path(folder.name), run_id)
        if space.run_id:
            space.tracking.resume(space.run_id)
        try:
            with storage_errors(work):
                yield space
        except GateError as error:
            _reject(space, given, error)
            raise
        except BaseException as error:
            interrupt_received()
            _close(space, "failed", error)
            raise


def _reject(space: Workspace, given: Job | StageRecord, error: GateError) -> None:
    error.rejection = Rejection(
        stage_name=space.stage,
        failures=error.failures,
        culprit=error.culprit,
        metrics=error.metrics,
        given=given,
        stage=space.ended(),
    )
    publish_rejection(space.stage, error.failures)
    _announce_rejection(space, given, error)
    _keep_rejection(space, error.rejection)
    _close(space, "rejected", error)


def _announce_rejection(space: Workspace, given: Job | StageRecord, error: GateError) -> None:
    registered = lineage(given).get("register")
    model = job_of(given).pipeline
    try:
        champion = Registry(space.tracking, model).aliases().get(CHAMPION)
    except InfrastructureError as second:
        space.log.warning("The champion that stays could not be looked up: %s", second)
        champion = None
    announce(
        "rejected",
        model=model,
        version=registered.version if isinstance(registered, RegisteredModel) else None,
        before=champion,
        reason=str(error),
    )


def _keep_rejection(space: Workspace, rejection: Rejection) -> None:
    """Leave it in the MLflow run, where a run on another machine looks for the reason."""
    if not space.run_id:
        return
    try:
        space.keep(rejection, "rejection")
    except (InfrastructureError, OSError) as second:
        space.log.warning("The rejection could not be stored: %s", second)


def _close(space: Workspace, decision: str, error: BaseException) -> None:
    """End the MLflow run; a store that fails here must not hide the error that brought us here."""
    if not space.run_id:
        return
    reason = str(error) if isinstance(error, AssayError) else type(error).__name__
    try:
        space.tracking.tag(space.run_id, {"decision": decision, "reason": reason[:5000]})
        space.tracking.finish(space.run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
    except InfrastructureError as second:
        space.log.warning("The MLflow run could not be closed: %s", second)


def log_metrics_of(metrics: Mapping[str, float]) -> str:
    """Metrics of the whole holdout on one line; those of slices stay in MLflow."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "/" not in name)
