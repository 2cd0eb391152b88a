"""The stage ``train`` as a flow of its own: on a GPU worker, or a run by hand."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow
from components.plan import DEFAULT_AS_OF
from components.records import TrainedModel
from flows.parameters import AsOf, Force, PipelineName, Seed, Settings
from tasks import train as stage
from tasks.plan import plan
from tasks.resume import released


@flow(name="train", result_serializer="json")
def train(
    pipeline: PipelineName,
    as_of: AsOf = DEFAULT_AS_OF,
    seed: Seed = 0,
    settings: Settings = [],  # noqa: B006  Prefect's form needs the list itself; it is never changed
    force: Force = False,
) -> TrainedModel:
    """Train a pipeline's model; the other stages go on from its MLflow run."""
    enter_flow()
    return released(stage.train(plan(pipeline, as_of, seed, settings, force)))
