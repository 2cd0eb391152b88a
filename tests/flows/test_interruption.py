"""A run that is interrupted ends at once, tidily, and can be started again."""

import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.adapters.prefect_server import free_port


def mlflow_states(home: Path) -> list[str]:
    """The states of all MLflow runs, the first run first."""
    path = home / "mlflow" / "mlflow.db"
    if not path.exists():
        return []
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT status FROM runs ORDER BY start_time").fetchall()
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


def test_interrupted_run_ends_tidily_and_the_same_command_completes(
    tmp_path: Path, child_environment: Mapping[str, str], assay: Callable[..., Any]
) -> None:
    home, port = tmp_path / "home", free_port()
    own = {"ASSAY_HOME": str(home), "ASSAY_PREFECT_PORT": str(port)}
    command = ("run", "slow", "--json")

    def training(runs: int) -> subprocess.Popen[str]:
        """A run that is at work, the given one in its home."""
        process = subprocess.Popen(
            [Path(sys.executable).with_name("assay"), *command],
            cwd=tmp_path,
            env={**child_environment, **own, "TEAM_SLEEP_S": "60"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(
            lambda: mlflow_states(home)[runs - 1 :] == ["RUNNING"] or process.poll() is not None
        )
        time.sleep(0.5)
        assert process.poll() is None, process.communicate()
        assert is_open(port)
        return process

    for runs, number in enumerate((signal.SIGTERM, signal.SIGINT), 1):
        process = training(runs)
        process.send_signal(number)
        out, err = process.communicate(timeout=15)
        assert (process.returncode, out) == (130, "")
        assert err.splitlines()[-1].startswith("assay: interrupted")
        assert "Traceback" not in err
        assert not is_open(port)
        assert mlflow_states(home) == ["KILLED"] * runs
        assert list((home / "work").iterdir()) == []

    process = training(3)
    process.kill()  # no chance to tidy up: the server notices, and the next run closes this one
    process.communicate()
    wait_for(lambda: not is_open(port), 15)
    assert mlflow_states(home) == ["KILLED", "KILLED", "RUNNING"]

    outcome = assay(*command, **own)
    assert outcome.code == 0, outcome.err
    assert outcome.json["decision"] == "promoted"
    assert mlflow_states(home) == ["KILLED", "KILLED", "KILLED", "FINISHED"]
    assert not is_open(port)
