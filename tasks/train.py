"""Train: rows to weights."""

from prefect import task

from components.records import Job, TrainedModel
from tasks.checkpoints import drop_checkpoints
from tasks.runtime import current_settings, keyed, stage
from tasks.train_remote import train_elsewhere
from tasks.training import start_run, train_here


@task(
    name="train",
    cache_key_fn=keyed("train"),
    persist_result=True,
    result_serializer="json",
)
def train(job: Job) -> TrainedModel:
    """Train the job's model, here or where the settings say; the weights go to a new MLflow run.

    Raises:
        InfrastructureError: A required GPU is absent, a worker failed, or MLflow cannot be used.
        GateError: The loss stopped being finite.
    """
    deployment = current_settings().train_deployment
    if not deployment:
        return train_here(job)
    with stage("train", job) as space:
        space.run_id = start_run(space, job)
        return space.keep(train_elsewhere(space, job, deployment))


@task(
    name="train",
    cache_key_fn=keyed("train"),
    persist_result=True,
    result_serializer="json",
)
def train_alone(job: Job) -> TrainedModel:
    """Train the job's model in this process, whatever the settings say; else as :func:`train`."""
    return train_here(job)


@task(name="train", result_serializer="json", persist_result=False)
def train_into(job: Job, run_id: str) -> TrainedModel:
    """Train the job's model in this process, into the MLflow run of whoever waits for it.

    Not cached: the weights must lie in that run. Its checkpoints are on this machine, so they go
    here.
    """
    trained = train_here(job, run_id)
    drop_checkpoints(current_settings(), job)
    return trained
