"""Every check of the smoke test is seen to fire, on real models in a real child process."""

import fcntl
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from components.errors import ConfigError, GateError, InfrastructureError
from components.smoke_test import runner
from components.smoke_test.runner import SmokeReport, run_smoke_test

Recorded = dict[str, npt.NDArray[Any]]


class Smoke(Protocol):
    def __call__(self, model: Path, recorded: Recorded, **options: Any) -> SmokeReport: ...


@pytest.fixture
def smoke(save_golden: Callable[[Recorded], Path], sha256: Callable[[Path], str]) -> Smoke:
    """Test a model file against recorded arrays, by default with its own sha256."""

    def test(model: Path, recorded: Recorded, **options: Any) -> SmokeReport:
        defaults: dict[str, Any] = {"batch_sizes": (1, 2), "timeout_s": 30}
        chosen = {"sha256": sha256(model), **defaults, **options}
        return run_smoke_test(model, golden=save_golden(recorded), **chosen)

    return test


@pytest.fixture
def reject(smoke: Smoke) -> Callable[..., str]:
    """Expect a gate's refusal and give its message."""

    def test(model: Path, recorded: Recorded, **options: Any) -> str:
        with pytest.raises(GateError) as caught:
            smoke(model, recorded, **options)
        assert caught.value.stage == "smoke_test"
        return str(caught.value)

    return test


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script in the place of the child."""

    def replace(source: str) -> None:
        path = tmp_path / "stub.py"
        path.write_text(textwrap.dedent(source))
        monkeypatch.setattr(runner, "_CHILD", path)

    return replace


def test_a_sound_model_passes_with_measurements(
    linear: Path, recorded: Recorded, save_golden: Callable[[Recorded], Path], sha256: Any
) -> None:
    report = run_smoke_test(linear, sha256=sha256(linear), golden=save_golden(recorded))
    assert report.golden_rows == 5
    assert report.max_difference < 1e-6
    assert report.batch_sizes == (1, 2, 7, 1024)
    assert report.providers == ("CPUExecutionProvider",)
    assert 0 < report.p50_ms <= report.p99_ms
    assert 0 < report.load_ms < report.seconds * 1e3
    assert report.first_run_ms > 0
    assert report.limits["RLIMIT_CORE"] == 0
    assert report.limits["RLIMIT_CPU"] == 65
    assert report.limits["RLIMIT_AS"] == 4 << 30 or sys.platform == "darwin"
    assert SmokeReport.model_validate_json(report.model_dump_json()) == report


def test_other_bytes_than_the_registered_ones(
    linear: Path, recorded: Recorded, reject: Callable[..., str]
) -> None:
    message = reject(linear, recorded, sha256="0" * 64)
    assert "sha256 must be 0000" in message
    assert "loading the model" not in message  # unknown bytes are not even parsed


def test_altered_scores_and_labels_are_both_reported(
    linear: Path, recorded: Recorded, reject: Callable[..., str]
) -> None:
    recorded["output/scores"][3, 1] += 0.5
    recorded["output/label"][0] += 1
    message = reject(linear, recorded)
    assert "'scores' must equal the recorded values within rtol 1e-05" in message
    assert "row 3 differs by 0.5" in message
    assert "'label' must equal the recorded values; 1 differ" in message
    assert "golden rows: " in message
    assert "batch 1: " in message


def test_tolerance_decides_how_large_a_difference_passes(
    linear: Path, recorded: Recorded, smoke: Smoke, reject: Callable[..., str]
) -> None:
    recorded["output/scores"][2, 0] += np.float32(1e-3)
    assert smoke(linear, recorded, atol=2e-3).max_difference == pytest.approx(1e-3, rel=1e-2)
    assert "row 2 differs by 0.001" in reject(linear, recorded, atol=5e-4, rtol=0)


def test_output_of_another_shape(
    linear: Path, recorded: Recorded, reject: Callable[..., str]
) -> None:
    recorded["output/label"] = recorded["output/label"][:, None]
    assert "'label' must be (5, 1) int64; got (5,) int64" in reject(linear, recorded)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: np.random.default_rng(1).bytes(4096),
        lambda raw: pickle.dumps({"weight": [1.0, 2.0]}),
        lambda raw: b"",
        lambda raw: b"\x24\x00\x00\x00ORTM" + raw,
    ],
    ids=["truncated", "garbage", "pickle", "empty", "ort-format"],
)
def test_files_that_are_no_model(
    linear: Path,
    recorded: Recorded,
    reject: Callable[..., str],
    spoil: Callable[[bytes], bytes],
) -> None:
    linear.write_bytes(spoil(linear.read_bytes()))
    assert "loading the model: " in reject(linear, recorded)


def test_external_data_is_refused(
    recorded: Recorded, tmp_path: Path, linear: Path, reject: Callable[..., str]
) -> None:
    (tmp_path / "weight.bin").write_bytes(bytes(24))
    model = onnx.load(linear)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weight.bin")
    linear.write_bytes(model.SerializeToString())
    assert "loading the model: " in reject(linear, recorded)


def test_output_that_depends_on_the_other_rows(
    save_model: Callable[..., Path], rows: npt.NDArray[np.float32], reject: Callable[..., str]
) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["features", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["features", "mean"], ["scores"]),
    ]
    model = save_model(nodes, constants={"axes": np.array([0])}, width=3)
    recorded = {"input/features": rows, "output/scores": rows - rows.mean(axis=0)}
    message = reject(model, recorded)
    assert "golden rows: " not in message
    assert "batch 1: 'scores' must equal" in message
    assert "batch 2: 'scores' must equal" in message


def test_batch_that_is_not_dynamic(
    save_model: Callable[..., Path], rows: npt.NDArray[np.float32], reject: Callable[..., str]
) -> None:
    model = save_model([helper.make_node("Neg", ["features"], ["scores"])], batch=5, width=3)
    message = reject(model, {"input/features": rows, "output/scores": -rows})
    assert "the first run: " in message
    assert "batch 2: " in message
    assert "golden rows: " not in message


def test_nan_in_the_outputs(
    save_model: Callable[..., Path], rows: npt.NDArray[np.float32], reject: Callable[..., str]
) -> None:
    model = save_model([helper.make_node("Sqrt", ["features"], ["scores"])], width=3)
    recorded = {"input/features": rows, "output/scores": np.sqrt(np.abs(rows))}
    assert "'scores' must be finite; got" in reject(model, recorded)


def test_nan_in_the_golden_file(
    linear: Path, recorded: Recorded, reject: Callable[..., str]
) -> None:
    recorded["output/scores"][2, 0] = np.nan
    assert "recorded output 'scores' holds 1 NaN" in reject(linear, recorded)


@pytest.mark.parametrize(
    ("old", "new", "cast", "expected"),
    [
        ("input/features", None, None, "at least one input/<name>"),
        ("input/features", "input/pixels", None, "inputs must be {'pixels': 'tensor(float)'}"),
        ("input/features", "input/features", "float64", "{'features': 'tensor(double)'}"),
        ("output/label", None, None, "outputs must be {'scores': 'tensor(float)'}"),
    ],
    ids=["no-input", "name", "type", "unmatched-output"],
)
def test_signature_that_differs(
    linear: Path,
    recorded: Recorded,
    reject: Callable[..., str],
    old: str,
    new: str | None,
    cast: str | None,
    expected: str,
) -> None:
    array = recorded.pop(old)
    if new is not None:
        recorded[new] = array.astype(cast or array.dtype)
    assert expected in reject(linear, recorded)


def test_model_without_the_recorded_input(
    save_model: Callable[..., Path], rows: npt.NDArray[np.float32], reject: Callable[..., str]
) -> None:
    neg = helper.make_node("Neg", ["pixels"], ["scores"])
    model = save_model([neg], feature="pixels", width=3)
    message = reject(model, {"input/features": rows, "output/scores": -rows})
    assert "inputs must be {'features': 'tensor(float)'} as in the golden file" in message


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "NoSuchExecutionProvider"])
def test_provider_that_this_machine_lacks(
    linear: Path,
    recorded: Recorded,
    reject: Callable[..., str],
    provider: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # the same on a machine that has a GPU
    message = reject(linear, recorded, required_provider=provider)
    assert f"must run on {provider}; onnxruntime chose CPUExecutionProvider" in message


def test_failures_of_several_checks_come_together(
    linear: Path, recorded: Recorded, reject: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    recorded["output/scores"][0, 0] += 1
    message = reject(linear, recorded, required_provider="CUDAExecutionProvider")
    assert "must run on CUDAExecutionProvider" in message
    assert "golden rows: 'scores' must equal" in message


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


@pytest.fixture
def endless(save_model: Callable[..., Path]) -> Path:
    """A model that takes the cosine of its input 2**60 times."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ab"]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["keep"], ["go"]),
            helper.make_node("Cos", ["a"], ["b"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, []),
            value[0],
        ],
        [helper.make_tensor_value_info("go", TensorProto.BOOL, []), value[1]],
    )
    loop = helper.make_node("Loop", ["turns", "", "features"], ["scores"], body=body)
    return save_model([loop], constants={"turns": np.array(1 << 60)}, width=3)


def test_model_that_never_ends(
    endless: Path, rows: npt.NDArray[np.float32], reject: Callable[..., str]
) -> None:
    message = reject(endless, {"input/features": rows, "output/scores": rows}, timeout_s=1.5)
    assert "must answer within 1.5 s; it was killed" in message


def test_model_that_uses_up_its_processor_time(
    endless: Path,
    rows: npt.NDArray[np.float32],
    reject: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "_CPU_GRACE_S", -29)  # one CPU second of the 30 on the clock
    message = reject(endless, {"input/features": rows, "output/scores": rows})
    assert "it died by SIGXCPU, the limit on CPU seconds was used up" in message


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
    assert names <= {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", *runner._PASSED_ON, *system}


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
        )
    for name in ("timeout_s", "memory_bytes", "batch_sizes", "rtol", "atol"):
        assert f"{name} must" in str(caught.value)
