"""Plan: from flow parameters to a job; a plain function, since it decides what may be cached."""

from collections.abc import Iterable
from datetime import date

from prefect.runtime import flow_run

from components.adapters.mlflow_tracking import connect
from components.adapters.prefect_runtime import run_logger
from components.pipeline import load_pipeline
from components.plan import plan_job
from components.records import Job
from components.state import make_root
from tasks.runtime import current_settings


def plan(pipeline: str, as_of: date, seed: int, settings: Iterable[str], force: bool) -> Job:
    """Resolve and digest what a run was asked for, and close runs that died before.

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
    for run_id in connect(configuration).reconcile(chosen.name):
        log.warning("MLflow run %s was left running by a process that died; now KILLED", run_id)
    return job
