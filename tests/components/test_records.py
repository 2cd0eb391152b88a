"""The records: frozen JSON, one chain, keys that see what they must."""

import math
from datetime import date
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from components.records import (
    Artifact,
    Decision,
    ExportedModel,
    Job,
    Latency,
    Record,
    RegisteredModel,
    Rejection,
    SmokeTestedModel,
    Stage,
    TrainedModel,
    ValidatedModel,
    job_of,
    lineage,
    mlflow_run,
)

STAGE = Stage(seconds=1.5, flow_run_id="flow")
JOB = Job(
    pipeline="digits",
    as_of=date(2014, 1, 1),
    window="all",
    seed=3,
    config={"epochs": 2, "learning_rate": 0.1, "device": "cpu", "require_gpu": False},
    data_fingerprint="data",
    code_digest="code",
    code_revision="unknown",
    config_digest="config",
    rows={"train": 8, "holdout": 2},
    excluded={},
)


def artifact(name: str) -> Artifact:
    return Artifact(uri=f"runs:/run/{name}", sha256=name * 4, size=10)


TRAINED = TrainedModel(
    job=JOB,
    run_id="run",
    weights=artifact("weights"),
    encoding=artifact("encoding"),
    device="cpu",
    environment={"torch": "2.13.0"},
    epochs=2,
    best_epoch=1,
    train_loss=0.25,
    validation_loss=0.5,
    stage=STAGE,
)
VALIDATED = ValidatedModel(
    trained=TRAINED,
    metrics={"accuracy": 0.9},
    contract_report=artifact("contract"),
    gradient_report=artifact("gradients"),
    gates_report=artifact("gates"),
    leakage_report=artifact("leakage"),
    source_report=artifact("source"),
    page=artifact("page"),
    stage=STAGE,
)
EXPORTED = ExportedModel(
    validated=VALIDATED,
    onnx=artifact("onnx"),
    golden=artifact("golden"),
    parity_report=artifact("parity"),
    opset=18,
    stage=STAGE,
)
REGISTERED = RegisteredModel(
    exported=EXPORTED, model="digits", version=4, source="models:/x", created=True, stage=STAGE
)
TESTED = SmokeTestedModel(
    registered=REGISTERED,
    golden_rows=4,
    max_difference=0.0,
    batch_sizes=(1, 7),
    latency=Latency(p50_ms=0.5, p99_ms=1.0),
    providers=("CPUExecutionProvider",),
    stage=STAGE,
)
DECISION = Decision(
    tested=TESTED,
    decision="promoted",
    champion=4,
    reason="there was no champion",
    metric="accuracy",
    candidate_score=0.9,
    champion_score=None,
    holdout_rows=2,
    stage=STAGE,
)
CHAIN: tuple[Any, ...] = (TRAINED, VALIDATED, EXPORTED, REGISTERED, TESTED, DECISION)
STAGES = ["train", "validate", "export", "register", "smoke_test", "decide"]


@pytest.mark.parametrize("record", [JOB, *CHAIN], ids=lambda record: type(record).__name__)
def test_a_record_survives_json(record: Record) -> None:
    again = type(record).model_validate_json(record.model_dump_json())
    assert again == record
    assert TypeAdapter(type(record)).validate_python(record.model_dump(mode="json")) == record


@pytest.mark.parametrize("record", [JOB, *CHAIN], ids=lambda record: type(record).__name__)
def test_a_record_is_frozen_and_closed(record: Record) -> None:
    field = next(iter(type(record).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(record, field, None)
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(record).model_validate({**record.model_dump(), "module": object()})


@pytest.mark.parametrize(("count", "record"), list(enumerate(CHAIN, 1)))
def test_the_lineage_begins_with_training(count: int, record: Any) -> None:
    known = lineage(record)
    assert list(known) == STAGES[:count]
    assert known[STAGES[count - 1]] is record
    assert list(known.values()) == list(CHAIN[:count])


def test_a_job_has_no_lineage_and_no_run_yet() -> None:
    assert lineage(JOB) == {}
    assert mlflow_run(JOB) == ""
    assert job_of(JOB) is JOB


@pytest.mark.parametrize("record", CHAIN[:-1], ids=lambda record: type(record).__name__)
def test_every_record_knows_its_run_and_its_job(record: Any) -> None:
    assert mlflow_run(record) == "run"
    assert job_of(record) == JOB


@pytest.mark.parametrize(
    ("later", "earlier"),
    [(ValidatedModel, JOB), (ExportedModel, TRAINED), (RegisteredModel, VALIDATED)],
)
def test_a_record_cannot_be_made_from_one_that_skipped_a_gate(
    later: type[Record], earlier: Record
) -> None:
    known = next(record for record in CHAIN if type(record) is later)
    first = next(iter(later.model_fields))
    with pytest.raises(ValidationError):
        later.model_validate({**known.model_dump(), first: earlier.model_dump()})


@pytest.mark.parametrize("given", [JOB, *CHAIN[:-1]], ids=lambda record: type(record).__name__)
def test_a_rejection_brings_back_the_record_that_it_was_given(given: Any) -> None:
    rejection = Rejection(
        stage_name="validate",
        failures=("no",),
        culprit=None,
        metrics={"accuracy": 0.5},
        given=given,
        stage=STAGE,
    )
    again = Rejection.model_validate_json(rejection.model_dump_json())
    assert type(again.given) is type(given)
    assert again == rejection


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline": "flights"},
        {"data_fingerprint": "other"},
        {"code_digest": "other"},
        {"config_digest": "other"},
        {"force_token": "flow"},
    ],
)
def test_the_key_of_a_job_sees_data_code_and_config(change: dict[str, str]) -> None:
    assert JOB.model_copy(update=change).key != JOB.key


@pytest.mark.parametrize(
    "change", [{"as_of": date(2015, 1, 1)}, {"window": "other"}, {"code_revision": "abc"}]
)
def test_the_key_of_a_job_does_not_see_what_changes_no_weight(change: dict[str, object]) -> None:
    assert JOB.model_copy(update=change).key == JOB.key


def test_the_key_of_a_model_sees_its_bytes_its_run_and_its_job() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"run_id": "other"},
        {"weights": artifact("other")},
        {"encoding": artifact("other")},
        {"job": JOB.model_copy(update={"force_token": "x"})},
    ]
    keys = {TRAINED.model_copy(update=change).key for change in changes}
    assert len(keys) == len(changes)
    assert TRAINED.model_copy(update={"stage": Stage(seconds=9, flow_run_id="z")}).key in keys


def test_validation_adds_evidence_and_keeps_the_key() -> None:
    assert VALIDATED.key == TRAINED.key


def test_a_verdict_is_one_of_three() -> None:
    with pytest.raises(ValidationError, match="kept_champion"):
        Decision.model_validate({**DECISION.model_dump(), "decision": "promote"})


def test_a_metric_that_is_no_number_is_read_back() -> None:
    """One that no gate looks at may be NaN; a record that cannot be read would block every run."""
    given = VALIDATED.model_copy(update={"metrics": {"odd": math.nan, "far": -math.inf}})
    again = ValidatedModel.model_validate_json(given.model_dump_json())
    assert math.isnan(again.metrics["odd"]) and again.metrics["far"] == -math.inf
