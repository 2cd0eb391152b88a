"""Every check of the smoke test is seen to fire, on real models in a real child process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import helper
from support.smoke_types import Recorded, Smoke

from components.smoke_test.runner import SmokeReport, run_smoke_test


def test_a_sound_model_passes_with_measurements(
    linear: Path, recorded: Recorded, save_golden: Callable[[Recorded], Path], sha256: Any
) -> None:
    report = run_smoke_test(linear, sha256=sha256(linear), golden=save_golden(recorded))
    assert report.golden_rows == 5
    assert report.max_difference < 1e-6
    assert report.batch_sizes == (1, 2, 7, 1024)
    assert report.providers == ("CPUExecutionProvider",)
    assert 0 < report.p50_ms <= report.p95_ms <= report.p99_ms
    assert report.rows_per_s > 1024
    assert report.calls == 1000
    assert 0 <= report.growth_bytes <= 2 << 20
    assert sum(report.parts_ms.values()) < report.seconds * 1e3
    assert 0 < report.load_ms < report.seconds * 1e3
    assert report.first_run_ms > 0
    assert report.limits["network"] in ("namespace", "audit")
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
