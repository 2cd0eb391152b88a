"""A version as its consumers load it: by column, without assay, and behind MLflow's own server."""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.column_model import METADATA, ROWS, answers, column_model

from components.adapters.mlflow_model import signature_of, takes_columns
from components.adapters.mlflow_registry import Registry, Version
from components.adapters.mlflow_tracking import Tracking
from components.contract import ModelMetadata, TensorSpec
from components.register.tags import consumer_requirements


@pytest.fixture(scope="session")
def made() -> list[Version]:
    return []


@pytest.fixture
def version(tracking: Tracking, tmp_path: Path, made: list[Version]) -> Version:
    """A version of the column model."""
    if not made:
        onnx_file = tmp_path / "exported.onnx"
        # Not as MLflow would write it again.
        onnx_file.write_bytes(column_model().SerializeToString(deterministic=True) + b"\x7a\x00")
        run_id = tracking.start_run("columns", "run", {}, {"epochs": 2})
        tracking.log_metrics(run_id, {"accuracy": 0.9, "loss": 0.1})
        tracking.log_metrics(run_id, {"loss": 0.05}, step=3)
        made.append(
            Registry(tracking, "columns").create(
                run_id,
                onnx_file,
                metadata=METADATA,
                example={name: values[:2] for name, values in ROWS.items()},
                requirements=consumer_requirements(),
                tags={},
                description="# columns\n",
            )
        )
        assert Registry(tracking, "columns").settle(made[0]) == made[0]
        fetched = Registry(tracking, "columns").download(1, tmp_path)
        assert fetched.read_bytes() == onnx_file.read_bytes()
    return made[0]


@pytest.fixture
def folder(version: Version, tracking: Tracking, tmp_path: Path) -> Path:
    """The version, downloaded."""
    into = tmp_path / "downloaded"
    into.mkdir()
    return Registry(tracking, "columns").download(version.number, into).parent


def test_columns_are_told_from_tensors() -> None:
    assert takes_columns(METADATA)
    mixed = METADATA.inputs + (TensorSpec(name="x", dtype="float32", shape=("batch", 2)),)
    assert not takes_columns(METADATA.model_copy(update={"inputs": mixed}))


def test_the_signature_of_columns_goes_by_column(folder: Path) -> None:
    from mlflow.models import Model

    signature = Model.load(folder).signature
    assert [(c["name"], c["type"], c["required"]) for c in signature.inputs.to_dict()] == [
        ("carrier", "string", True),
        ("hour", "long", True),
        ("distance", "double", True),
        ("night", "boolean", True),
    ]
    outputs = {column["name"]: column for column in signature.outputs.to_dict()}
    assert outputs["score"]["type"] == "float"
    assert outputs["label"]["type"] == "string"
    assert outputs["parts"]["type"] == "array"
    assert outputs["parts"]["items"] == {"type": "float"}


def test_the_signature_of_tensors_goes_by_tensor() -> None:
    metadata = ModelMetadata(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", "time", 3)),),
        outputs=(
            TensorSpec(name="y", dtype="int64", shape=("batch",)),
            TensorSpec(name="label", dtype="string", shape=("batch",)),
        ),
        classes=(),
        description="",
    )
    signature = signature_of(metadata)
    assert [spec.shape for spec in signature.inputs] == [(-1, -1, 3)]
    assert [(s.name, s.type, s.shape) for s in signature.outputs] == [
        ("y", np.dtype("int64"), (-1,)),
        ("label", np.dtype(str), (-1,)),
    ]
    assert type(signature).from_dict(signature.to_dict()) == signature


def test_run_model_and_version_name_each_other(
    version: Version, tracking: Tracking, folder: Path
) -> None:
    from mlflow.models import Model

    held = tracking.client.get_model_version("columns", str(version.number))
    logged = tracking.client.get_logged_model(version.source.removeprefix("models:/"))
    run = tracking.client.get_run(version.run_id)
    written = Model.load(folder)
    assert logged.status == "READY"
    assert held.source == f"models:/{logged.model_id}"
    assert written.model_id == written.model_uuid == logged.model_id
    assert written.run_id == version.run_id == logged.source_run_id
    assert [one.model_id for one in run.outputs.model_outputs] == [logged.model_id]
    assert {m.key: m.value for m in logged.metrics} == {"accuracy": 0.9, "loss": 0.05}
    assert tracking.history(version.run_id, "loss") == {0: 0.1, 3: 0.05}
    assert len(tracking.client.get_metric_history(version.run_id, "loss")) == 2, "none anew"
    assert held.description == "# columns\n"
    assert tracking.client.get_registered_model("columns").description == "a rule with columns"
    assert str(Path(sys.executable).parent) not in (folder / "MLmodel").read_text()


def test_mlflow_reads_the_example_and_the_graph(folder: Path) -> None:
    import mlflow.onnx
    from mlflow.models import Model

    example = Model.load(folder).load_input_example(str(folder))
    assert example.to_dict("list") == {
        "carrier": ["AA", "UA"],
        "hour": [1, 2],
        "distance": [10.0, pytest.approx(math.nan, nan_ok=True)],
        "night": [False, True],
    }
    assert mlflow.onnx.load_model(str(folder)).graph.name == "columns"


CONSUMER = """
import importlib.util, json, sys
assert importlib.util.find_spec("components") is None, "assay is not importable here"
import mlflow.pyfunc, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
rows = pd.DataFrame({
    "night": [False, True, True, False],
    "carrier": ["AA", "UA", None, "ZZ"],
    "distance": [10.0, None, 30.0, -5.0],
    "hour": [1, 2, 3, 4],
})
assert rows["carrier"].dtype == "str"
found = [model.predict(rows), model.predict(rows.astype({"carrier": object}))]
print(json.dumps([one.to_dict("list") for one in found]))
"""


def outside(tmp_path: Path, *paths: str) -> dict[str, str]:
    """The environment of a process in which assay, installed in place, cannot be imported.

    The folder of installed packages is put on the path by name, so that what is there to import
    other folders is not run.
    """
    import mlflow

    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(mlflow.__file__).parents[1]), *paths]),
        "PYTHONNOUSERSITE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }


def test_a_consumer_without_assay_predicts_from_rows(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", CONSUMER, str(folder)],
        cwd=tmp_path,
        env=outside(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    wanted = {name: values.tolist() for name, values in answers().items()}
    assert json.loads(done.stdout.splitlines()[-1]) == [wanted, wanted]


@contextlib.contextmanager
def served(folder: Path, environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """MLflow's scoring server for a model, on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder)),
        *("--env-manager", "local", "-h", "127.0.0.1", "-p", str(port), "-w", "1"),
    ]
    with (
        log.open("wb") as stream,
        subprocess.Popen(command, env=environment, stdout=stream, stderr=stream) as server,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ping"):
                    break
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()


def ask(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_mlflows_scoring_server_answers_rows(folder: Path, tmp_path: Path) -> None:
    environment = {**outside(tmp_path), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    with served(folder, environment, tmp_path / "log") as url:
        names = ["carrier", "hour", "distance", "night"]
        rows = [["AA", 1, 10.0, False], ["UA", 2, None, True], [None, 3, 30, True]]
        status, found = ask(url, {"dataframe_split": {"columns": names, "data": rows}})
        assert status == 200, found
        wanted = {name: values[:3].tolist() for name, values in answers().items()}
        assert found["predictions"] == [
            {name: values[row] for name, values in wanted.items()} for row in range(3)
        ]
        broken = [["AA", None, 10.0, False]]
        status, found = ask(url, {"dataframe_split": {"columns": names, "data": broken}})
        assert status == 400, found
