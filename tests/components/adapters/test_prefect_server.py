"""The embedded server: a real child process that answers, ends when told, and outlives nobody."""

import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.adapters import prefect_server
from components.adapters.prefect_server import (
    HOST,
    EmbeddedServer,
    check_prefect,
    free_port,
    run_environment,
)
from components.errors import InfrastructureError

PYTHON = sys.executable
FAST_S = 10.0


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not yet collected by its parent."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return not done.stdout.strip() or done.stdout.startswith("Z")


def is_locked(root: Path) -> bool:
    """Whether someone holds the lock for migrating the database."""
    with (root / "locks" / "prefect.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(true: Callable[[], bool], timeout: float = FAST_S) -> bool:
    deadline = time.monotonic() + timeout
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.listen()
        yield int(holder.getsockname()[1])


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a shell script stand in for the child."""

    def replace(script: str) -> None:
        path = tmp_path / "stand-in"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(prefect_server.sys, "executable", str(path))

    return replace


@pytest.mark.server
def test_a_server_answers_until_it_is_stopped(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "home of mine", timeout_s=90)
    server.start()
    try:
        assert server._process is not None
        pid = server._process.pid
        assert server.wait() == server.url == f"http://127.0.0.1:{server.port}/api"
        check_prefect(server.url)
        request = urllib.request.Request(
            f"{server.url}/flows/filter", b"{}", {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer) == []
        assert (tmp_path / "home of mine" / "prefect" / "prefect.db").is_file()
        assert not is_locked(tmp_path / "home of mine"), "the database is migrated"
        second = EmbeddedServer(tmp_path / "home of mine", port=server.port)
        with pytest.raises(InfrastructureError, match=f":{server.port} is taken"):
            second.start()
    finally:
        server.stop()
    assert has_ended(pid)
    with pytest.raises(InfrastructureError, match="must answer at PREFECT_API_URL"):
        check_prefect(server.url)
    server.stop()


PARENT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from components.adapters.prefect_server import EmbeddedServer
    server = EmbeddedServer(Path(sys.argv[1]))
    server.start()
    print(server._process.pid, flush=True)
    time.sleep(60)
    """
)


def test_the_child_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [PYTHON, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not has_ended(child)
        time.sleep(0.3)
        assert not has_ended(child), "it lives as long as its parent does"
        parent.kill()
        parent.wait()
        try:
            assert wait_until(lambda: has_ended(child))
        finally:
            if not has_ended(child):
                os.kill(child, signal.SIGKILL)
    finally:
        parent.kill()
        parent.communicate()


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    with taken_port() as port:
        server = EmbeddedServer(tmp_path, port)
        with pytest.raises(
            InfrastructureError, match=f"{HOST}:{port} is taken.*ASSAY_PREFECT_PORT"
        ):
            server.start()
    assert list(tmp_path.iterdir()) == []
    server.stop()


def test_a_free_port_is_free() -> None:
    port = free_port()
    with socket.socket() as probe:
        probe.bind((HOST, port))


def test_a_server_can_be_stopped_before_it_answers(
    tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in("exec sleep 60")
    server = EmbeddedServer(tmp_path)
    server.start()
    assert server._process is not None
    pid = server._process.pid
    start = time.monotonic()
    server.stop()
    assert time.monotonic() - start < FAST_S / 2, "it was asked to end, not left to be killed"
    assert has_ended(pid)
    assert not is_locked(tmp_path)


def test_a_child_that_ignores_its_end_is_killed(
    tmp_path: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefect_server, "_STOP_S", 0.2)
    stand_in("trap '' TERM\necho deaf\nwhile true; do sleep 0.05; done")
    server = EmbeddedServer(tmp_path)
    server.start()
    assert wait_until(lambda: "deaf" in server.log.read_text())
    assert server._process is not None
    pid = server._process.pid
    server.stop()
    assert has_ended(pid)


def test_a_child_that_dies_is_reported_with_the_end_of_its_log(
    tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in("echo first\necho 'no such table: flow' >&2\nexit 7")
    server = EmbeddedServer(tmp_path)
    server.start()
    with pytest.raises(InfrastructureError) as caught:
        server.wait()
    server.stop()
    message = str(caught.value)
    assert "it ended with 7" in message
    assert f"{server.log}, ends with: no such table: flow. Mend" in message


def test_a_silent_child_is_reported_in_time(
    tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in("exec sleep 60")
    server = EmbeddedServer(tmp_path, timeout_s=0.3)
    server.start()
    start = time.monotonic()
    with pytest.raises(InfrastructureError, match=r"it was silent for 0 s.*ends with: nothing"):
        server.wait()
    assert time.monotonic() - start < 5
    server.stop()


def test_a_stranger_on_the_port_is_not_taken_for_the_server(
    tmp_path: Path, stand_in: Callable[[str], None], foreign: Callable[[bytes | None], int]
) -> None:
    stand_in("exec sleep 60")
    server = EmbeddedServer(tmp_path, timeout_s=0.3)
    server.start()
    server.port = foreign(b"SSH-2.0-OpenSSH_9.6\r\n")
    with pytest.raises(InfrastructureError, match="was silent"):
        server.wait()
    server.stop()


def test_a_home_below_a_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    server = EmbeddedServer(tmp_path / "file" / "home")
    with pytest.raises(InfrastructureError, match="ASSAY_HOME"):
        server.start()
    server.stop()


def test_only_one_server_at_a_time_migrates_a_database(
    tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in("exec sleep 60")
    server = EmbeddedServer(tmp_path)
    server.start()
    assert is_locked(tmp_path)
    server.stop()
    assert not is_locked(tmp_path)


def test_a_run_keeps_to_its_folder_and_to_itself(tmp_path: Path) -> None:
    values = run_environment(tmp_path)
    folders = {name: value for name, value in values.items() if value.startswith("/")}
    assert {"PREFECT_HOME", "PREFECT_PROFILES_PATH", "MPLCONFIGDIR"} <= folders.keys()
    assert all(tmp_path in Path(value).parents for value in folders.values())
    assert values["PREFECT_RESULTS_DEFAULT_SERIALIZER"] == "json"
    assert values["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert values["DO_NOT_TRACK"] == "true"
    assert list(tmp_path.iterdir()) == [], "naming folders makes none"


def test_the_child_gets_the_runs_environment(
    tmp_path: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    monkeypatch.setenv("PREFECT_HOME", "/elsewhere")
    stand_in("env\necho done\nexec sleep 60")
    server = EmbeddedServer(tmp_path)
    server.start()
    assert wait_until(lambda: server.log.read_text().endswith("done\n"))
    server.stop()
    lines = [line for line in server.log.read_text().splitlines() if "=" in line]
    found: dict[str, Any] = dict(line.split("=", 1) for line in lines)
    assert found.items() >= run_environment(tmp_path).items()
    assert "PREFECT_API_URL" not in found, "a server asks no other server"


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def test_a_server_of_another_kind_is_refused(
    foreign: Callable[[bytes | None], int], greeting: bytes
) -> None:
    url = f"http://{HOST}:{foreign(greeting)}/api"
    with pytest.raises(InfrastructureError, match="must answer at PREFECT_API_URL") as caught:
        check_prefect(url)
    assert isinstance(caught.value.__cause__, OSError | http.client.HTTPException)


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_without_a_healthy_api_is_refused(
    answering: Callable[[int], str], status: int
) -> None:
    with pytest.raises(InfrastructureError, match=rf"HTTP Error {status}.*ends with /api"):
        check_prefect(answering(status))
