"""A model that takes too much memory or time is stopped, with every process it started."""

import fcntl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from onnx import helper
from support.smoke_types import Recorded, Smoke

from components.errors import GateError, InfrastructureError
from components.smoke_test import runner


def test_model_that_needs_more_memory_than_allowed(
    save_model: Callable[..., Path], rows: npt.NDArray[np.float32], reject: Callable[..., str]
) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["features"], ["one"], keepdims=0),
        helper.make_node("Expand", ["one", "huge"], ["wide"]),
        helper.make_node("ReduceMax", ["wide"], ["most"], keepdims=0),
        helper.make_node("Add", ["features", "most"], ["scores"]),
    ]
    model = save_model(nodes, constants={"huge": np.array([1 << 30])}, width=3)
    recorded = {"input/features": rows, "output/scores": rows}
    assert "out of memory" in reject(model, recorded, memory_bytes=1 << 30)


def test_memory_limit_too_low_for_the_engine(
    linear: Path, recorded: Recorded, smoke: Smoke
) -> None:
    with pytest.raises((GateError, InfrastructureError), match=r"memory|load"):
        smoke(linear, recorded, memory_bytes=64 << 20)


def test_model_that_uses_up_its_processor_time(
    endless: Path,
    rows: npt.NDArray[np.float32],
    reject: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "_CPU_GRACE_S", -29)  # one CPU second of the 30 on the clock
    message = reject(endless, {"input/features": rows, "output/scores": rows})
    assert "it died by SIGXCPU, the limit on CPU seconds was used up" in message
    assert message.endswith("in the step 'the first run'")


@pytest.fixture
def family(stub: Callable[[str], None], tmp_path: Path) -> Path:
    """A child that starts a helper; both hold the lock that is returned."""
    lock = tmp_path / "lock"
    stub(
        f"""
        import fcntl, subprocess, sys
        lock = open({str(lock)!r}, "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        helper = subprocess.Popen(sleep, pass_fds=[lock.fileno()])
        print("helper started", file=lock, flush=True)
        print("helper started", file=sys.stderr, flush=True)
        helper.wait()
        """
    )
    return lock


def is_free(lock: Path, patience_s: float = 2) -> bool:
    """Say whether every process that inherited the lock is gone; the last may take a moment."""
    deadline = time.monotonic() + patience_s
    with lock.open("a") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.02)
            else:
                return True


def test_the_whole_group_is_killed_when_time_is_up(
    linear: Path, recorded: Recorded, reject: Callable[..., str], family: Path
) -> None:
    assert "last words: helper started" in reject(linear, recorded, timeout_s=1)
    assert is_free(family)


def test_the_whole_group_is_killed_when_the_caller_is_interrupted(
    linear: Path,
    recorded: Recorded,
    smoke: Smoke,
    family: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        while not (family.exists() and family.read_text()):
            time.sleep(0.01)
        assert not is_free(family, patience_s=0)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smoke(linear, recorded)
    assert is_free(family)
