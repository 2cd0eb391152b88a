"""The files of a data set: one, a folder or a glob, on this machine or behind an fsspec URL."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final
from urllib.parse import unquote

import fsspec

from components.errors import ConfigError, DataError, InfrastructureError
from components.settings import hide_credentials


@final
@dataclass(frozen=True)
class DataFile:
    """A file, with what its folders say in the form ``column=value``."""

    path: str
    partitions: dict[str, str]

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.path).name


@final
class DataFiles:
    """Files in the order of their paths.

    Args:
        url: A file, a folder (with all files below whose suffix is known) or a glob; a path, or an
            fsspec URL such as ``s3://bucket/folder``.
        suffixes: Ends of the names that count in a folder.

    Raises:
        ConfigError: Nothing installed can open the URL's protocol.
    """

    def __init__(self, url: str | Path, suffixes: tuple[str, ...]) -> None:
        self.url = hide_credentials(str(url))  # for messages
        self._suffixes = suffixes
        try:
            filesystem, self._root = fsspec.core.url_to_fs(str(url))
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"a path must be local or a URL that fsspec can open; {self.url!r} is not: "
                f"{error}. Install the package that it names, or give a local path."
            ) from error
        self.filesystem: Any = filesystem

    def found(self) -> list[DataFile]:
        """Every file, by path.

        Raises:
            DataError: There is none.
            InfrastructureError: The storage does not answer.
        """
        self.filesystem.invalidate_cache()
        with storage_answers(self.url):
            paths = self._paths()
        if not paths:
            raise DataError(
                f"a path must lead to files; there are none at {self.url}. Name a file, a folder "
                f"with files that end in {' or '.join(self._suffixes)}, or a glob."
            )
        return [DataFile(path, self._partitions(path)) for path in sorted(paths)]

    def _paths(self) -> list[str]:
        if any(sign in self._root for sign in "*?["):
            return [p for p in self.filesystem.glob(self._root) if self.filesystem.isfile(p)]
        if self.filesystem.isfile(self._root):
            return [self._root]
        found = self.filesystem.find(self._root)
        return [path for path in found if path.endswith(self._suffixes) and not self._hidden(path)]

    def _hidden(self, path: str) -> bool:
        """Writers put aside under such names what is unfinished."""
        below = PurePosixPath(path).relative_to(self._root).parts
        return any(part.startswith((".", "_")) for part in below)

    def _partitions(self, path: str) -> dict[str, str]:
        pairs = [part.split("=", 1) for part in PurePosixPath(path).parts[:-1] if "=" in part]
        return {name: unquote(value) for name, value in pairs}


@contextlib.contextmanager
def storage_answers(what: str) -> Iterator[None]:
    """Turn a storage's refusal into a next step.

    Raises:
        DataError: The file is gone, or must not be read.
        InfrastructureError: Anything else.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"files must stay while they are read; {what} is gone. Run again when nobody writes."
        ) from error
    except PermissionError as error:
        raise DataError(
            f"files must be readable for this user; {what} is not: {error}. Grant the permission, "
            "or set the credentials of the storage."
        ) from error
    except OSError as error:
        raise InfrastructureError(
            f"the storage must answer; reading {what} failed: {error}. Check disk, network and the "
            "storage's credentials, then run again."
        ) from error
