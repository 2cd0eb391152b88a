"""A run that is interrupted ends at once, tidily, and can be started again."""

import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from components.adapters.prefect_server import free_port


def mlflow_states(home: Path) -> list[str]:
    """The states of the MLflow runs of candidates, the first run first."""
    path = home / "mlflow" / "mlflow.db"
    if not path.exists():
        return []
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        rows = database.execute(
            "SELECT status FROM runs WHERE run_uuid NOT IN "
            "(SELECT run_uuid FROM tags WHERE key = 'assay.kind') ORDER BY start_time"
        ).fetchall()
    except sqlite3.OperationalError:  # its tables are being made
        rows = []
    finally:
        database.close()
    return [state for (state,) in rows]


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes, and let none outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str | Path], **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, **pipes, **options))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_interrupted_run_ends_tidily_and_the_same_command_completes(
    tmp_path: Path,
    child_environment: Mapping[str, str],
    assay: Callable[..., Any],
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    home, port = tmp_path / "home", free_port()
    own = {"ASSAY_HOME": str(home), "ASSAY_PREFECT_PORT": str(port)}
    command = ("run", "waiting", "--json")

    def training() -> subprocess.Popen[str]:
        """A run that has begun to train, at a place where a first interruption is dropped."""
        mark = tmp_path / "mark"
        mark.unlink(missing_ok=True)
        process = start(
            [Path(sys.executable).with_name("assay"), *command],
            cwd=tmp_path,
            env={**child_environment, **own, "TEAM_WAIT": str(mark)},
        )
        wait_for(lambda: mark.exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        assert is_open(port)
        return process

    for runs, number in enumerate((signal.SIGTERM, signal.SIGINT), 1):
        process = training()
        process.send_signal(number)
        out, err = process.communicate(timeout=40)  # the step that hangs is given ten seconds
        assert (process.returncode, out) == (130, "")
        assert err.splitlines()[-1].startswith("assay: interrupted")
        assert "Traceback" not in err
        assert not is_open(port)
        assert mlflow_states(home) == ["KILLED"] * runs
        assert list((home / "work").iterdir()) == []

    process = training()
    process.kill()  # no chance to tidy up: the server notices, and the next run closes this one
    process.communicate()
    wait_for(lambda: not is_open(port), 15)
    assert mlflow_states(home) == ["KILLED", "KILLED", "RUNNING"]

    outcome = assay(*command, **own)
    assert outcome.code == 0, outcome.err
    assert outcome.json["decision"] == "promoted"
    assert mlflow_states(home) == ["KILLED", "KILLED", "KILLED", "FINISHED"]
    assert not is_open(port)
