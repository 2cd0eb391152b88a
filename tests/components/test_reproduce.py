"""Rebuilding from a record: equal bytes again, and how far apart those are that differ."""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.ledger import kept as pipeline
from support.ledger import write_rows
from torch import Tensor

from components.data.snapshot import Snapshot
from components.data.take import take_snapshot
from components.digest import digest_file, digest_json
from components.errors import ConfigError
from components.export.golden import write_golden
from components.plan import open_source, plan_job
from components.records import Artifact, Job, Stage, TrainedModel
from components.reproduce import (
    Check,
    Difference,
    Rebuilt,
    compare,
    compare_environment,
    conclude,
    config_here,
    measure_outputs,
    measure_weights,
    read_config,
    rebuild,
)
from components.settings import Settings
from components.storage import Storage

AS_OF = date(2014, 1, 1)
SHA = "0" * 64
FILE = Artifact(uri="runs:/1/train/weights.safetensors", sha256=SHA, size=1)
JOB = Job(
    pipeline="kept",
    as_of=AS_OF,
    window="all lines",
    seed=0,
    config=pipeline.config.model_dump(mode="json"),
    data_fingerprint=SHA,
    code_digest=SHA,
    code_revision="unknown",
    config_digest=digest_json(pipeline.config.model_dump(mode="json")),
    rows={"train": 300, "holdout": 64},
    excluded={},
)


def trained(device: str = "cpu", **environment: str) -> TrainedModel:
    return TrainedModel(
        job=JOB,
        run_id="1",
        weights=FILE,
        encoding=FILE,
        device=device,
        environment=environment,
        epochs=2,
        best_epoch=2,
        train_loss=0.1,
        validation_loss=0.1,
        stage=Stage(seconds=1.0, flow_run_id="1"),
    )


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    monkeypatch.setenv("TEAM_ROWS", str(write_rows(tmp_path / "rows.txt")))
    source = open_source(pipeline, Settings(home=tmp_path))
    return take_snapshot(source, pipeline.features, AS_OF, Storage(tmp_path / "snapshots"))


def build(snapshot: Snapshot, folder: Path, **changes: Any) -> Rebuilt:
    folder.mkdir()
    config = pipeline.config.model_copy(update=changes)
    return rebuild(pipeline, config, JOB, snapshot, folder)


def test_equal_records_give_equal_bytes(snapshot: Snapshot, tmp_path: Path) -> None:
    first, second = (build(snapshot, tmp_path / name) for name in ("first", "second"))
    for name in ("weights", "encoding", "onnx"):
        assert digest_file(getattr(first, name)) == digest_file(getattr(second, name))
    assert measure_weights(first.weights, second.weights)[0].weight == 0.0
    assert measure_outputs(second.model, tmp_path / "first" / "tensor_golden.npz") == (
        {"probabilities": 0.0},
        "",
    )


def test_another_seed_gives_other_bytes_and_the_difference_is_measured(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    first, second = build(snapshot, tmp_path / "first"), build(snapshot, tmp_path / "2", seed=1)
    assert digest_file(first.encoding) == digest_file(second.encoding)
    for name in ("weights", "onnx"):
        assert digest_file(getattr(first, name)) != digest_file(getattr(second, name))
    difference, problem = measure_weights(first.weights, second.weights)
    states = [model.state_dict() for model in (first.model, second.model)]
    gaps = {name: (states[0][name] - states[1][name]).abs().max().item() for name in states[0]}
    assert problem == ""
    assert difference.weight == pytest.approx(max(gaps.values()))
    assert gaps[difference.tensor] == max(gaps.values())
    outputs, _ = measure_outputs(second.model, tmp_path / "first" / "tensor_golden.npz")
    assert 0 < outputs["probabilities"] <= 1


@pytest.mark.parametrize(
    ("registered", "rebuilt", "weight"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
        ([float("inf"), 2.0], [float("inf"), 2.0], 0.0),
        ([1.0, 2.0], [1.0, float("nan")], None),
    ],
)
def test_largest_difference_of_a_weight(
    tmp_path: Path, registered: list[float], rebuilt: list[float], weight: float | None
) -> None:
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, values in zip(paths, (registered, rebuilt), strict=True):
        save_file({"alike": torch.zeros(2), "w": torch.tensor(values)}, path)
    difference, problem = measure_weights(*paths)
    assert difference.weight == weight
    assert ("w has a value" in problem) == (weight is None)
    assert difference.tensor == "w" or not weight


@pytest.mark.parametrize("other", [{"w": torch.zeros(3)}, {"v": torch.zeros(2)}, {}])
def test_other_tensors_cannot_be_compared(tmp_path: Path, other: dict[str, Tensor]) -> None:
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, tensors in zip(paths, ({"w": torch.zeros(2)}, other), strict=True):
        save_file(tensors, path)
    difference, problem = measure_weights(*paths)
    assert difference == Difference()
    assert "other names or shapes" in problem
    assert " w" in problem


def test_golden_rows_of_another_model_cannot_be_compared(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    model = build(snapshot, tmp_path / "built").model
    golden = tmp_path / "golden.npz"
    rows = {"numeric": np.zeros((4, 3), np.float32)}
    write_golden(golden, {"numeric": np.zeros((4, 5), np.float32)}, {"probabilities": np.ones(4)})
    assert "does not take the golden rows" in measure_outputs(model, golden)[1]
    (name,) = (spec.name for spec in model.get_model_metadata().inputs)
    write_golden(golden, {name: rows["numeric"]}, {"score": np.ones(4)})
    assert "other outputs" in measure_outputs(model, golden)[1]


def test_configuration_as_it_was_recorded() -> None:
    config, check, notes = read_config(pipeline, JOB)
    assert (config, check.agrees, notes) == (pipeline.config, True, ())


def test_setting_that_did_not_exist_then_is_named() -> None:
    values = {name: value for name, value in JOB.config.items() if name != "clip_norm"}
    job = JOB.model_copy(update={"config": values, "config_digest": digest_json(values)})
    _, check, notes = read_config(pipeline, job)
    assert check.agrees is False
    assert notes == ("config: clip_norm was not set and is read as 0.0.",)


def test_setting_that_is_gone_is_refused() -> None:
    job = JOB.model_copy(update={"config": {**JOB.config, "warmth": 3}})
    with pytest.raises(ConfigError, match=r"warmth.*Check out the recorded code"):
        read_config(pipeline, job)


def test_plan_and_reproduction_digest_configurations_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_ROWS", str(write_rows(tmp_path / "rows.txt")))
    job = plan_job(pipeline, Settings(home=tmp_path / "home"), assignments=["epochs=3"])
    assert read_config(pipeline, job).check.agrees is True


def test_what_trained_on_the_cpu_is_rebuilt_there() -> None:
    config = pipeline.config.model_copy(update={"device": "auto"})
    here, notes = config_here(config, "cpu")
    assert (here.device, notes) == ("cpu", ())
    assert here.model_copy(update={"device": "auto", "shards": 0}) == config


def test_another_device_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = pipeline.config.model_copy(update={"device": "cuda", "require_gpu": True})
    here, (note,) = config_here(config, "cuda:0")
    assert (here.device, here.require_gpu) == ("cpu", False)
    assert "trained on cuda and is rebuilt on cpu" in note
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here, notes = config_here(config, "cuda:0")
    assert (here.device, notes) == ("cuda", ())


def test_several_processes_are_foreseen() -> None:
    config = pipeline.config.model_copy(update={"workers": 2})
    here, (note,) = config_here(config, "cpu")
    assert (here.workers, here.parts) == (1, 2)
    assert "by 2 processes" in note


def test_environment_names_what_differs() -> None:
    checks = compare_environment(
        trained("cuda:0", torch="2.13.0", gone="1"), {"torch": "2.13.0", "new": "2"}, "cpu"
    )
    assert {check.what: check.agrees for check in checks} == {
        "device": False,
        "torch": True,
        "gone": False,
        "new": False,
    }


YES, NO = compare("data", SHA, SHA), compare("weights", SHA, "1" * 64)
SKIPPED = Check(what="snapshot", recorded=SHA, rebuilt="not stored", agrees=None)
SAME, OTHER = compare("torch", "2.13.0", "2.13.0"), compare("processor", "one", "another")


@pytest.mark.parametrize(
    ("checks", "environment", "difference", "words"),
    [
        ((YES, SKIPPED), (OTHER,), None, ["byte for byte", "every digest agrees"]),
        ((YES, NO), (SAME,), None, ["weights differs", "nothing that is recorded"]),
        (
            (YES, NO, compare("onnx", SHA, "2" * 64)),
            (SAME, OTHER),
            Difference(weight=3e-6, tensor="w", outputs={"p": 1e-7}),
            ["weights and onnx differ in bytes, by at most 3.0e-06", "1.0e-07", "processor"],
        ),
        ((compare("code", SHA, "1" * 64),), (OTHER,), None, ["code differs;", "as recorded"]),
    ],
)
def test_verdict(
    checks: tuple[Check, ...],
    environment: tuple[Check, ...],
    difference: Difference | None,
    words: list[str],
) -> None:
    verdict = conclude("kept version 1", checks, environment, difference)
    assert verdict.startswith("kept version 1 is ")
    for word in words:
        assert word in verdict
