"""The records that pass from stage to stage, all on one page.

    Job -> TrainedModel -> ValidatedModel -> ExportedModel -> RegisteredModel
        -> SmokeTestedModel -> Decision

Each stage takes the previous stage's record and returns its own, so an order that skips a gate is a
type error. A record holds references, metrics, seconds and evidence as JSON; never a live module,
never an array, never a secret.
"""

from datetime import date
from typing import Literal

from pydantic import BaseModel, ConfigDict

from components.digest import digest_json


class Record(BaseModel):
    """A frozen JSON value; unknown fields are refused."""

    # A metric may be NaN, which JSON has not: as null it could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Artifact(Record):
    """A file of the MLflow run, found again by ``uri`` and trusted only if ``sha256`` agrees."""

    uri: str
    sha256: str
    size: int


class Stage(Record):
    """How a record came about: seconds spent, and the Prefect flow run that spent them."""

    seconds: float
    flow_run_id: str


class Job(Record):
    """What a run was asked for, resolved to digests; its ``key`` decides what is cached.

    ``row_key`` names the columns that together tell rows apart.
    """

    pipeline: str
    as_of: date
    window: str
    seed: int
    config: dict[str, str | int | float | bool]
    data_fingerprint: str
    code_digest: str
    code_revision: str
    config_digest: str
    rows: dict[str, int]
    excluded: dict[str, int]
    force_token: str = ""
    row_key: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Digest over data, code and config: equal keys train equal weights."""
        return digest_json(
            [
                self.pipeline,
                self.data_fingerprint,
                self.code_digest,
                self.config_digest,
                self.force_token,
            ]
        )


class TrainedModel(Record):
    """Weights (safetensors) and how they were reached."""

    job: Job
    run_id: str
    weights: Artifact
    encoding: Artifact
    device: str
    environment: dict[str, str]
    epochs: int
    best_epoch: int
    train_loss: float
    validation_loss: float
    stage: Stage

    @property
    def key(self) -> str:
        """Digest of the job and of the weights that it gave."""
        return digest_json([self.job.key, self.run_id, self.weights.sha256, self.encoding.sha256])


class ValidatedModel(Record):
    """A trained model that every gate of validate passed; ``page`` shows what they found.

    ``intervals`` are the ends of 95 % confidence intervals of metrics, ``pictures`` those of the
    page.
    """

    trained: TrainedModel
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = {}
    contract_report: Artifact
    gradient_report: Artifact
    gates_report: Artifact
    leakage_report: Artifact
    source_report: Artifact
    page: Artifact
    pictures: tuple[Artifact, ...] = ()
    stage: Stage

    @property
    def key(self) -> str:
        """The trained model's: validation adds evidence, no bytes."""
        return self.trained.key


class VariantModel(Record):
    """A smaller form of the model that kept its own bounds; differences are from the main file.

    ``difference`` is the largest absolute one of an output, ``metric_difference`` that of the
    deciding metric on the held-out rows, negative where the variant is worse.
    """

    kind: str
    onnx: Artifact
    difference: float
    metric_difference: float
    p50_ms: float


class ExportedModel(Record):
    """The ONNX files of a validated model, equal to it within tolerance.

    ``onnx`` is what is registered; for rows with columns it takes them as they are, and ``tensor``
    is the network alone, for engines without the operators that read them.
    """

    validated: ValidatedModel
    onnx: Artifact
    golden: Artifact
    tensor: Artifact | None = None
    tensor_golden: Artifact | None = None
    variants: tuple[VariantModel, ...] = ()
    parity_report: Artifact
    opset: int
    stage: Stage


class RegisteredModel(Record):
    """A version of the registered model, holding exactly the exported bytes."""

    exported: ExportedModel
    model: str
    version: int
    source: str
    created: bool
    signed: bool = False
    stage: Stage


class Latency(Record):
    """Milliseconds of a single-row call in the child; rows a second in batches of 1024."""

    p50_ms: float
    p95_ms: float = 0.0
    p99_ms: float
    rows_per_s: float = 0.0


class SmokeTestedModel(Record):
    """A registered version that answered correctly in a clean process."""

    registered: RegisteredModel
    golden_rows: int
    max_difference: float
    batch_sizes: tuple[int, ...]
    latency: Latency
    providers: tuple[str, ...]
    engines: tuple[str, ...] = ()
    stage: Stage


Verdict = Literal["promoted", "kept_champion", "candidate", "rejected"]


class Decision(Record):
    """Who is champion after this run, and why."""

    tested: SmokeTestedModel
    decision: Verdict
    champion: int | None
    reason: str
    metric: str
    candidate_score: float
    champion_score: float | None
    holdout_rows: int
    stage: Stage


StageRecord = TrainedModel | ValidatedModel | ExportedModel | RegisteredModel | SmokeTestedModel


class Rejection(Record):
    """A gate's no: which stage, why, and the last record before it, if any."""

    stage_name: str
    failures: tuple[str, ...]
    culprit: str | None
    metrics: dict[str, float]
    given: Job | StageRecord
    stage: Stage


def lineage(record: Job | StageRecord | Decision) -> dict[str, StageRecord | Decision]:
    """A record and those it came from by stage name, the first stage first; a job has none."""
    match record:
        case Job():
            return {}
        case TrainedModel():
            return {"train": record}
        case ValidatedModel():
            return {**lineage(record.trained), "validate": record}
        case ExportedModel():
            return {**lineage(record.validated), "export": record}
        case RegisteredModel():
            return {**lineage(record.exported), "register": record}
        case SmokeTestedModel():
            return {**lineage(record.registered), "smoke_test": record}
        case Decision():
            return {**lineage(record.tested), "decide": record}


def mlflow_run(record: Job | StageRecord) -> str:
    """The MLflow run that a record belongs to; a job has none yet."""
    trained = lineage(record).get("train")
    return trained.run_id if isinstance(trained, TrainedModel) else ""


def job_of(record: Job | StageRecord) -> Job:
    """The job that a record belongs to."""
    if isinstance(record, Job):
        return record
    trained = lineage(record)["train"]
    assert isinstance(trained, TrainedModel), "every lineage begins with training"
    return trained.job
