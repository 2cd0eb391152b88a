"""Runs of deployments on a real server, on which no worker polls the pool."""

import json
import logging
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.adapters import prefect_deployments
from components.adapters.prefect_deployments import (
    Ended,
    RemoteRun,
    check_placement,
    find_pool,
    server_address,
    start_run,
)
from components.adapters.prefect_server import HOST, free_port
from components.errors import ConfigError, InfrastructureError
from components.settings import Settings, load_settings

LOG = logging.getLogger("tests.placement")
URL = "http://127.0.0.1:4200/api"
GIVEN = {"train_deployment": "train/gpu", "mlflow_tracking_uri": "http://127.0.0.1:5000"}


def settings(**values: Any) -> Settings:
    return load_settings(**{"_env_file": None, **values})


def ask(url: str, **body: Any) -> Any:
    request = urllib.request.Request(
        url,
        json.dumps(body).encode() if body else None,
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


@pytest.fixture
def api(prefect_server: str, tmp_path: Path) -> Iterator[str]:
    """The session's server, as the server of this process."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_server}):
        yield prefect_server


@pytest.fixture
def deployment(api: str) -> str:
    """A deployment on a pool that nobody polls."""
    flow = ask(f"{api}/flows/", name="adapter-train")
    if not ask(f"{api}/work_pools/filter", work_pools={"name": {"any_": ["lonely"]}}):
        ask(f"{api}/work_pools/", name="lonely", type="process")
    for name, pool in (("there", "lonely"), ("nowhere", None)):
        ask(f"{api}/deployments/", name=name, flow_id=flow["id"], work_pool_name=pool)
    return "adapter-train/there"


@pytest.fixture
def run(deployment: str, request: pytest.FixtureRequest) -> RemoteRun:
    """A run that was asked for; its key is the test's own."""
    return start_run(deployment, {}, key=request.node.name)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect_deployments, "POLL_S", 0.02)
    monkeypatch.setattr(prefect_deployments, "WARN_EVERY_S", 0.05)


def become(api: str, run: RemoteRun, kind: str, message: str = "", after_s: float = 0.0) -> None:
    """Set the run's state as a worker would."""

    def later() -> None:
        time.sleep(after_s)
        state = {"type": kind, "message": message}
        ask(f"{api}/flow_runs/{run.flow_run_id}/set_state", state=state, force=True)

    if after_s:
        threading.Thread(target=later).start()
    else:
        later()


def state_of(api: str, run: RemoteRun) -> dict[str, Any]:
    return dict(ask(f"{api}/flow_runs/{run.flow_run_id}")["state"])


def test_training_here_needs_no_server() -> None:
    check_placement(settings(), None)


def test_servers_and_a_deployment_of_train_are_enough() -> None:
    check_placement(settings(**GIVEN), URL)


@pytest.mark.parametrize("name", ["gpu", "train", "train/", "/gpu", "retrain/nightly", "train/a/b"])
def test_name_must_be_that_of_a_deployment_of_train(name: str) -> None:
    with pytest.raises(ConfigError, match="deployment of the flow train") as raised:
        check_placement(settings(**{**GIVEN, "train_deployment": name}), URL)
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize("uri", ["", "sqlite:///mlflow.db", "postgresql://user:hunter2@host/db"])
def test_an_mlflow_store_that_no_worker_reaches(uri: str) -> None:
    with pytest.raises(ConfigError, match="needs an MLflow server") as raised:
        check_placement(settings(**{**GIVEN, "mlflow_tracking_uri": uri}), URL)
    assert "ASSAY_MLFLOW_TRACKING_URI" in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("url", ["", None])
def test_an_embedded_prefect_server_has_no_workers(url: str | None) -> None:
    with pytest.raises(ConfigError, match="needs a Prefect server"):
        check_placement(settings(**GIVEN), url)


@pytest.mark.server
def test_deployment_that_does_not_exist_is_the_users_to_create(deployment: str, api: str) -> None:
    assert server_address() == api
    assert find_pool(deployment) == "lonely"
    for name in ("adapter-train/absent", "absent/there"):
        with pytest.raises(ConfigError, match="prefect --no-prompt deploy") as raised:
            find_pool(name)
        assert repr(name) in str(raised.value)
        with pytest.raises(ConfigError):
            start_run(name, {}, key="never")


@pytest.mark.server
def test_deployment_without_a_pool_has_no_worker(deployment: str) -> None:
    with pytest.raises(ConfigError, match="must have a work pool"):
        find_pool("adapter-train/nowhere")


@pytest.mark.server
def test_one_key_makes_one_run(deployment: str, api: str) -> None:
    first, second = (start_run(deployment, {"run_id": "1"}, key="same") for _ in range(2))
    assert first == second
    assert start_run(deployment, {"run_id": "1"}, key="other") != first
    assert ask(f"{api}/flow_runs/{first.flow_run_id}")["parameters"] == {"run_id": "1"}


@pytest.mark.server
def test_waiting_for_a_worker_is_logged_and_no_error(
    run: RemoteRun, api: str, caplog: pytest.LogCaptureFixture
) -> None:
    become(api, run, "COMPLETED", "done", after_s=0.4)
    assert run.wait(LOG) == Ended("COMPLETED", "done")
    warnings = [r.getMessage() for r in caplog.records if r.name == LOG.name]
    assert 1 < len(warnings) < 10
    assert "waits for a worker of pool lonely" in warnings[0]
    assert run.flow_run_id in warnings[0]
    assert "prefect worker start --pool lonely" in warnings[0]


@pytest.mark.server
def test_a_run_at_work_is_waited_for_in_silence(
    run: RemoteRun, api: str, caplog: pytest.LogCaptureFixture
) -> None:
    become(api, run, "RUNNING")
    become(api, run, "FAILED", "it broke", after_s=0.3)
    ended = run.wait(LOG)
    assert (ended.kind, ended.message, ended.completed) == ("FAILED", "it broke", False)
    assert [r for r in caplog.records if r.name == LOG.name] == []


@pytest.mark.server
def test_a_run_that_was_deleted_is_not_waited_for(run: RemoteRun, api: str) -> None:
    url = f"{api}/flow_runs/{run.flow_run_id}"
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=10).close()
    with pytest.raises(InfrastructureError, match="must not be deleted") as raised:
        run.wait(LOG)
    assert run.flow_run_id in str(raised.value)


@pytest.mark.server
def test_a_silent_server_is_given_minutes(
    run: RemoteRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr(prefect_deployments, "SILENCE_S", 0.3)
    with temporary_settings({PREFECT_API_URL: f"http://{HOST}:{free_port()}/api"}):
        began = time.monotonic()
        with pytest.raises(InfrastructureError, match="Prefect must answer"):
            run.wait(LOG)
        assert time.monotonic() - began > 0.3
        with pytest.raises(InfrastructureError, match="Prefect must answer"):
            find_pool(run.deployment)
        run.cancel(LOG)
    assert "could not be cancelled" in caplog.text


@pytest.mark.server
def test_cancelling_a_run_that_nobody_took(run: RemoteRun, api: str) -> None:
    run.cancel(LOG)
    assert state_of(api, run)["type"] == "CANCELLED"
    assert run.wait(LOG).kind == "CANCELLED"


@pytest.mark.server
def test_cancelling_waits_for_the_worker_but_not_for_ever(
    run: RemoteRun, api: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(api, run, "RUNNING")
    with monkeypatch.context() as patch:
        patch.setattr(prefect_deployments, "CANCEL_S", 0.1)
        run.cancel(LOG)
    assert state_of(api, run)["type"] == "CANCELLING"
    assert "not yet" in caplog.text
    become(api, run, "CANCELLED", after_s=0.2)
    run.cancel(LOG)
    assert state_of(api, run)["type"] == "CANCELLED"


@pytest.mark.server
def test_a_run_that_has_ended_is_not_cancelled(run: RemoteRun, api: str) -> None:
    become(api, run, "FAILED", "it broke")
    run.cancel(LOG)
    assert state_of(api, run)["type"] == "FAILED"
