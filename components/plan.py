"""From a request to a job: every name resolved, every input digested, nothing trained yet."""

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import CellType
from typing import Any

from pydantic import ValidationError

from components.contract import DataSource, SourceContext, instantiate
from components.data.snapshot import Snapshot, open_snapshot
from components.data.take import take_snapshot
from components.digest import digest_json, digest_sources
from components.errors import ConfigError, DataError
from components.pipeline import Pipeline
from components.records import Job
from components.settings import Settings, describe_validation
from components.state import data_folder
from components.storage import Storage
from components.train.config import TrainConfig

_ENGINES = ("torch", "onnx", "onnxscript", "numpy")
DEFAULT_AS_OF = date(2014, 1, 1)


def resolve_config(pipeline: Pipeline, seed: int, assignments: Iterable[str]) -> TrainConfig:
    """Apply ``key=value`` assignments and the seed to the pipeline's training defaults.

    Raises:
        ConfigError: A key is unknown or set twice, or a value is ill-typed or outside its range.
    """
    known = [name for name in type(pipeline.config).model_fields if name != "seed"]
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"settings must be KEY=VALUE with KEY one of {', '.join(known)}; got "
                f"{assignment!r}." + (" The seed is set with --seed." if key == "seed" else "")
            )
        if key in values:
            raise ConfigError(f"each setting may be given once; {key!r} was given twice.")
        values[key] = value
    try:
        return type(pipeline.config).model_validate(
            {**pipeline.config.model_dump(), **values, "seed": seed}
        )
    except ValidationError as error:
        raise ConfigError(
            f"a setting of pipeline {pipeline.name!r} is not valid: {describe_validation(error)}"
        ) from None


def open_source(pipeline: Pipeline, settings: Settings) -> DataSource:
    """The pipeline's data source, with its files below the state folder.

    Raises:
        ContractError: Its class misses abstract methods.
    """
    folder = data_folder(settings.root) / pipeline.name / "source"
    return instantiate(pipeline.source, SourceContext(folder, settings.database_url))


def open_snapshots(pipeline: Pipeline, settings: Settings) -> Storage:
    """Where the snapshots of a pipeline lie.

    Raises:
        ConfigError: ``ASSAY_SNAPSHOT_ROOT`` cannot be opened.
    """
    root = settings.snapshot_root or data_folder(settings.root)
    return Storage(root).below(f"{pipeline.name}/snapshots")


def open_data(pipeline: Pipeline, settings: Settings, job: Job) -> Snapshot:
    """The rows that a job was planned with; where they are not stored, the source gives them again.

    Raises:
        DataError: The rows of the job's window are not the planned ones, or are damaged.
        InfrastructureError: A snapshot cannot be written.
    """
    storage = open_snapshots(pipeline, settings)
    stored = open_snapshot(storage, job.data_fingerprint)
    if stored is not None:
        return stored
    source = open_source(pipeline, settings)
    source.prepare()
    taken = take_snapshot(source, pipeline.features, job.as_of, storage)
    if taken.fingerprint != job.data_fingerprint:
        raise DataError(
            f"every stage must see the planned rows, with fingerprint {job.data_fingerprint}; the "
            f"rows of {job.window} now have {taken.fingerprint}: the data of this window has "
            "changed since the run was planned, or this worker sees other data. Start a new run, "
            "or share snapshots between workers with ASSAY_SNAPSHOT_ROOT."
        )
    return taken


def plan_job(
    pipeline: Pipeline,
    settings: Settings,
    *,
    as_of: date = DEFAULT_AS_OF,
    seed: int = 0,
    assignments: Iterable[str] = (),
    force_token: str = "",
) -> Job:
    """Take a snapshot of the data, and digest the code and the configuration of a run.

    Raises:
        ConfigError: A setting is unknown or ill-typed.
        DataError: The window has no rows, or the data is corrupt or breaks its schema.
        ContractError: The data source or the model is incomplete.
    """
    config = resolve_config(pipeline, seed, assignments)
    source = open_source(pipeline, settings)
    source.prepare()
    window = source.window(as_of)
    snapshot = take_snapshot(source, pipeline.features, as_of, open_snapshots(pipeline, settings))
    values = config.model_dump(mode="json")
    return Job(
        pipeline=pipeline.name,
        as_of=as_of,
        window=window,
        seed=config.seed,
        config=values,
        data_fingerprint=snapshot.fingerprint,
        code_digest=code_digest(pipeline),
        code_revision=code_revision(pipeline),
        config_digest=digest_json(values),
        rows=dict(snapshot.rows),
        excluded=dict(source.excluded(as_of)),
        force_token=force_token,
        row_key=source.schema().key,
    )


def code_digest(pipeline: Pipeline) -> str:
    """Digest of assay's own code, of the pipeline's, and of the engines' versions."""
    own = Path(__file__).resolve().parent
    sources = digest_sources([own, own.parent / "tasks", *_code_of(pipeline)])
    # The object itself may stand in a package that none of its parts comes from.
    declared = repr(
        (
            pipeline.features,
            pipeline.gates,
            pipeline.metric,
            pipeline.margin,
            pipeline.waivers,
            pipeline.frozen,
            pipeline.leakage,
            pipeline.release.opset,
            pipeline.release.variants,
            *map(_identity, _parts(pipeline)),
        )
    )
    return digest_json([sources, declared, {name: _release(name) for name in _ENGINES}])


def _release(package: str) -> str:
    """The version without the build: a worker with CUDA and one without run the same code."""
    return version(package).partition("+")[0]


def _code_of(pipeline: Pipeline) -> set[Path]:
    """Where the pipeline's parts are defined; Python and the engines count by version."""
    versioned = {*_ENGINES, *sys.stdlib_module_names}
    modules = code_modules(pipeline)
    return {_package_of(name) for name in modules if name.partition(".")[0] not in versioned}


def code_modules(pipeline: Pipeline) -> set[str]:
    """Names of the modules in which the pipeline's parts are defined."""
    modules = {type(pipeline.config).__module__}
    for part in _parts(pipeline):
        function = part.func if isinstance(part, functools.partial) else part
        modules |= {function.__module__, *_named_in(function)}
    return modules


def component_modules(pipeline: Pipeline) -> list[str]:
    """The same, the model's first."""
    home = pipeline.model.__module__
    return [home, *sorted(code_modules(pipeline) - {home})]


def _parts(pipeline: Pipeline) -> list[Callable[..., object]]:
    parts: list[Callable[..., object] | None] = [pipeline.model, pipeline.source, pipeline.loss]
    parts += [pipeline.metrics, pipeline.resampled, pipeline.baseline]
    return [part for part in parts if part is not None]


def _identity(part: object, depth: int = 4) -> object:
    """What tells a part from others of its module: its name, and what it was made with."""
    if isinstance(part, functools.partial):
        given = (part.args, sorted(part.keywords.items()))
        return _identity(part.func, depth), _identity(given, depth)
    if isinstance(part, (tuple, list)):
        return [_identity(value, depth) for value in part]
    if part is None or isinstance(part, (str, int, float)):
        return part
    name = getattr(part, "__qualname__", type(part).__qualname__)
    if not depth or not inspect.isfunction(part):  # a function may be among its own variables
        return name
    return name, [_identity(_content(cell), depth - 1) for cell in part.__closure__ or ()]


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has not been given a value
        return None


def _named_in(function: object) -> set[str]:
    """Modules of the classes and functions that a function names: a source's class, for example."""
    if not inspect.isfunction(function):
        return set()
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    return {part.__module__ for part in named if inspect.isclass(part) or inspect.isfunction(part)}


def _package_of(module: str) -> Path:
    """The folder of a module's top-level package, or its one file."""
    top = sys.modules[module.partition(".")[0]]
    file = Path(sys.modules[module].__file__ or "").resolve()
    if getattr(top, "__file__", None) is None:  # no __init__.py: it may have several folders
        return next(p for p in (Path(p).resolve() for p in top.__path__) if p in file.parents)
    path = Path(top.__file__ or "").resolve()
    return path.parent if path.name == "__init__.py" else path


def code_folder(pipeline: Pipeline) -> Path:
    """The folder in which the package of the pipeline's model lies."""
    return _package_of(pipeline.model.__module__).parent


def code_revision(pipeline: Pipeline) -> str:
    """The git commit of the pipeline's code, ``+changes`` if not clean; else ``unknown``."""
    folder = code_folder(pipeline)
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if _git(folder, "status", "--porcelain") else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""  # no git here: the code digest still identifies the code
    return done.stdout.strip() if done.returncode == 0 else ""
