"""Small files below a folder or an fsspec URL, written whole or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from components.errors import ConfigError
from components.settings import hide_credentials
from components.state import write_atomic


@final
class Storage:
    """Files by name below one folder.

    On a local disk a file appears by renaming; in an object store an upload is whole by itself.

    Args:
        url: A path, or an fsspec URL such as ``s3://bucket/folder``.

    Raises:
        ConfigError: Nothing installed can open the URL's protocol.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        while self.url.endswith("/") and not self.url.endswith("://") and len(self.url) > 1:
            self.url = self.url[:-1]
        try:
            filesystem, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"a storage address must be a folder or a URL that fsspec can open; {self.shown!r} "
                f"is not: {error}. Install the package that it names, or give a folder."
            ) from error
        self.filesystem: Any = filesystem
        self.root = PurePosixPath(root)

    @property
    def local(self) -> Path | None:
        """The folder, if it is on this machine."""
        return Path(self.root) if isinstance(self.filesystem, LocalFileSystem) else None

    @property
    def shown(self) -> str:
        """The URL without a user name or password, for messages."""
        return hide_credentials(self.url)

    def path(self, name: str) -> str:
        """The file's path within the file system."""
        return str(self.root / name)

    def below(self, name: str) -> "Storage":
        """The storage of a folder inside."""
        return Storage(f"{self.url}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file, replacing one of the same name."""
        if self.local is not None:
            write_atomic(self.local / name, content)
            return
        with _remote_errors():
            self.filesystem.makedirs(str(self.root), exist_ok=True)
            self.filesystem.pipe_file(self.path(name), content)

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: There is no such file.
        """
        with _remote_errors():
            content: bytes = self.filesystem.cat_file(self.path(name))
        return content

    def names(self) -> list[str]:
        """Names of the files that lie directly below, sorted; none where the folder is absent."""
        self.filesystem.invalidate_cache()
        try:
            with _remote_errors():
                found = self.filesystem.ls(str(self.root), detail=False)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(path).name for path in found)
        return sorted(name for name in names if not name.startswith("."))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError), _remote_errors():
            self.filesystem.rm_file(self.path(name))

    def clear(self) -> None:
        """Delete everything below, and the folder."""
        with contextlib.suppress(FileNotFoundError), _remote_errors():
            self.filesystem.rm(str(self.root), recursive=True)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Open a file for reading in pieces."""
        with self.filesystem.open(self.path(name), "rb") as stream:
            yield stream


@contextlib.contextmanager
def _remote_errors() -> Iterator[None]:
    """Make every refusal an OSError: the clients of object stores have families of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
