"""The stage ``export`` as a flow of its own: another work pool, or a run by hand."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow
from components.records import ExportedModel, ValidatedModel
from flows.parameters import RunId
from tasks import export as stage
from tasks.resume import find_record, released


@flow(name="export", result_serializer="json")
def export(run_id: RunId) -> ExportedModel:
    """Export a validated model again."""
    enter_flow()
    return released(stage.export(find_record(ValidatedModel, "validate", run_id)))
