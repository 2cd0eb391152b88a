"""The stage ``validate`` as a flow of its own: another work pool, or a run by hand."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow
from components.records import TrainedModel, ValidatedModel
from flows.parameters import RunId
from tasks import validate as stage
from tasks.resume import find_record, released


@flow(name="validate", result_serializer="json")
def validate(run_id: RunId) -> ValidatedModel:
    """Run the gates on a trained model again."""
    enter_flow()
    return released(stage.validate(find_record(TrainedModel, "train", run_id)))
