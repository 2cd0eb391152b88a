"""The inference benchmark runs, compares equals, and refuses a contender that answers otherwise."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
WAYS = (
    "torch eager",
    "onnxruntime",
    "onnxruntime, spinning",
    "onnxruntime, sleeping",
)

WITH_A_LIAR = """
import inference, inference_cases

honest = inference.contenders

def contenders(case, size, threads, *, compiled):
    found = honest(case, size, threads, compiled=compiled)
    answers = found["onnxruntime"]()
    found["liar"] = lambda: [answer + 0.01 for answer in answers]
    return found

inference.contenders = contenders
inference.main()
"""

COMPILED_BY_NOBODY = """
import torch, inference

torch.compile = lambda predict, dynamic: predict
inference.main()
"""

WITH_WRONG_OPTIONS = """
import inference

for options in (
    ["--threads", "two"], ["--rounds", "0"], ["--batches", "2048"], ["--extra", "nothing"]
):
    try:
        inference.parse(options)
    except SystemExit as end:
        print(end.code)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run(checkout: Path, home: Path) -> Run:
    """Run the benchmark at its smallest, as a script or from a program that changes it."""

    def start(*options: str, program: str = "") -> "subprocess.CompletedProcess[str]":
        folder = checkout / "benchmarks"
        script = ["-c", program] if program else [str(folder / "inference.py")]
        path = os.pathsep.join([str(checkout), str(folder)] if program else [str(checkout)])
        small = ["--cases", "digits", "--quick", "--rounds", "2", "--threads", "1"]
        return subprocess.run(
            [sys.executable, *script, *small, "--batches", "1,7", "--home", str(home), *options],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


def test_every_contender_has_a_row_for_every_batch(
    run: Run, tmp_path: Path, golden: tuple[Path, Path]
) -> None:
    path = tmp_path / "figures.json"
    extra = f"other file={golden[0]},{golden[1]}"
    done = run("--json", str(path), "--extra", extra, program=COMPILED_BY_NOBODY)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_bytes())["results"]
    wanted = {(size, way) for size in (1, 7) for way in (*WAYS, "torch.compile", "other file")}
    assert {(result["batch"], result["contender"]) for result in found} == wanted
    for result in found:
        assert 0 < result["best_us"] <= result["p50_us"] <= result["p99_us"]
        assert len(result["ratios"]) == 2
        assert result["ratio"] > 0
        assert result["contender"] != "torch eager" or result["ratio"] == 1.0
    assert done.stdout.count("| 1 | 7 |") == 6
    assert "Batch 1024 on one thread, onnxruntime: Conv " in done.stdout
    assert "Batch 1024 on one thread, PyTorch: " in done.stdout
    assert "\nAim (flights: 5 times as fast" in done.stdout


def test_a_contender_that_answers_otherwise_is_refused(run: Run) -> None:
    done = run("--no-compile", program=WITH_A_LIAR)
    assert done.returncode == 1
    assert "digits: liar must answer as the module does, within 0.0001; it is 0.01" in done.stderr
    assert "Aim" not in done.stdout


def test_wrong_options_are_refused(run: Run) -> None:
    done = run(program=WITH_WRONG_OPTIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2"] * 4
    assert done.stderr.count("error: ") == 4


@pytest.fixture
def golden(tmp_path: Path) -> tuple[Path, Path]:
    """A file that has nothing to do with the case, and rows for it."""
    import numpy as np
    from onnx import TensorProto, helper

    from components.export.golden import write_golden

    sides = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2])] for name in "xy"
    ]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", *sides)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model, rows = tmp_path / "other.onnx", tmp_path / "golden.npz"
    model.write_bytes(proto.SerializeToString())
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_golden(rows, {"x": values}, {"y": values})
    return model, rows
