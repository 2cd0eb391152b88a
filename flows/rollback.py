"""The flow ``rollback``: the champion before the present one, or another, by hand in Prefect."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow
from flows.parameters import EarlierVersion, ModelName, Reason
from tasks import promotion
from tasks.promotion import Moved
from tasks.runtime import current_settings


@flow(name="rollback", result_serializer="json", validate_parameters=True)
def rollback(model: ModelName, reason: Reason, version: EarlierVersion = 0) -> Moved:
    """Prove an earlier version anew and make it champion again."""
    enter_flow()
    moved = promotion.roll_back(current_settings(), model, version or None, reason)
    return promotion.announced(moved)
