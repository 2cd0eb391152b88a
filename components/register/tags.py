"""What a registered version says of itself, and what its consumers install."""

from importlib.metadata import PackageNotFoundError, version

from components.errors import ConfigError
from components.records import ExportedModel

RUNTIMES = ("onnxruntime-gpu", "onnxruntime")


def version_tags(
    exported: ExportedModel, *, parent: str = "", flow_run_id: str = "", flow_run_url: str = ""
) -> dict[str, str]:
    """Lineage of a version: data, code, configuration, bytes, and what led to it.

    Args:
        exported: The candidate.
        parent: The champion at that moment, empty if there was none.
        flow_run_id: The Prefect flow run.
        flow_run_url: Its page, empty where there is none.
    """
    job = exported.validated.trained.job
    known = {"parent_champion": parent, "flow_run_id": flow_run_id, "flow_run_url": flow_run_url}
    return {
        "onnx_sha256": exported.onnx.sha256,
        "data_fingerprint": job.data_fingerprint,
        "code_revision": job.code_revision,
        "code_digest": job.code_digest,
        "config_digest": job.config_digest,
        "as_of": str(job.as_of),
        "window": job.window,
        "seed": str(job.seed),
        **{name: value for name, value in known.items() if value},
    }


def installed_runtime() -> tuple[str, str]:
    """Name and version of the one ONNX Runtime distribution that is installed.

    Raises:
        ConfigError: None is installed, or both are: they own the same folder.
    """
    found = {name: known for name in RUNTIMES if (known := _version(name))}
    if len(found) != 1:
        raise ConfigError(
            f"exactly one of {' and '.join(RUNTIMES)} must be installed; found "
            f"{', '.join(found) or 'none'}. Uninstall both and install one again."
        )
    return next(iter(found.items()))


def consumer_requirements() -> list[str]:
    """What loads the model anywhere: the CPU runtime of the tested version, onnx and numpy."""
    _, runtime = installed_runtime()
    return [
        f"onnxruntime=={runtime}",
        *(f"{name}=={version(name)}" for name in ("mlflow", "numpy", "onnx", "pandas")),
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
