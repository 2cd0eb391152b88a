"""The stage ``smoke-test`` as a flow of its own: another work pool, or a run by hand."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow
from components.records import RegisteredModel, SmokeTestedModel
from flows.parameters import RunId
from tasks import smoke_test as stage
from tasks.release import proving
from tasks.resume import find_record, released


@flow(name="smoke-test", result_serializer="json")
def smoke_test(run_id: RunId) -> SmokeTestedModel:
    """Prove a registered version in a clean process again."""
    enter_flow()
    registered = find_record(RegisteredModel, "register", run_id)
    with proving(registered):
        return released(stage.smoke_test(registered))
