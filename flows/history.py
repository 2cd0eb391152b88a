"""The flow ``history``: who was champion when, as a table in Prefect."""

from prefect import flow

from components.adapters.prefect_runtime import enter_flow, publish_table
from flows.parameters import ModelName
from flows.promotion import rows_of
from tasks import promotion
from tasks.promotion import Champions
from tasks.runtime import current_settings


@flow(name="history", result_serializer="json", validate_parameters=True)
def history(model: ModelName) -> Champions:
    """Look at the history of a model's champions, and publish it."""
    enter_flow()
    champions = promotion.read_champions(current_settings(), model)
    publish_table(f"{model}-history", rows_of(champions), "Who was champion, when and why")
    return champions
