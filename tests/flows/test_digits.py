"""digits from end to end by the real command: what a first run leaves, and what a second one does.

The first run has an embedded server; its home is shared by the tests and not changed by them.
"""

import hashlib
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

KEYS = {
    "pipeline",
    "model",
    "version",
    "decision",
    "champion",
    "reason",
    "mlflow_run_id",
    "onnx_sha256",
    "metrics",
    "stages",
    "seconds",
}
STAGES = ["train", "validate", "export", "register", "smoke_test", "decide"]
ARTIFACTS = {
    "train/weights.safetensors",
    "train/encoding.json",
    "train/loss_curve.png",
    "train/profile.json",
    "train/profile.png",
    "validate/contract_report.json",
    "validate/gradient_report.json",
    "validate/gates_report.json",
    "validate/leakage_report.json",
    "validate/source_report.json",
    "validate/report.md",
    *(f"validate/{name}.png" for name in ("gradients", "curves", "slices", "loss")),
    "export/model.onnx",
    "export/golden.npz",
    "export/tensor.onnx",
    "export/tensor_golden.npz",
    "export/parity_report.json",
    "smoke_test/smoke_report.json",
    "decide/decision.md",
    *(f"records/{stage}.json" for stage in STAGES),
}


@pytest.fixture
def client(finished: Any) -> MlflowClient:
    return MlflowClient(f"sqlite:///{finished.home}/mlflow/mlflow.db")


@pytest.fixture
def registry(finished: Any) -> Iterator[str]:
    """MLflow's own loading functions, pointed at the finished home."""
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{finished.home}/mlflow/mlflow.db")
    yield "models:/digits@champion"
    mlflow.set_tracking_uri(before)


def test_stdout_is_one_json_object(finished: Any) -> None:
    outcome = finished.outcome
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 1
    summary = outcome.json
    assert set(summary) == KEYS
    assert (summary["pipeline"], summary["model"]) == ("digits", "digits")
    assert (summary["version"], summary["champion"]) == (1, 1)
    assert summary["decision"] == "promoted"
    assert summary["metrics"]["accuracy"] >= 0.97
    assert list(summary["stages"]) == STAGES
    for stage in summary["stages"].values():
        assert set(stage) == {"seconds", "cached"}
        assert stage["cached"] is False
        assert stage["seconds"] > 0
    assert sum(stage["seconds"] for stage in summary["stages"].values()) < summary["seconds"]
    assert "Traceback" not in outcome.err


def test_nothing_is_written_outside_of_the_home(
    finished: Any, child_environment: dict[str, str]
) -> None:
    assert [path.name for path in finished.home.parent.iterdir()] == ["home"]
    assert not [path for path in Path(child_environment["HOME"]).rglob("*") if path.is_file()]


def test_no_work_is_left_behind(finished: Any) -> None:
    assert list((finished.home / "work").iterdir()) == []
    assert not [path for path in finished.home.rglob(".*") if path.name.startswith(".probe-")]


def test_version_and_aliases(finished: Any, client: MlflowClient) -> None:
    summary = finished.outcome.json
    (model,) = client.search_registered_models()
    assert {alias: int(number) for alias, number in model.aliases.items()} == {"champion": 1}
    (version,) = client.search_model_versions("name = 'digits'")
    assert version.run_id == summary["mlflow_run_id"]
    tags = {name.removeprefix("assay."): value for name, value in version.tags.items()}
    for name in ("data_fingerprint", "code_digest", "config_digest", "onnx_sha256"):
        assert re.fullmatch(r"[0-9a-f]{64}", tags[name]), name
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(\+changes)?", tags["code_revision"])
    assert tags["onnx_sha256"] == summary["onnx_sha256"]
    assert (tags["decision"], tags["reason"]) == ("promoted", summary["reason"])


def test_mlflow_run(finished: Any, client: MlflowClient) -> None:
    run = client.get_run(finished.outcome.json["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["assay.decision"] == "promoted"
    assert run.data.params["epochs"] == "20"
    assert run.data.params["rows_train"] == "1442"
    assert run.data.metrics["accuracy"] == finished.outcome.json["metrics"]["accuracy"]
    assert set(artifacts(client, run.info.run_id)) == ARTIFACTS


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from artifacts(client, run_id, item.path)
        else:
            yield item.path


def test_registered_bytes_are_those_that_were_exported(
    finished: Any, registry: str, tmp_path: Path
) -> None:
    import mlflow.artifacts

    folder = mlflow.artifacts.download_artifacts(registry, dst_path=str(tmp_path))
    content = (Path(folder) / "model.onnx").read_bytes()
    assert hashlib.sha256(content).hexdigest() == finished.outcome.json["onnx_sha256"]


def test_consumer_can_load_the_champion(finished: Any, registry: str) -> None:
    import mlflow.pyfunc
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    model = mlflow.pyfunc.load_model(registry)
    answer = model.predict({"image": images.astype(np.float32).reshape(-1, 1, 8, 8)})
    found = answer["probabilities"].argmax(axis=1)
    assert (found == digits).mean() >= 0.97


def test_task_runs_are_stored_by_prefect(finished: Any) -> None:
    database = sqlite3.connect(f"file:{finished.home}/prefect/prefect.db?mode=ro", uri=True)
    tasks = database.execute(
        "SELECT name, state_type, state_name FROM task_run ORDER BY start_time"
    ).fetchall()
    flows = database.execute("SELECT state_name FROM flow_run").fetchall()
    database.close()
    assert [re.sub(r"-\w+$", "", name) for name, _, _ in tasks] == STAGES
    assert {(kind, state) for _, kind, state in tasks} == {("COMPLETED", "Completed")}
    assert flows == [("Completed",)]


def test_second_run_is_cached(
    finished: Any, client: MlflowClient, assay: Callable[..., Any], prefect_server: str
) -> None:
    outcome = assay(
        "run", "digits", "--json", ASSAY_HOME=finished.home, PREFECT_API_URL=prefect_server
    )
    assert outcome.code == 0, outcome.err
    first, second = finished.outcome.json, outcome.json
    cached = [name for name, stage in second["stages"].items() if stage["cached"]]
    assert cached == ["train", "validate", "export"]
    assert all(second["stages"][name]["seconds"] == 0 for name in cached)
    assert second["decision"] == "kept_champion"
    for name in ("version", "champion", "mlflow_run_id", "onnx_sha256", "metrics"):
        assert second[name] == first[name]
    assert len(client.search_model_versions("name = 'digits'")) == 1
    assert client.get_run(first["mlflow_run_id"]).info.status == "FINISHED"
