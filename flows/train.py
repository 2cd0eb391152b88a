"""The stage ``train`` as a flow of its own: for a ``retrain`` elsewhere, or a run by hand."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow
from components.plan import DEFAULT_AS_OF
from components.records import TrainedModel
from flows.parameters import AsOf, Force, PipelineName, Seed, Settings, TrainInto
from tasks import train as stage
from tasks.plan import plan
from tasks.resume import released
from tasks.train_remote import adopted_job


@flow(name="train", result_serializer="json")
def train(
    pipeline: PipelineName,
    as_of: AsOf = DEFAULT_AS_OF,
    seed: Seed = 0,
    settings: Settings = [],  # noqa: B006  Prefect's form needs the list itself; it is never changed
    force: Force = False,
    run_id: TrainInto = "",
) -> TrainedModel:
    """Train a pipeline's model on this machine; the other stages go on from its MLflow run."""
    enter_flow()
    if run_id:
        return released(stage.train_into(adopted_job(run_id), run_id))
    return released(stage.train_alone(plan(pipeline, as_of, seed, settings, force)))
