"""The state folder: where things lie, and writing so that nothing is ever half there."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from components.errors import ConfigError, InfrastructureError

_STORAGE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
}


def data_folder(root: Path) -> Path:
    """Prepared data of every pipeline."""
    return root / "data"


def mlflow_folder(root: Path) -> Path:
    """MLflow's database and artifacts."""
    return root / "mlflow"


def prefect_folder(root: Path) -> Path:
    """Prefect's home: its database and stored results."""
    return root / "prefect"


def make_root(root: Path) -> None:
    """Create the state folder and prove that it can be written.

    Raises:
        ConfigError: Its path cannot be part of a database's address.
        InfrastructureError: The folder cannot be made or written, or the disk is full.
    """
    if reserved := sorted(set("?#%") & set(str(root))):
        raise ConfigError(
            f"the state folder's path becomes part of a database's address and must not contain "
            f"{' '.join(reserved)}; got {root}. Name another folder in ASSAY_HOME."
        )
    with storage_errors(root, errno.ENOENT):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root, prefix=".probe-") as probe:
            probe.write(b"\0" * 65536)
            probe.flush()
            os.fsync(probe.fileno())


@contextlib.contextmanager
def storage_errors(path: Path, *more: int) -> Iterator[None]:
    """Turn a refusal to write below ``path``, or ``more`` error numbers, into a next step."""
    try:
        yield
    except OSError as error:
        if error.errno not in {*_STORAGE, *more}:
            raise
        raise InfrastructureError(
            f"the state folder must be writable and have space; writing below {path} failed: "
            f"{error.strerror or error}. Free space, mend its permissions, or name another folder "
            "in ASSAY_HOME (or in ASSAY_SNAPSHOT_ROOT, where that is set)."
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes ``target`` when the block ends without an error.

    Hold :func:`exclusive` around it: what an earlier process left unfinished is swept away.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield work
        if target.exists():
            shutil.rmtree(target)
        work.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sweep(folder: Path, older_s: float) -> None:
    """Delete what lies directly in a folder and has not been changed for so many seconds."""
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - path.stat().st_mtime > older_s:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def exclusive(root: Path, name: str) -> Iterator[None]:
    """Hold a lock file of the state folder, so that processes on this machine take turns.

    The operating system releases the lock when its holder dies.
    """
    folder = root / "locks"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / f"{name}.lock").open("w")
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
