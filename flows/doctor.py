"""``assay doctor``: what a run would find on this machine."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from components.adapters.mlflow_tracking import check_mlflow
from components.adapters.prefect_server import check_prefect
from components.errors import AssayError
from components.pipeline_entries import pipeline_entries
from components.register.tags import installed_runtime
from components.settings import load_settings, setting_sources
from components.state import make_root

PACKAGES = ("assay", "prefect", "mlflow", "torch", "onnx", "onnxscript", "pydantic-settings")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether it is well."""

    subject: str
    text: str
    well: bool = True


def doctor() -> int:
    """Print every finding; 1 if one of them would stop a run, else 0."""
    checks: list[Callable[[], list[Finding]]] = [
        _versions,
        _runtime,
        _devices,
        _settings,
        _state,
        _pipelines,
        _mlflow,
        _prefect,
    ]
    findings = [finding for check in checks for finding in _attempt(check)]
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{'ok ' if finding.well else 'BAD'}  {finding.subject:<{width}}  {finding.text}")
    return 0 if all(finding.well for finding in findings) else 1


def _attempt(check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check that cannot be made is a finding, so that the others are still shown."""
    try:
        return check()
    except (AssayError, ImportError, OSError) as error:
        return [Finding(check.__name__.strip("_"), str(error), well=False)]


def _versions() -> list[Finding]:
    python = Finding("python", sys.version.split()[0], well=sys.version_info >= (3, 11))
    return [python, *(Finding(name, version(name)) for name in PACKAGES)]


def _runtime() -> list[Finding]:
    import onnxruntime

    name, number = installed_runtime()
    providers = ", ".join(onnxruntime.get_available_providers())
    return [Finding(name, number), Finding("providers", providers)]


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("devices", f"cpu ({os.cpu_count()} cores); no CUDA")]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [Finding("devices", f"cpu ({os.cpu_count()} cores), cuda: {', '.join(names)}")]


def _settings() -> list[Finding]:
    load_settings()
    sources = setting_sources(os.environ, Path(".env"))
    return [Finding(f"setting {name}", f"from {source}") for name, source in sources.items()]


def _state() -> list[Finding]:
    root = load_settings().root
    make_root(root)
    return [Finding("state folder", f"{root} is writable")]


def _pipelines() -> list[Finding]:
    return [Finding("pipelines", ", ".join(pipeline_entries()) or "none registered")]


def _mlflow() -> list[Finding]:
    settings = load_settings()
    uri = check_mlflow(settings)
    embedded = not settings.mlflow_tracking_uri
    return [Finding("mlflow", "embedded store on SQLite" if embedded else f"{uri} answers")]


def _prefect() -> list[Finding]:
    url = os.environ.get("PREFECT_API_URL") or load_settings().prefect_api_url
    if not url:
        return [Finding("prefect", "embedded server, started by each run")]
    check_prefect(url)
    return [Finding("prefect", f"{url} answers")]
