"""A folder to work in that leaves nothing behind."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from components.interruption import interrupt_received
from components.settings import Settings
from components.state import storage_errors


@contextlib.contextmanager
def workplace(settings: Settings, purpose: str) -> Iterator[Path]:
    """A folder below the state folder that goes when the block ends, however it does.

    Args:
        settings: Name the state folder.
        purpose: Begins the folder's name.
    """
    work = settings.root / "work"
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=work, prefix=f"{purpose}-")
    with folder:
        try:
            with storage_errors(work):
                yield Path(folder.name)
        except BaseException:
            interrupt_received()  # what is left to do is not to be interrupted
            raise
