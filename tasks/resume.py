"""The record that a stage run by hand goes on from."""

from typing import TypeVar

from components.adapters.mlflow_tracking import connect
from components.records import StageRecord
from tasks.runtime import current_settings

StageRecordT = TypeVar("StageRecordT", bound=StageRecord)


def find_record(kind: type[StageRecordT], stage: str, run_id: str) -> StageRecordT:
    """The record that a stage left in an MLflow run.

    Raises:
        ConfigError: The run has no such record: the stage has not passed there.
        InfrastructureError: MLflow cannot be used.
    """
    text = connect(current_settings()).read_record(run_id, stage)
    return kind.model_validate_json(text)
