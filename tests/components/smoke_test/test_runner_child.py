"""A child that dies, talks nonsense or cannot start, and what it is not told."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.smoke_types import Recorded, Smoke

from components.errors import ConfigError, InfrastructureError
from components.smoke_test import runner
from components.smoke_test.runner import run_smoke_test


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT", "SIGXCPU", "SIGRTMIN"])
def test_death_by_signal_is_a_rejection(
    linear: Path,
    recorded: Recorded,
    reject: Callable[..., str],
    stub: Callable[[str], None],
    name: str,
) -> None:
    stub(
        f"""
        import os, resource, signal, sys
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        print("so far so good", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.{name})
        """
    )
    message = reject(linear, recorded)
    assert f"it died by {name}" in message or str(int(signal.Signals[name])) in message
    assert "last words: so far so good" in message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("print('hello')", "must answer in JSON as agreed"),
        ('print(\'{"broken": null, "failures": []}\')', "must answer in JSON as agreed"),
        ("pass", "must answer in JSON as agreed"),
        ("print('x' * (1 << 22))", "must answer in JSON as agreed"),
        ("import sys; sys.exit(7)", "must exit with 0; it exited with 7"),
        ("raise MemoryError", "it ran out of memory"),
        (
            'print(\'{"broken": null, "failures": [], "report": null}\')',
            "must report measurements when nothing failed",
        ),
    ],
)
def test_nonsense_is_a_rejection(
    linear: Path,
    recorded: Recorded,
    reject: Callable[..., str],
    stub: Callable[[str], None],
    source: str,
    expected: str,
) -> None:
    stub(source)
    assert expected in reject(linear, recorded)


def test_stderr_is_bounded_and_plain(
    linear: Path, recorded: Recorded, reject: Callable[..., str], stub: Callable[[str], None]
) -> None:
    stub(
        r"""
        import sys
        sys.stderr.write("x" * (1 << 22) + "\x1b[1;31mred\x1b[m\x07 end\n")
        sys.exit(1)
        """
    )
    message = reject(linear, recorded)
    assert len(message) < 3000
    assert message.endswith("xred end")


def test_no_secret_reaches_the_child(
    linear: Path,
    recorded: Recorded,
    reject: Callable[..., str],
    stub: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ASSAY_SIGNING_KEY", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "hunter2")
    stub("import os, sys; sys.exit('names ' + ','.join(sorted(os.environ)) + repr(os.environ))")
    message = reject(linear, recorded)
    assert "hunter2" not in message
    names = set(message.split("names ")[1].split("environ(")[0].split(","))
    system = {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}  # set by Python and macOS themselves
    threads = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"}
    assert names <= {*threads, "ORT_DISABLE_TELEMETRY", *runner._PASSED_ON, *system}


def test_missing_files_are_infrastructure(linear: Path, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"golden file must be .* Download it"):
        run_smoke_test(linear, sha256="", golden=tmp_path / "none.npz")
    with pytest.raises(InfrastructureError, match=r"model must be a local file"):
        run_smoke_test(tmp_path / "none.onnx", sha256="", golden=linear)


def test_missing_onnxruntime_is_infrastructure(
    linear: Path, recorded: Recorded, smoke: Smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(InfrastructureError, match="needs numpy, which is not installed"):
        smoke(linear, recorded)


def test_broken_onnxruntime_is_infrastructure(
    linear: Path, recorded: Recorded, smoke: Smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_package_folders", list)
    with pytest.raises(InfrastructureError, match=r"must load in the child; .*No module named"):
        smoke(linear, recorded)


def test_child_that_cannot_start_is_infrastructure(
    linear: Path, recorded: Recorded, smoke: Smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "no-such-python")
    with pytest.raises(InfrastructureError, match="child process must start"):
        smoke(linear, recorded)


def test_arguments_out_of_range_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_smoke_test(
            tmp_path,
            sha256="",
            golden=tmp_path,
            timeout_s=0,
            memory_bytes=0,
            batch_sizes=(1, 0),
            rtol=-1,
            atol=np.nan,
            p99_ms=0,
            rows_per_s=np.inf,
        )
    names = ("timeout_s", "memory_bytes", "batch_sizes", "rtol", "atol", "p99_ms", "rows_per_s")
    for name in names:
        assert f"{name} must" in str(caught.value)
