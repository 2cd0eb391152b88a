"""The stage ``register`` as a flow of its own: another work pool, or a run by hand."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow
from components.records import ExportedModel, RegisteredModel
from flows.parameters import RunId
from tasks import register as stage
from tasks.resume import find_record, released


@flow(name="register", result_serializer="json")
def register(run_id: RunId) -> RegisteredModel:
    """Register an exported model; one that is registered keeps its version."""
    enter_flow()
    return released(stage.register(find_record(ExportedModel, "export", run_id)))
