"""The record that a stage run by hand goes on from, and the MLflow run that it leaves."""

from typing import TypeVar

from components.adapters.mlflow_tracking import connect
from components.records import Record, StageRecord, mlflow_run
from tasks.runtime import current_settings

RecordT = TypeVar("RecordT", bound=Record)
StageRecordT = TypeVar("StageRecordT", bound=StageRecord)


def find_record(kind: type[RecordT], stage: str, run_id: str) -> RecordT:
    """The record that a stage left in an MLflow run.

    Raises:
        ConfigError: The run has no such record: the stage has not passed there.
        InfrastructureError: MLflow cannot be used.
    """
    text = connect(current_settings()).read_record(run_id, stage)
    return kind.model_validate_json(text)


def released(record: StageRecordT) -> StageRecordT:
    """Mark the record's MLflow run as finished: no later stage follows in this flow run."""
    connect(current_settings()).finish(mlflow_run(record), "FINISHED")
    return record
