"""A version rebuilt in this process with the code that is here, and held against its record."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from components.adapters.mlflow_registry import Registry, Version
from components.adapters.mlflow_tracking import Tracking
from components.digest import digest_file
from components.errors import AssayError, ConfigError
from components.pipeline import Pipeline
from components.plan import code_digest
from components.records import ExportedModel, Record, TrainedModel
from components.register.tags import version_tags
from components.reproduce import (
    Check,
    Difference,
    Rebuilt,
    Reproduction,
    compare,
    compare_environment,
    conclude,
    config_here,
    measure_outputs,
    measure_weights,
    read_config,
    rebuild,
)
from components.reproduce_rows import read_rows_again
from components.settings import Settings
from components.train.environment import training_environment

RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True)
class Named:
    """The version that the command line names, and where it was found."""

    tracking: Tracking
    registry: Registry
    version: Version

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.registry.model} version {self.version.number}"


def say(what: str, text: str) -> None:
    """Tell on stderr what is being done."""
    sys.stderr.write(f"{what:<11}  {text}\n")
    sys.stderr.flush()


def rebuild_here(
    named: Named, pipeline: Pipeline, settings: Settings, folder: Path
) -> Reproduction:
    """Read the record, rebuild the version, and compare.

    Args:
        named: The version.
        pipeline: With the code that is here.
        settings: Say where data and snapshots lie.
        folder: Takes all files; the caller removes it.

    Raises:
        UsageError: The record cannot be read, or code or data cannot be used.
        InfrastructureError: MLflow, a disk or a device failed.
        GateError: The rebuilt model cannot be trained or exported.
    """
    trained = _record(named, "train", TrainedModel)
    exported = _record(named, "export", ExportedModel)
    job = trained.job
    reading = read_config(pipeline, job)
    config, foreseen = config_here(reading.config, trained.device)
    for note in foreseen:
        say("notice", note)
    say("data", f"reading from the source: {job.window}")
    rows = read_rows_again(pipeline, settings, job, folder / "snapshots")
    code = compare("code", job.code_digest, code_digest(pipeline))
    say("training", f"{sum(rows.snapshot.rows.values()):,} rows, at most {config.epochs} epochs")
    began = time.perf_counter()
    rebuilt = rebuild(pipeline, config, job, rows.snapshot, folder)
    say("training", f"{time.perf_counter() - began:.1f} s with export")
    checks = [*rows.checks, reading.check, code, *_files(trained, exported, named, rebuilt)]
    checks += [_registered_file(named, folder), *_contradictions(named, trained, exported)]
    difference: Difference | None = None
    measured: tuple[str, ...] = ()
    if any(check.what in ("weights", "onnx") and not check.agrees for check in checks):
        difference, measured = _difference(named, trained, exported, rebuilt, folder)
    environment = compare_environment(trained, training_environment(rebuilt.device), rebuilt.device)
    verdict = conclude(named.name, tuple(checks), environment, difference)
    return Reproduction(
        model=named.registry.model,
        version=named.version.number,
        mlflow_run_id=trained.run_id,
        code="here",
        agrees=all(check.agrees is not False for check in checks),
        verdict=verdict,
        checks=tuple(checks),
        environment=environment,
        notes=(*foreseen, *rows.notes, *reading.notes, *measured),
        difference=difference,
        seconds=0.0,
    )


def _record(named: Named, stage: str, kind: type[RecordT]) -> RecordT:
    rule = f"{named.name} must have the record of its stage {stage} in MLflow run"
    try:
        return kind.model_validate_json(named.tracking.read_record(named.version.run_id, stage))
    except ValidationError as error:
        raise ConfigError(
            f"{rule} {named.version.run_id}, as this version of assay writes it; "
            f"{error.error_count()} of its fields differ. Check out the code that trained it, "
            f"{named.version.tags.get('code_revision', 'unknown')}."
        ) from None
    except ConfigError as error:
        raise ConfigError(
            f"{rule} {named.version.run_id or '(none)'}; it is not there. Without it, nothing says "
            "how the version was trained: retrain, and register anew."
        ) from error


def _files(
    trained: TrainedModel, exported: ExportedModel, named: Named, rebuilt: Rebuilt
) -> list[Check]:
    onnx = named.version.tags.get("onnx_sha256", exported.onnx.sha256)
    return [
        compare("encoding", trained.encoding.sha256, digest_file(rebuilt.encoding)),
        compare("weights", trained.weights.sha256, digest_file(rebuilt.weights)),
        compare("onnx", onnx, digest_file(rebuilt.onnx)),
    ]


def _registered_file(named: Named, folder: Path) -> Check:
    """Whether the registry still has the bytes that were registered."""
    apart = folder / "version"
    apart.mkdir()
    path = named.registry.fetch(named.version.number, apart)
    found = digest_file(path) if path.is_file() else "missing"
    return compare("registered", named.version.tags.get("onnx_sha256", "not recorded"), found)


def _contradictions(named: Named, trained: TrainedModel, exported: ExportedModel) -> list[Check]:
    """Where the version's tags and the run's records do not tell the same; usually nowhere."""
    said = {**version_tags(exported), "weights": exported.validated.trained.weights.sha256}
    tags = {**named.version.tags, "weights": trained.weights.sha256}
    return [
        compare(f"record of {name}", tags[name], value)
        for name, value in said.items()
        if tags.get(name, value) != value  # an older version may lack a tag
    ]


def _difference(
    named: Named, trained: TrainedModel, exported: ExportedModel, rebuilt: Rebuilt, folder: Path
) -> tuple[Difference, tuple[str, ...]]:
    """How far the rebuilt model is from the registered one; what cannot be had is said."""
    difference, notes = Difference(), []
    apart = folder / "recorded"
    apart.mkdir()
    try:
        registered = named.tracking.fetch(trained.weights, apart)
        difference, problem = measure_weights(registered, rebuilt.weights)
        notes.append(problem)
    except AssayError as error:
        notes.append(f"weights: not compared: {error}")
    try:
        golden = named.tracking.fetch(exported.tensor_golden or exported.golden, apart)
        outputs, problem = measure_outputs(rebuilt.model, golden)
        difference = difference.model_copy(update={"outputs": outputs})
        notes.append(problem)
    except AssayError as error:
        notes.append(f"outputs: not compared: {error}")
    return difference, tuple(filter(None, notes))
