"""Where the checkpoints of a job lie, and when they go."""

from collections.abc import Callable

from components.records import Job
from components.settings import Settings
from components.state import sweep
from components.storage import Storage
from components.train.checkpoint import Checkpoints
from tasks.runtime import LEFT_S


def checkpoint_storage(settings: Settings, job: Job) -> Storage:
    """The folder of a job's checkpoints.

    Raises:
        ConfigError: ``ASSAY_CHECKPOINT_ROOT`` cannot be opened.
    """
    root = settings.checkpoint_root or settings.root / "checkpoints"
    return Storage(root).below(f"{job.pipeline}/{job.key}")


def job_checkpoints(settings: Settings, job: Job, warn: Callable[[str], None]) -> Checkpoints:
    """A job's checkpoints; those of jobs that nobody went on with for a week are deleted.

    Raises:
        ConfigError: As :func:`checkpoint_storage`.
    """
    storage = checkpoint_storage(settings, job)
    if storage.local is not None:  # an object store has rules of its own for what is old
        sweep(storage.local.parent, LEFT_S)
    return Checkpoints(storage, job.key, warn)


def drop_checkpoints(settings: Settings, job: Job) -> None:
    """Delete a job's checkpoints: its result is kept elsewhere by now."""
    checkpoint_storage(settings, job).clear()
