"""Files below a folder or a URL: written whole, listed, deleted."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from components.errors import ConfigError
from components.storage import Storage


@pytest.fixture(params=["path", "file URL", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    folder = tmp_path / "deep" / "er"
    urls = {"path": folder, "file URL": f"file://{folder}", "memory": "memory://storage-tests/er"}
    here = Storage(urls[request.param])
    here.clear()
    yield here
    here.clear()


def test_what_is_written_is_read(storage: Storage) -> None:
    assert storage.names() == [], "an absent folder has no files"
    storage.write("b.json", b"one")
    storage.write("a", b"\0" * 70_000)
    storage.write("b.json", b"two")
    assert storage.names() == ["a", "b.json"]
    assert storage.read("b.json") == b"two"
    with storage.open("a") as stream:
        assert (stream.read(3), len(stream.read())) == (b"\0\0\0", 69_997)


def test_absent_files_are_said_to_be_absent(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("a")
    storage.write("b", b"")
    with pytest.raises(FileNotFoundError):
        storage.read("a")


def test_deleting_twice_is_no_error(storage: Storage) -> None:
    storage.delete("a")
    storage.write("a", b"")
    storage.write("b", b"")
    storage.delete("a")
    storage.delete("a")
    assert storage.names() == ["b"]


def test_a_folder_inside_is_a_storage_of_its_own(storage: Storage) -> None:
    inside = storage.below("x/y")
    inside.write("a", b"1")
    assert inside.names() == ["a"]
    assert inside.url == f"{storage.url}/x/y"
    assert inside.path("a") == storage.path("x/y/a")
    assert storage.read("x/y/a") == b"1"
    assert storage.names() == ["x"]
    inside.clear()
    inside.clear()
    assert inside.names() == []


def test_what_another_process_wrote_is_seen(storage: Storage) -> None:
    storage.write("a", b"")
    assert storage.names() == ["a"]
    Storage(storage.url).write("b", b"")
    assert storage.names() == ["a", "b"]


def test_only_a_folder_of_this_machine_is_local(tmp_path: Path) -> None:
    assert Storage(tmp_path).local == tmp_path
    assert Storage(f"{tmp_path}/").local == tmp_path
    assert Storage(f"file://{tmp_path}").local == tmp_path
    assert Storage("memory://x").local is None


def test_a_relative_path_is_fixed_when_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.write("a", b"")
    assert (tmp_path / "here" / "a").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    storage = Storage(tmp_path)
    storage.write("a", b"old")

    def stop(handle: int) -> Any:
        assert len(list(tmp_path.iterdir())) == 2
        assert storage.names() == ["a"], "what is half there is not listed"
        raise error

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(type(error)):
        storage.write("a", b"new")
    assert storage.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("url", ["nothing://bucket/x", "s3://bucket/x"])
def test_an_address_that_nothing_can_open_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    if url.startswith("s3"):
        monkeypatch.setattr(fsspec.core, "get_filesystem_class", absent)
    with pytest.raises(ConfigError, match=rf"'{url}' is not: .*Install the package"):
        Storage(url)


def test_credentials_of_an_address_are_not_shown() -> None:
    storage = Storage("memory://someone:hunter2@bucket/folder")
    assert storage.shown == "memory://***@bucket/folder"


def test_any_refusal_of_an_object_store_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage("memory://refusing")

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("throttled")

    for method in ("pipe_file", "cat_file", "rm_file", "ls", "rm"):
        monkeypatch.setattr(storage.filesystem, method, refuse)
    calls = (
        lambda: storage.write("a", b""),
        lambda: storage.read("a"),
        lambda: storage.delete("a"),
        storage.names,
        storage.clear,
    )
    for call in calls:
        with pytest.raises(OSError, match="RuntimeError: throttled"):
            call()
