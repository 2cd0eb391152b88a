"""prefect.yaml: what Prefect would ignore in silence, the forms, and a worker that runs one."""

import importlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

# Prefect ignores keys that it does not know; these are the ones that it does (3.8).
TOP = {"name", "prefect-version", "build", "push", "pull", "definitions", "deployments"}
DEPLOYMENT = {
    "name",
    "version",
    "version_type",
    "tags",
    "description",
    "schedule",
    "schedules",
    "paused",
    "concurrency_limit",
    "flow_name",
    "entrypoint",
    "parameters",
    "enforce_parameter_schema",
    "build",
    "push",
    "pull",
    "work_pool",
    "triggers",
    "sla",
}
WORK_POOL = {"name", "work_queue_name", "job_variables"}
LIMIT = {"limit", "collision_strategy", "grace_period_seconds"}
JOB_VARIABLES = {"command", "env", "labels", "name", "stream_output", "working_dir"}
STAGES = {"train", "validate", "export", "register", "smoke_test", "decide"}
BY_HAND = {"promote", "rollback", "history"}
FILE = yaml.safe_load((Path(__file__).resolve().parents[2] / "prefect.yaml").read_text())
DEPLOYMENTS = [pytest.param(d, id=d["entrypoint"]) for d in FILE["deployments"]]


def flow_of(deployment: Mapping[str, Any]) -> Any:
    module, _, name = deployment["entrypoint"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_prefect_knows_every_key() -> None:
    from prefect.cli.deploy._models import (
        ConcurrencyLimitSpec,
        DeploymentConfig,
        PrefectYamlModel,
        WorkPoolConfig,
    )

    assert set(DeploymentConfig.model_fields) == DEPLOYMENT
    assert set(WorkPoolConfig.model_fields) == WORK_POOL
    assert set(ConcurrencyLimitSpec.model_fields) == LIMIT
    fields = {field.alias or name for name, field in PrefectYamlModel.model_fields.items()}
    assert fields == TOP - {"definitions"}
    PrefectYamlModel.model_validate(FILE)
    assert set(FILE) <= TOP
    for deployment in FILE["deployments"]:
        assert set(deployment) <= DEPLOYMENT
        assert set(deployment["work_pool"]) <= WORK_POOL
        assert set(deployment["work_pool"].get("job_variables", {})) <= JOB_VARIABLES
        limit = deployment.get("concurrency_limit", 1)
        assert isinstance(limit, int) or set(limit) <= LIMIT


def test_file_holds_no_secret_and_no_block_reference(checkout: Path) -> None:
    text = (checkout / "prefect.yaml").read_text()
    assert "prefect.blocks" not in text
    assert "prefect.variables" not in text
    for word in ("PASSWORD", "TOKEN", "SECRET"):
        assert word not in text


def test_every_stage_and_the_chain_have_a_deployment() -> None:
    names = {d["entrypoint"].rpartition(".")[2] for d in FILE["deployments"]}
    assert names == STAGES | BY_HAND | {"retrain"}
    pairs = [(flow_of(d).name, d["name"]) for d in FILE["deployments"]]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_entrypoint_and_parameters(deployment: dict[str, Any]) -> None:
    from prefect import Flow
    from prefect.utilities.callables import parameter_schema

    flow = flow_of(deployment)
    assert isinstance(flow, Flow)
    schema = parameter_schema(flow.fn)
    given = deployment.get("parameters", {})
    assert set(given) <= set(schema.properties)
    assert schema.definitions == {}
    for name, prop in schema.properties.items():
        assert prop.get("description"), name
        assert prop["type"] in ("string", "integer", "number", "boolean", "array"), name
        assert not {"anyOf", "allOf", "oneOf", "$ref", "const"} & set(prop), name
        if prop["type"] == "array":
            assert prop["items"] == {"type": "string"}
    positions = [prop.get("position") for prop in schema.properties.values()]
    assert positions == sorted(positions)
    example = {"string": "x", "integer": 1}
    required = {name: example[schema.properties[name]["type"]] for name in schema.required}
    flow.validate_parameters({**required, **given})


def test_a_move_by_hand_needs_a_reason_and_a_version() -> None:
    from flows.promote import promote
    from flows.rollback import rollback

    good = {"model": "flights", "version": 1, "reason": "why"}
    for flow in (promote, rollback):
        flow.validate_parameters(good)
        for wrong in ({"reason": ""}, {"model": ""}, {"version": -1}):
            with pytest.raises(Exception, match="invalid parameters"):
                flow.validate_parameters({**good, **wrong})
    rollback.validate_parameters({**good, "version": 0})
    with pytest.raises(Exception, match="invalid parameters"):
        promote.validate_parameters({**good, "version": 0})


def test_only_training_can_go_to_the_pool_of_gpu_workers() -> None:
    pools = {(flow_of(d).name, d["name"]): d["work_pool"]["name"] for d in FILE["deployments"]}
    assert pools.pop(("train", "gpu")) == "gpu"
    assert set(pools.values()) == {"cpu"}


def test_results_of_every_flow_are_json() -> None:
    assert {flow_of(d).result_serializer for d in FILE["deployments"]} == {"json"}


@pytest.fixture
def prefect_environment(
    child_environment: Mapping[str, str], prefect_server: str, checkout: Path, tmp_path: Path
) -> dict[str, str]:
    home = tmp_path / "home"
    return {
        **child_environment,
        "ASSAY_HOME": str(home),
        "ASSAY_CHECKOUT": str(checkout),
        "DO_NOT_TRACK": "true",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": prefect_server,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }


def ask(url: str, path: str, **body: Any) -> Any:
    """Send a request to Prefect's API."""
    request = urllib.request.Request(
        f"{url}/{path}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def make_pool(url: str, name: str) -> None:
    """Make a pool of processes; another test of the session may have made it."""
    try:
        ask(url, "work_pools/", name=name, type="process")
    except urllib.error.HTTPError as error:
        if error.code != 409:
            raise


@pytest.fixture
def worker(prefect_environment: dict[str, str], tmp_path: Path) -> Iterator[None]:
    """A process worker that takes one flow run and ends."""
    process = subprocess.Popen(
        [
            *(Path(sys.executable).with_name("prefect"), "worker", "start", "--pool", "cpu"),
            *("--type", "process", "--limit", "1"),
        ],
        cwd=tmp_path,
        env=prefect_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def test_worker_runs_what_was_deployed(
    prefect_server: str,
    prefect_environment: dict[str, str],
    worker: None,
    checkout: Path,
    tmp_path: Path,
) -> None:
    for name in sorted({d["work_pool"]["name"] for d in FILE["deployments"]}):
        make_pool(prefect_server, name)
    done = subprocess.run(
        [Path(sys.executable).with_name("prefect"), "--no-prompt", "deploy", "--all"],
        cwd=checkout,
        env=prefect_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = ask(prefect_server, "deployments/filter", limit=50)
    stored = {d["entrypoint"]: d for d in found if d["entrypoint"]}
    assert set(stored) == {d["entrypoint"] for d in FILE["deployments"]}
    nightly = stored["flows.retrain.retrain"]
    assert nightly["pull_steps"] == [
        {"prefect.deployments.steps.set_working_directory": {"directory": str(checkout)}}
    ]
    assert all(d["parameter_openapi_schema"]["properties"] for d in stored.values())
    assert not any(item["active"] for d in stored.values() for item in d["schedules"])

    run = ask(
        prefect_server,
        f"deployments/{nightly['id']}/create_flow_run",
        parameters={"pipeline": "deployed"},
    )
    deadline = time.monotonic() + 100
    while run["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
        assert time.monotonic() < deadline, run["state_type"]
        time.sleep(0.5)
        run = ask(prefect_server, f"flow_runs/{run['id']}")
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    database = sqlite3.connect(tmp_path / "home" / "mlflow" / "mlflow.db")
    aliases = database.execute("SELECT name, alias, version FROM registered_model_aliases")
    assert aliases.fetchall() == [("deployed", "champion", 1)]
    database.close()
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
