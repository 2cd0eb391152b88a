"""Rebuilding a registered version from its record, and saying where the digests differ.

A reproduction trains: it reads neither checkpoints nor cached results, and keeps nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load as load_tensors

from components.contract import Model
from components.data.snapshot import Snapshot
from components.digest import digest_json
from components.errors import ConfigError, ContractError
from components.export.golden import read_golden
from components.export.predictors import TorchPredictor
from components.export.run import run_export
from components.pipeline import Pipeline
from components.records import Job, TrainedModel
from components.settings import describe_validation
from components.threads import single_threaded
from components.train.config import TrainConfig
from components.train.run import load_model, run_training, write_files


class Value(BaseModel):
    """A frozen JSON value; unknown fields are passed over: another commit may have written it."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Check(Value):
    """One thing that was recorded, and what it is when rebuilt; None where nothing was compared."""

    what: str
    recorded: str
    rebuilt: str
    agrees: bool | None


class Difference(Value):
    """How far rebuilt and registered weights, and their outputs, are apart.

    Args:
        weight: Largest absolute difference of a weight; None where it could not be had.
        tensor: The tensor in which that weight is.
        outputs: Largest absolute difference of an output on the golden rows, by name.
    """

    weight: float | None = None
    tensor: str = ""
    outputs: dict[str, float] = {}


class Reproduction(Value):
    """What ``assay reproduce`` found; its fields are an interface.

    ``code`` is the commit whose code rebuilt the version, or ``here``.
    """

    model: str
    version: int
    mlflow_run_id: str
    code: str
    agrees: bool
    verdict: str
    checks: tuple[Check, ...]
    environment: tuple[Check, ...]
    notes: tuple[str, ...]
    difference: Difference | None
    seconds: float


@dataclass(frozen=True)
class Rebuilt:
    """What a reproduction trained and exported, in a folder that goes when it ends."""

    weights: Path
    encoding: Path
    onnx: Path
    device: str
    model: Model


class Reading(NamedTuple):
    """A recorded configuration as the code that is here reads it."""

    config: TrainConfig
    check: Check
    notes: tuple[str, ...]


def compare(what: str, recorded: str, rebuilt: str) -> Check:
    """A check of two digests, or of two other texts."""
    return Check(what=what, recorded=recorded, rebuilt=rebuilt, agrees=recorded == rebuilt)


def read_config(pipeline: Pipeline, job: Job) -> Reading:
    """Read a job's configuration with the pipeline that is here.

    Raises:
        ConfigError: It has a setting that is unknown here, or out of range.
    """
    try:
        config = type(pipeline.config).model_validate(job.config)
    except ValidationError as error:
        raise ConfigError(
            f"the recorded configuration must be one that pipeline {pipeline.name!r} takes; "
            f"{describe_validation(error)} Check out the recorded code {job.code_revision}."
        ) from None
    values = config.model_dump(mode="json")
    names = sorted(values.keys() | job.config.keys())
    notes = tuple(
        f"config: {name} was {job.config.get(name, 'not set')} and is read as "
        f"{values.get(name, 'not set')}."
        for name in names
        if values.get(name) != job.config.get(name)
    )
    return Reading(config, compare("config", job.config_digest, digest_json(values)), notes)


def config_here(config: TrainConfig, device: str) -> tuple[TrainConfig, tuple[str, ...]]:
    """The configuration to train with on this machine, and why its bytes cannot agree, if so.

    Args:
        config: The recorded one.
        device: That the version was trained on, in PyTorch's words.
    """
    recorded = torch.device(device).type
    here = recorded if recorded == "cpu" or torch.cuda.is_available() else "cpu"
    notes = []
    if here != recorded:
        notes.append(
            f"it was trained on {recorded} and is rebuilt on {here}, where sums are rounded in "
            "another order: its bytes will differ."
        )
    if config.workers > 1:
        notes.append(
            f"it was trained by {config.workers} processes and is rebuilt by one, which adds up "
            "gradients in another order: its bytes may differ."
        )
    changes = {"device": here, "require_gpu": False, "workers": 1, "shards": config.parts}
    return config.model_copy(update=changes), tuple(notes)


def rebuild(
    pipeline: Pipeline, config: TrainConfig, job: Job, snapshot: Snapshot, folder: Path
) -> Rebuilt:
    """Train and export in this process, from the first step.

    Args:
        pipeline: With the code that is here.
        config: As :func:`config_here` gives it.
        job: The recorded one; its digests travel in the ONNX file.
        snapshot: The rows.
        folder: Where the files go; it must exist.

    Raises:
        AssayError: As training and export raise.
    """
    with single_threaded():
        trained, encoding = run_training(pipeline, config, snapshot)
        files = write_files(trained, encoding, folder)
        model, encoding = load_model(pipeline, config, files.encoding, files.weights)
        exported = run_export(pipeline, model, encoding, snapshot, job, folder).files
    return Rebuilt(files.weights, files.encoding, exported.onnx, trained.device, model)


def compare_environment(
    recorded: TrainedModel, here: Mapping[str, str], device: str
) -> tuple[Check, ...]:
    """Device, engines and machine, one check each."""
    before = {"device": recorded.device, **recorded.environment}
    after = {"device": device, **here}
    names = [*before, *(name for name in after if name not in before)]
    return tuple(
        compare(name, before.get(name, "not recorded"), after.get(name, "not known"))
        for name in names
    )


def measure_weights(registered: Path, rebuilt: Path) -> tuple[Difference, str]:
    """The largest difference of a weight, or why there is none that could be measured.

    Args:
        registered: The safetensors file of the version.
        rebuilt: That of the reproduction.
    """
    before, after = (load_tensors(path.read_bytes()) for path in (registered, rebuilt))
    shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (before, after)]
    unlike = sorted(
        name for name in before.keys() | after.keys() if shapes[0].get(name) != shapes[1].get(name)
    )
    if unlike:
        names = ", ".join(unlike[:8]) + (", ..." if len(unlike) > 8 else "")
        return Difference(), f"weights: tensors of other names or shapes: {names}."
    gaps = {
        name: _largest(tensor.double().numpy(), after[name].double().numpy())
        for name, tensor in before.items()
    }
    worst = max(gaps, key=lambda name: gaps[name])
    if gaps[worst] == np.inf:
        return Difference(), f"weights: {worst} has a value that is no number on one side only."
    return Difference(weight=gaps[worst], tensor=worst), ""


def measure_outputs(model: Model, golden: Path) -> tuple[dict[str, float], str]:
    """Largest differences of the outputs on the golden rows, or why they cannot be compared.

    Raises:
        DataError: The file of golden rows is damaged.
    """
    inputs, wanted = read_golden(golden)
    try:
        with single_threaded():
            got = TorchPredictor(model).predict(inputs)
    except ContractError as error:
        return {}, f"outputs: the rebuilt model does not take the golden rows: {error}"
    if any(name not in got or got[name].shape != array.shape for name, array in wanted.items()):
        return {}, "outputs: the rebuilt model has other outputs than the golden rows."
    gaps = {name: _largest(array, got[name]) for name, array in wanted.items()}
    if np.inf in gaps.values():
        return {}, "outputs: on the golden rows, one side only has a value that is no number."
    return gaps, ""


def _largest(before: np.ndarray, after: np.ndarray) -> float:
    """Largest absolute difference; infinite where only one of the two is a number."""
    wanted, got = before.astype(np.float64), after.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gaps = np.abs(wanted - got)
    gaps = np.where((wanted == got) | (np.isnan(wanted) & np.isnan(got)), 0.0, gaps)
    return float(np.where(np.isnan(gaps), np.inf, gaps).max(initial=0.0))


def conclude(
    name: str,
    checks: tuple[Check, ...],
    environment: tuple[Check, ...],
    difference: Difference | None,
) -> str:
    """One sentence: whether the digests agree, and where not, what differs and what may be why."""
    differing = [check.what for check in checks if check.agrees is False]
    if not differing:
        return f"{name} is rebuilt byte for byte: every digest agrees."
    text = f"{name} is not rebuilt as recorded: {_listed(differing)} differ"
    text += "s" if len(differing) == 1 else ""
    if not {"weights", "onnx"} & set(differing):
        return f"{text}; the rebuilt weights and ONNX file are byte for byte as recorded."
    if difference is not None and difference.weight is not None:
        text += f" in bytes, by at most {difference.weight:.1e} in a weight"
    if difference is not None and difference.outputs:
        text += f" and {max(difference.outputs.values()):.1e} in an output on the golden rows"
    causes = [what for what in differing if what in ("data", "config", "code")]
    causes += [check.what for check in environment if not check.agrees]
    return f"{text}. What else differs: {_listed(causes) or 'nothing that is recorded'}."


def _listed(names: list[str]) -> str:
    """Names in a row, as in a sentence."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
