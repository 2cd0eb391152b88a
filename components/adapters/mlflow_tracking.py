"""Runs, metrics and artifacts in MLflow: the client with explicit run ids, never the active run."""

import contextlib
import functools
import logging
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, final

from components.digest import digest_file
from components.errors import ConfigError, InfrastructureError
from components.records import Artifact
from components.settings import Settings, hide_credentials
from components.state import exclusive, mlflow_folder, replace_folder, storage_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "assay."
METRICS_PER_BATCH = 1000
KIND = "kind"
"""Tag of a run that is no candidate's, with what it is instead."""
_PARAM_CHARACTERS = 6000


def configure_mlflow(settings: Settings) -> str:
    """Set what MLflow reads only from the process environment, and give the tracking URI.

    Telemetry and unpickling are switched off; credentials are unwrapped here and nowhere else.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    secrets = {
        "MLFLOW_TRACKING_USERNAME": settings.mlflow_username,
        "MLFLOW_TRACKING_PASSWORD": settings.mlflow_password.get_secret_value(),
        "MLFLOW_TRACKING_TOKEN": settings.mlflow_token.get_secret_value(),
    }
    os.environ.update({name: value for name, value in secrets.items() if value})
    if settings.mlflow_tracking_uri:
        return settings.mlflow_tracking_uri
    return f"sqlite:///{mlflow_folder(settings.root) / 'mlflow.db'}"


def check_mlflow(settings: Settings) -> str:
    """Prove that MLflow can be reached, without importing it, and give its tracking URI.

    Raises:
        ConfigError: The address holds a password.
        InfrastructureError: The server does not answer in time.
    """
    uri = configure_mlflow(settings)
    if not uri.startswith(("http://", "https://")):
        return uri
    if hide_credentials(uri) != uri:
        raise ConfigError(
            "ASSAY_MLFLOW_TRACKING_URI must be an address without user name and password; it holds "
            "one. Set ASSAY_MLFLOW_USERNAME and ASSAY_MLFLOW_PASSWORD, or ASSAY_MLFLOW_TOKEN."
        )
    health = uri.rstrip("/") + "/health"
    try:
        with urllib.request.urlopen(health, timeout=settings.mlflow_timeout_s) as answer:
            answer.read(64)
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise InfrastructureError(_unreachable(uri, str(error))) from error
    except (OSError, ValueError, HTTPException) as error:
        raise InfrastructureError(_unreachable(uri, str(error))) from error
    return uri


def _unreachable(uri: str, what: str) -> str:
    return (
        f"MLflow must answer at ASSAY_MLFLOW_TRACKING_URI; {uri} did not: {what}. Start it, "
        "mend the address, or unset it to use the embedded store."
    )


@functools.cache
def connect(settings: Settings) -> "Tracking":
    """Open the tracking store once per process; the embedded one is made on first use.

    Raises:
        InfrastructureError: The server does not answer, or the database cannot be opened.
    """
    uri = check_mlflow(settings)
    import mlflow

    logging.getLogger("mlflow.utils.requirements_utils").setLevel(logging.ERROR)
    root = ""
    if not uri.startswith(("http://", "https://")):  # a server keeps artifacts itself
        folder = mlflow_folder(settings.root)
        with storage_errors(folder):
            (folder / "artifacts").mkdir(parents=True, exist_ok=True)
        root = (folder / "artifacts").as_uri()
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri)
    with exclusive(settings.root, "mlflow"), mlflow_errors(uri):
        if not settings.mlflow_tracking_uri:
            _make_database(mlflow_folder(settings.root) / "mlflow.db")
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)  # two processes must not migrate at once
    return Tracking(client, uri, root)


def has_store(settings: Settings) -> bool:
    """Whether there is anything to read; an embedded store is made by the first run only."""
    return (
        bool(settings.mlflow_tracking_uri) or (mlflow_folder(settings.root) / "mlflow.db").exists()
    )


def _make_database(path: Path) -> None:
    """Make MLflow's tables elsewhere and move them into place, so that they are never half there.

    Hold the lock; an interrupted attempt leaves nothing that a later one could trip over.
    """
    if path.exists():
        return
    import mlflow

    with replace_folder(path.with_name("new")) as folder:
        draft, whole = folder / "draft.db", folder / "whole.db"
        mlflow.MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        with (
            contextlib.closing(sqlite3.connect(draft)) as source,
            contextlib.closing(sqlite3.connect(whole)) as target,
        ):
            source.backup(target)
        whole.replace(path)
    shutil.rmtree(path.with_name("new"))


@contextlib.contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's and its database's refusals into an error that names the store.

    Raises:
        InfrastructureError: The store refused or did not answer.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first = hide_credentials(str(error).strip().split("\n", 1)[0])
        place = hide_credentials(uri)
        raise InfrastructureError(
            f"MLflow must store what a run gives it; {place} refused: {first}. See that the "
            "server or the database file is reachable and writable, and run again: finished stages "
            "are kept. If their MLflow run was deleted, retrain with --force; if the embedded "
            "database is damaged, delete the folder mlflow below the state folder to start anew."
        ) from error


@final
class Tracking:
    """Runs of one MLflow store.

    Args:
        client: MLflow's client.
        uri: The tracking URI, for messages.
        artifact_root: Where a new experiment keeps its artifacts; empty leaves it to the server.
    """

    def __init__(self, client: "MlflowClient", uri: str, artifact_root: str = "") -> None:
        self.client = client
        self.uri = uri
        self._artifact_root = artifact_root

    def experiment(self, name: str) -> str:
        """Id of the experiment, created when there is none."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self.uri):
            found = self.client.get_experiment_by_name(name)
            if found is not None:
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(found.experiment_id)
                return str(found.experiment_id)
            location = f"{self._artifact_root}/{name}" if self._artifact_root else None
            try:
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException:
                found = self.client.get_experiment_by_name(name)
                if found is None:  # else another process made it in between
                    raise
                return str(found.experiment_id)

    def identity(self, experiment: str) -> str:
        """Tells this store's experiment from one of the same name elsewhere, or made anew."""
        with mlflow_errors(self.uri):
            found = self.client.get_experiment(self.experiment(experiment))
        return f"{found.experiment_id}-{found.creation_time}"

    def start_run(
        self, experiment: str, name: str, tags: Mapping[str, str], params: Mapping[str, object]
    ) -> str:
        """Create a run that says which process owns it, and return its id."""
        from mlflow.entities import Param

        with mlflow_errors(self.uri):
            run = self.client.create_run(
                self.experiment(experiment), run_name=name, tags={**tags, **_owner()}
            )
            run_id = str(run.info.run_id)
            values = [Param(k, str(v)[:_PARAM_CHARACTERS]) for k, v in params.items()]
            self.client.log_batch(run_id, params=values)
        return run_id

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step, in batches of the size and under names that MLflow accepts."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(_name_of(name), value, now, step) for name, value in metrics.items()]
        with mlflow_errors(self.uri):
            for start in range(0, len(values), METRICS_PER_BATCH):
                self.client.log_batch(run_id, metrics=values[start : start + METRICS_PER_BATCH])

    def history(self, run_id: str, metric: str) -> dict[int, float]:
        """Values of a metric by step, the last one where a step was logged again."""
        with mlflow_errors(self.uri):
            found = self.client.get_metric_history(run_id, metric)
        return {value.step: value.value for value in sorted(found, key=lambda m: m.timestamp)}

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        with mlflow_errors(self.uri):
            for name, value in tags.items():
                self.client.set_tag(run_id, TAG + name, value)

    def resume(self, run_id: str) -> None:
        """Mark a run as running in this process, whatever it was before."""
        with mlflow_errors(self.uri):
            self.client.update_run(run_id, status="RUNNING")
            for name, value in _owner().items():
                self.client.set_tag(run_id, name, value)

    def status(self, run_id: str) -> str:
        """Where a run stands: ``RUNNING``, ``FINISHED``, ``FAILED``, ``KILLED``; empty if gone."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self.uri):
            try:
                return str(self.client.get_run(run_id).info.status)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return ""
                raise

    def finish(self, run_id: str, status: str) -> None:
        """End a run with ``FINISHED``, ``FAILED`` or ``KILLED``."""
        with mlflow_errors(self.uri):
            self.client.set_terminated(run_id, status)

    def put(self, run_id: str, path: Path, folder: str) -> Artifact:
        """Upload a file and return the reference by which it is found again."""
        with mlflow_errors(self.uri):
            self.client.log_artifact(run_id, str(path), folder)
        return Artifact(
            uri=f"runs:/{run_id}/{folder}/{path.name}",
            sha256=digest_file(path),
            size=path.stat().st_size,
        )

    def fetch(self, artifact: Artifact, into: Path) -> Path:
        """Download a file into a folder and prove that it is the one that was recorded.

        Raises:
            InfrastructureError: It is gone, or its bytes have changed.
        """
        run_id, name = artifact.uri.removeprefix("runs:/").split("/", 1)
        with mlflow_errors(self.uri):
            path = Path(self.client.download_artifacts(run_id, name, str(into)))
        found = digest_file(path)
        if found != artifact.sha256:
            raise InfrastructureError(
                f"a stored artifact must keep its bytes; {artifact.uri} was recorded with sha256 "
                f"{artifact.sha256[:12]} and now has {found[:12]}. Find out who changed it, and "
                "retrain with --force."
            )
        return path

    def read_record(self, run_id: str, stage: str) -> str:
        """The JSON that a stage left in a run.

        Raises:
            ConfigError: There is none: no such run, or the stage has not passed there.
        """
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                path = self.client.download_artifacts(run_id, f"records/{stage}.json", folder)
            except (MlflowException, OSError) as error:
                raise ConfigError(
                    f"run_id must be an MLflow run in which {stage} has passed; {run_id!r} is not. "
                    "Take the run id from the summary of a run, or from the MLflow UI."
                ) from error
            return Path(path).read_text(encoding="utf-8")

    def reconcile(self, experiment: str) -> list[str]:
        """Mark runs of this machine whose process has died as ``KILLED``, and return their ids."""
        with mlflow_errors(self.uri):
            filters = (
                f"attributes.status = 'RUNNING' and tags.`{TAG}host` = '{socket.gethostname()}'"
            )
            running = self.client.search_runs([self.experiment(experiment)], filters)
        owners = {run.info.run_id: run.data.tags.get(TAG + "pid", "") for run in running}
        dead = [run_id for run_id, pid in owners.items() if pid.isdigit() and not _alive(int(pid))]
        for run_id in dead:
            self.finish(run_id, "KILLED")
        return dead


def _name_of(metric: str) -> str:
    """A metric's name as MLflow takes it; a slice may be named after a value such as ``AT&T``."""
    parts = re.sub(r"[^\w\-. :/]", "_", metric).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)


def _owner() -> dict[str, str]:
    return {TAG + "host": socket.gethostname(), TAG + "pid": str(os.getpid())}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
