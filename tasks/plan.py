"""Plan: from flow parameters to a job; a plain function, since it decides what may be cached."""

from collections.abc import Iterable
from datetime import date

from prefect.runtime import flow_run

from components.adapters.mlflow_ledger import Ledger
from components.adapters.mlflow_registry import Registry
from components.adapters.mlflow_tracking import connect
from components.adapters.prefect_runtime import run_logger
from components.decide.moves import reconcile
from components.pipeline import load_pipeline
from components.plan import plan_job
from components.records import Job
from components.settings import Settings
from components.state import exclusive, make_root
from tasks.promotion import lock_of
from tasks.release import withdraw_dead
from tasks.runtime import current_settings


def plan(pipeline: str, as_of: date, seed: int, settings: Iterable[str], force: bool) -> Job:
    """Resolve and digest what a run was asked for, and tidy up after runs that died before.

    Raises:
        UsageError: The pipeline, a setting or the data cannot be used.
        InfrastructureError: The state folder or MLflow cannot be used.
    """
    configuration = current_settings()
    make_root(configuration.root)
    chosen = load_pipeline(pipeline)
    job = plan_job(
        chosen,
        configuration,
        as_of=as_of,
        seed=seed,
        assignments=settings,
        force_token=str(flow_run.id) if force else "",
    )
    log = run_logger()
    log.info("%s: %s (%s rows)", job.pipeline, job.window, f"{sum(job.rows.values()):,}")
    _tidy(configuration, chosen.name)
    return job


def _tidy(configuration: Settings, model: str) -> None:
    """Close what runs that died have left open: MLflow runs, unproved versions, a half move."""
    log = run_logger()
    tracking = connect(configuration)
    for run_id in tracking.reconcile(model):
        log.warning("MLflow run %s was left running by a process that died; now KILLED", run_id)
    registry = Registry(tracking, model)
    for version in withdraw_dead(tracking, registry):
        log.warning("Version %d was never judged, and its run is dead; now rejected", version)
    with exclusive(configuration.root, lock_of(model)):
        reconcile(Ledger(tracking, registry), log.warning)
