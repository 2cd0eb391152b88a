"""The state folder: nothing is ever half there, and processes take turns."""

import errno
import os
import select
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.errors import InfrastructureError
from components.state import (
    data_folder,
    exclusive,
    make_root,
    mlflow_folder,
    prefect_folder,
    replace_folder,
    storage_errors,
    sweep,
    write_atomic,
)


def test_everything_lies_below_the_root() -> None:
    root = Path("somewhere")
    folders = [data_folder(root), mlflow_folder(root), prefect_folder(root)]
    assert len(set(folders)) == 3
    assert all(root in folder.parents for folder in folders)


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("interrupted", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def stop(*args: Any) -> None:
        raise error

    if interrupted == "fsync":
        monkeypatch.setattr(os, "fsync", stop)
    else:
        monkeypatch.setattr(os, "replace", stop)
        monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_becomes_the_target_whole(tmp_path: Path) -> None:
    target = tmp_path / "state" / "target"
    with replace_folder(target) as work:
        (work / "a").write_text("1")
        assert not target.exists()
    with replace_folder(target) as work:
        (work / "b").write_text("2")
        assert [p.name for p in target.iterdir()] == ["a"], "the old one stays until the end"
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad")])
def test_a_failed_block_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "target"
    with replace_folder(target) as work:
        (work / "a").write_text("1")
    with pytest.raises(type(error)), replace_folder(target) as work:
        (work / "b").write_text("2")
        raise error
    assert [p.name for p in target.iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_root_is_made_and_left_clean(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    make_root(root)
    make_root(root)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("tail", ["file", "file/below", "file/far/below"])
def test_a_root_below_a_regular_file_is_refused(tmp_path: Path, tail: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InfrastructureError, match=r"must be writable.*ASSAY_HOME"):
        make_root(tmp_path / tail)


def test_a_root_whose_name_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="must be writable"):
        make_root(tmp_path / ("x" * 300))


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfrastructureError, match="No space left on device") as caught:
        make_root(tmp_path / "root")
    assert isinstance(caught.value.__cause__, OSError)
    assert list((tmp_path / "root").iterdir()) == [], "the probe must go"


@pytest.mark.parametrize("name", ["EROFS", "EACCES", "EPERM", "EDQUOT", "EIO"])
def test_every_refusal_to_write_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(errno, name)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(InfrastructureError, match=os.strerror(number)):
        make_root(tmp_path)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(ValueError, match="mine"), storage_errors(tmp_path):
        raise ValueError("mine")


def test_a_lock_below_a_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("")
    with pytest.raises(InfrastructureError), exclusive(tmp_path, "a"):
        raise AssertionError("not reached")


CHILD = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from components.state import exclusive
    print("ready", flush=True)
    with exclusive(Path(sys.argv[1]), sys.argv[2]):
        print("got it", flush=True)
        sys.stdin.readline()
    print("gave it back", flush=True)
    """
)


class Child:
    """Another process that wants a lock."""

    def __init__(self, root: Path, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(root), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._heard = b""

    def says(self, line: str, timeout: float = 10) -> bool:
        """Whether its next line is this one, and comes in time."""
        assert self.process.stdout is not None
        while b"\n" not in self._heard:
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                return False
            self._heard += os.read(self.process.stdout.fileno(), 100)
        said, _, self._heard = self._heard.partition(b"\n")
        assert said.decode() == line
        return True

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    found: list[Child] = []
    yield found
    for child in found:
        child.process.kill()
        child.process.communicate()


def test_two_processes_take_turns(tmp_path: Path, children: list[Child]) -> None:
    with exclusive(tmp_path, "a"):
        children.append(child := Child(tmp_path, "a"))
        assert child.says("ready")
        assert not child.says("got it", timeout=0.3), "the lock is held here"
    assert child.says("got it")
    child.let_go()
    assert child.says("gave it back")
    with exclusive(tmp_path, "a"):
        pass


def test_locks_of_other_names_do_not_wait(tmp_path: Path, children: list[Child]) -> None:
    with exclusive(tmp_path, "a"):
        children.append(child := Child(tmp_path, "b"))
        assert child.says("ready")
        assert child.says("got it")


def test_a_killed_holder_gives_the_lock_back(tmp_path: Path, children: list[Child]) -> None:
    children.append(holder := Child(tmp_path, "a"))
    assert holder.says("ready")
    assert holder.says("got it")
    children.append(waiter := Child(tmp_path, "a"))
    assert waiter.says("ready")
    assert not waiter.says("got it", timeout=0.2)
    holder.process.kill()
    assert waiter.says("got it")


def test_only_what_is_old_is_swept(tmp_path: Path) -> None:
    old, young = tmp_path / "old", tmp_path / "young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "file").touch()
    os.utime(old, (0, 0))
    sweep(tmp_path, 3600.0)
    assert [path.name for path in tmp_path.iterdir()] == ["young"]
    sweep(tmp_path / "absent", 0.0)
