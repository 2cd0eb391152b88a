"""``assay reproduce``: a registered version rebuilt from its record, and compared with it."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from components.adapters.mlflow_registry import Registry, Version
from components.adapters.mlflow_tracking import connect, has_store
from components.errors import ConfigError, GateError, InfrastructureError
from components.interruption import interrupt_received
from components.pipeline import Pipeline, load_pipeline
from components.plan import code_digest, code_folder
from components.reproduce import Reproduction
from components.revision import export_revision, why_not_exported
from components.settings import Settings, load_settings
from flows.rebuilding import Named, rebuild_here, say
from tasks.workplace import workplace

_NAME = re.compile(r"(?P<model>[^@]+)@(?P<version>[^@]+)")
_GRACE_S = 15.0
_LOOK_S = 0.5


def reproduce(name: str, *, here: bool, as_json: bool) -> int:
    """Rebuild a version, print what agrees, and keep nothing.

    Args:
        name: ``MODEL@VERSION`` or ``MODEL@ALIAS``.
        here: Rebuild with the code that is here, whatever the version was built with.
        as_json: Print one JSON object instead of a table.

    Returns:
        0 when every digest agrees, else 3.

    Raises:
        UsageError: There is no such version, or it has no record that can be read.
        InfrastructureError: MLflow, a disk or git failed, or a record's files are gone.
        GateError: The rebuilt model cannot be trained or exported.
    """
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        settings = _settings()
        named = find_version(name, settings)
        pipeline = load_pipeline(named.registry.model)
        with workplace(settings, "reproduce") as folder:
            found = _rebuild(named, pipeline, settings, folder, here=here)
    found = found.model_copy(update={"seconds": round(time.perf_counter() - started, 3)})
    if as_json:
        print(found.model_dump_json())
    else:
        from flows.reproduction import describe

        print(describe(found))
    return 0 if found.agrees else GateError.exit_code


def find_version(name: str, settings: Settings) -> Named:
    """The version that a name of the command line means.

    Raises:
        ConfigError: It is malformed, or there is no such version.
        InfrastructureError: MLflow cannot be used.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ConfigError(
            "the version must be given as MODEL@VERSION or MODEL@ALIAS, for example flights@3 or "
            f"flights@champion; got {name!r}."
        )
    if not has_store(settings):
        raise ConfigError(
            f"{name} must be a registered version; the state folder {settings.root} has no MLflow "
            "store yet. Name the right folder in ASSAY_HOME, or a server in "
            "ASSAY_MLFLOW_TRACKING_URI."
        )
    tracking = connect(settings)
    registry = Registry(tracking, parts["model"])
    wanted = parts["version"]
    version = (
        registry.by_number(int(wanted))
        if wanted.isascii() and wanted.isdigit()
        else registry.by_alias(wanted)
    )
    if version is None:
        aliases = ", ".join(f"{k} (version {v})" for k, v in sorted(registry.aliases().items()))
        raise ConfigError(
            f"{name} must be a registered version; model {registry.model!r} has no version "
            f"{wanted!r} and "
            + (f"these aliases: {aliases}." if aliases else "no aliases: perhaps no run passed.")
            + " The versions are listed in MLflow."
        )
    return Named(tracking, registry, version)


def _settings() -> Settings:
    settings = load_settings()
    if not settings.credentials_block:
        return settings
    if not (os.environ.get("PREFECT_API_URL") or settings.prefect_api_url):
        raise ConfigError(
            "ASSAY_CREDENTIALS_BLOCK must be on a Prefect server that is named; reproduce starts "
            "none. Set PREFECT_API_URL, or give the block's settings in the environment."
        )
    os.environ.setdefault("PREFECT_API_URL", settings.prefect_api_url)
    from tasks.runtime import current_settings

    return current_settings()


def _rebuild(
    named: Named, pipeline: Pipeline, settings: Settings, folder: Path, *, here: bool
) -> Reproduction:
    """Rebuild with the recorded code where it can be had, else with the code that is here."""
    recorded, revision = _recorded_code(named.version, named.name)
    if here or code_digest(pipeline) == recorded:
        return rebuild_here(named, pipeline, settings, folder)
    place = code_folder(pipeline)
    reason = why_not_exported(place, revision)
    if not reason:
        say("code", f"exporting commit {revision[:12]}")
        tree = export_revision(place, revision, folder / "code")
        if (tree / "flows" / "reproduce.py").exists() or not (tree / "flows" / "cli.py").exists():
            return _rebuild_there(named, tree, revision)
        reason = f"its commit {revision[:12]} is older than 'assay reproduce'"
    note = f"code: {reason}. Rebuilt with the code that is here, which differs."
    say("code", note.removeprefix("code: "))
    found = rebuild_here(named, pipeline, settings, folder)
    return found.model_copy(update={"notes": (note, *found.notes)})


def _recorded_code(version: Version, name: str) -> tuple[str, str]:
    try:
        return version.tags["code_digest"], version.tags["code_revision"]
    except KeyError as error:
        raise ConfigError(
            f"{name} must be a version that assay registered; it has no tag assay.{error.args[0]}. "
            "Name another version."
        ) from None


def _rebuild_there(named: Named, tree: Path, revision: str) -> Reproduction:
    """Rebuild in a process whose code comes from an exported tree."""
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    # Without -P the working directory, often a checkout, would come before the tree.
    command = [sys.executable, "-P", "-m", "flows.cli", "reproduce"]
    command += [f"{named.registry.model}@{named.version.number}", "--here", "--json"]
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        out = _output(process)
    except BaseException:
        interrupt_received()
        _stop(process)
        raise
    try:
        found = Reproduction.model_validate_json(out.splitlines()[-1] if out else "")
    except ValidationError:
        raise _failed(process.returncode, revision) from None
    note = f"code: rebuilt with the code of commit {revision[:12]}, in a process of its own."
    return found.model_copy(update={"code": revision, "notes": (note, *found.notes)})


def _output(process: "subprocess.Popen[str]") -> str:
    """What a child prints until it ends.

    Importing MLflow makes SIGINT restart system calls, so a read that waits would never see it.
    """
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_LOOK_S)[0]


def _stop(process: "subprocess.Popen[str]") -> None:
    """Let the child tidy up; it may have had the signal already."""
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _failed(status: int, revision: str) -> ConfigError | GateError | InfrastructureError:
    text = (
        f"the code of commit {revision[:12]} must rebuild the version; its process ended with "
        f"status {status}, for the reason above. Pass --here to rebuild with the code that is here."
    )
    match status:
        case ConfigError.exit_code:
            return ConfigError(text)
        case GateError.exit_code:
            return GateError("reproduce", [text])
        case _:
            return InfrastructureError(text)
