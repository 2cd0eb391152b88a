"""Train on another work pool: the job goes there, and its record comes back, through MLflow.

No disk is shared. ``retrain`` stores the job in the MLflow run, and starts the deployment of the
flow ``train`` with the run's id; that flow refuses if it sees other data or other code, and trains
into the run. The record that it leaves there is the stage's result.
"""

import contextlib

from pydantic import ValidationError

from components.adapters import prefect_deployments
from components.adapters.mlflow_tracking import connect
from components.adapters.prefect_deployments import Ended, RemoteRun, find_pool, start_run
from components.digest import digest_json
from components.errors import AssayError, ConfigError, GateError, InfrastructureError
from components.interruption import interrupt_received
from components.pipeline import load_pipeline
from components.plan import code_digest, resolve_config
from components.records import Job, Rejection, TrainedModel
from components.state import make_root
from tasks.runtime import Workspace, current_settings

JOB = "job"
REJECTION = "rejection"


def check_placement() -> None:
    """Prove that training can be sent where the settings say, before anything is recorded.

    Raises:
        ConfigError: The deployment does not exist, or one of the servers is an embedded one.
        InfrastructureError: Prefect does not answer.
    """
    settings = current_settings()
    prefect_deployments.check_placement(settings, prefect_deployments.server_address())
    if settings.train_deployment:
        find_pool(settings.train_deployment)


def train_elsewhere(space: Workspace, job: Job, deployment: str) -> TrainedModel:
    """Have a worker train the job into the workspace's MLflow run, and wait for it.

    Raises:
        GateError: A gate said no there.
        ConfigError: There is no such deployment.
        InfrastructureError: The run there failed, crashed or was cancelled.
    """
    space.keep(job, JOB)
    parameters = {"pipeline": job.pipeline, "as_of": str(job.as_of), "seed": job.seed}
    child = start_run(
        deployment, {**parameters, "run_id": space.run_id}, key=f"train-{space.run_id}"
    )
    try:
        space.log.info("Flow run %s trains on work pool %s", child, child.pool)
        space.tracking.tag(space.run_id, {"train_flow_run_id": child.flow_run_id})
        ended = child.wait(space.log)
    except BaseException:
        interrupt_received()
        child.cancel(space.log)
        raise
    space.tracking.resume(space.run_id)  # the worker's process closed it
    if not ended.completed:
        raise _failure(space, child, ended)
    # Its seconds there, without those in the queue, are in that flow run.
    return _result(space, job, child).model_copy(update={"stage": space.ended()})


def _failure(space: Workspace, child: RemoteRun, ended: Ended) -> AssayError:
    if ended.kind == "FAILED":
        with contextlib.suppress(ConfigError):  # there is none: no gate was asked
            text = space.tracking.read_record(space.run_id, REJECTION)
            found = Rejection.model_validate_json(text)
            return GateError(
                found.stage_name, found.failures, culprit=found.culprit, metrics=found.metrics
            )
    return InfrastructureError(
        f"training on work pool {child.pool} must complete; flow run {child} ended as "
        f"{ended.kind.lower()}: {ended.message.rstrip('.')}. Its log in Prefect tells more. Run "
        "again, or unset ASSAY_TRAIN_DEPLOYMENT to train here."
    )


def _result(space: Workspace, job: Job, child: RemoteRun) -> TrainedModel:
    try:
        trained = TrainedModel.model_validate_json(
            space.tracking.read_record(space.run_id, "train")
        )
    except (ConfigError, ValidationError) as error:
        raise InfrastructureError(
            f"training must leave its record in MLflow run {space.run_id}; flow run {child} "
            f"completed, and there is none that can be read: {error} See that its worker runs this "
            "version of assay."
        ) from error
    if trained.job != job or trained.run_id != space.run_id:
        raise InfrastructureError(
            f"flow run {child} must train the job that it was given; its record in MLflow run "
            f"{space.run_id} is that of another one. Find out who wrote it, and run again."
        )
    return trained


def adopted_job(run_id: str) -> Job:
    """The job that ``retrain`` left in an MLflow run, if code and configuration are the same here.

    Whether the data is the same shows when it is read.

    Raises:
        ConfigError: There is no job, or code or configuration differ here.
    """
    make_root(current_settings().root)
    job = _read_job(run_id)
    pipeline = load_pipeline(job.pipeline)
    _require_equal("code_digest", job.code_digest, code_digest(pipeline), job)
    assignments = [f"{name}={value}" for name, value in job.config.items() if name != "seed"]
    config = resolve_config(pipeline, job.seed, assignments).model_dump(mode="json")
    _require_equal("config_digest", job.config_digest, digest_json(config), job)
    return job


def _read_job(run_id: str) -> Job:
    tracking = connect(current_settings())
    try:
        return Job.model_validate_json(tracking.read_record(run_id, JOB))
    except ConfigError as error:
        raise ConfigError(
            f"run_id must be an MLflow run in which retrain left a job; {run_id!r} at "
            f"{tracking.uri} is not. Set ASSAY_MLFLOW_TRACKING_URI on this worker to the server "
            "that retrain uses."
        ) from error
    except ValidationError as error:
        raise ConfigError(
            f"the job in MLflow run {run_id} must be one of this version of assay; it is not: "
            f"{error.error_count()} fields differ. Install the same revision on both machines."
        ) from error


def _require_equal(name: str, given: str, here: str, job: Job) -> None:
    if given != here:
        raise ConfigError(
            f"a worker must see what the job was planned with; {name} is {given[:12]} in the job "
            f"and {here[:12]} here. Install the same revision of assay and of the pipeline "
            f"({job.code_revision}), and the same lock file, on both machines."
        )
