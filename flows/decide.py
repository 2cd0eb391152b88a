"""The stage ``decide`` as a flow of its own: another work pool, or a run by hand."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow
from components.records import Decision, SmokeTestedModel
from flows.parameters import RunId
from tasks import decide as stage
from tasks.release import proving
from tasks.resume import find_record


@flow(name="decide", result_serializer="json")
def decide(run_id: RunId) -> Decision:
    """Compare a proved version with the present champion again."""
    enter_flow()
    tested = find_record(SmokeTestedModel, "smoke_test", run_id)
    with proving(tested.registered):
        return stage.decide(tested)
