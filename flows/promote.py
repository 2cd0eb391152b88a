"""The flow ``promote``: a person's approval, given in Prefect."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow
from flows.parameters import ModelName, Reason, VersionNumber
from tasks import promotion
from tasks.promotion import Moved
from tasks.runtime import current_settings


@flow(name="promote", result_serializer="json", validate_parameters=True)
def promote(model: ModelName, version: VersionNumber, reason: Reason) -> Moved:
    """Prove a version anew and make it champion."""
    enter_flow()
    return promotion.announced(promotion.promote(current_settings(), model, version, reason))
