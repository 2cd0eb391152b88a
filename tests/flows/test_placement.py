"""Training on another work pool, with real processes: two servers, two workers, nothing shared.

The homes of the workers ``cpu`` and ``gpu`` are different folders, so whatever one of them uses of
the other's must have come through MLflow or Prefect.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pytest

from components.adapters.prefect_server import HOST, free_port
from components.records import Job, Rejection, TrainedModel

pytestmark = pytest.mark.server

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
LATER_STAGES = {"validate", "export", "register", "smoke_test", "decide"}
PREFECT = Path(sys.executable).with_name("prefect")
MLFLOW = Path(sys.executable).with_name("mlflow")


def ask(url: str, path: str, **body: Any) -> Any:
    """Send a request to Prefect's API, again if the server is too busy to answer it."""
    for _ in range(20):
        try:
            return ask_once(url, path, **body)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
        time.sleep(1)
    return ask_once(url, path, **body)


def ask_once(url: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/{path}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def process(command: list[str | Path], log: Path, **options: Any) -> Iterator[None]:
    """A process in a group of its own, of which nothing outlives the block."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


@final
@dataclass(frozen=True)
class Site:
    """Two workers with homes of their own, and the servers between them."""

    prefect: str
    mlflow: str
    homes: Mapping[str, Path]
    folder: Path

    def start(self, *settings: str) -> dict[str, Any]:
        """Start the real deployment of ``retrain`` on the small pipeline."""
        nightly = ask(self.prefect, "deployments/name/retrain/nightly")
        return dict(
            ask(
                self.prefect,
                f"deployments/{nightly['id']}/create_flow_run",
                parameters={"pipeline": "tiny", "settings": list(settings), "force": True},
            )
        )

    def read(self, run: Mapping[str, Any]) -> dict[str, Any]:
        return dict(ask(self.prefect, f"flow_runs/{run['id']}"))

    def ended(self, run: Mapping[str, Any], seconds: float = 240) -> dict[str, Any]:
        """The flow run, once it has ended."""

        def final() -> dict[str, Any] | None:
            now = self.read(run)
            return now if now["state_type"] in FINAL else None

        return dict(wait_for(final, f"it never ended; logs are in {self.folder}", seconds))

    def tasks(self, *runs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Task runs of flow runs by name."""
        found = ask(
            self.prefect,
            "task_runs/filter",
            task_runs={"flow_run_id": {"any_": [run["id"] for run in runs]}},
        )
        return {run["name"].rsplit("-", 1)[0]: run for run in found}

    def children(self, parent: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Flow runs that are linked to a task run of the parent."""
        runs = ask(
            self.prefect,
            "flow_runs/filter",
            flow_runs={"parent_flow_run_id": {"any_": [parent["id"]]}},
        )
        return list(runs)

    def child(self, parent: Mapping[str, Any]) -> dict[str, Any]:
        (found,) = wait_for(lambda: self.children(parent), "no flow run was started for training")
        return dict(found)

    def log(self, run: Mapping[str, Any]) -> str:
        found = ask(self.prefect, "logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}})
        return "\n".join(line["message"] for line in found)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.mlflow)

    def mlflow_run(self, child: Mapping[str, Any]) -> Any:
        return self.client.get_run(child["parameters"]["run_id"])

    def record(self, run: Any, name: str) -> str:
        path = self.client.download_artifacts(run.info.run_id, f"records/{name}.json")
        return Path(path).read_text()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except (OSError, urllib.error.URLError):
        return False
    return True


@contextlib.contextmanager
def mlflow_server(folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    port = free_port()
    command = [MLFLOW, "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    artifacts = ["--artifacts-destination", str(folder / "artifacts")]
    allowed = ["--allowed-hosts", f"{HOST}:{port}"]
    with process(
        [*command, *stores, *artifacts, *allowed],
        folder / "mlflow.log",
        cwd=folder,
        env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true"},
    ):
        yield f"http://{HOST}:{port}"


@pytest.fixture(scope="module")
def site(
    child_environment: Mapping[str, str],
    prefect_server: str,
    checkout: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """Both servers and both workers, with what the real prefect.yaml deploys."""
    folder = tmp_path_factory.mktemp("site")
    homes = {name: folder / name for name in ("cpu", "gpu")}
    shared = {
        **child_environment,
        "ASSAY_CHECKOUT": str(checkout),
        "DO_NOT_TRACK": "true",
        "OMP_NUM_THREADS": "1",
        "PREFECT_API_URL": prefect_server,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "ASSAY_TRAIN_DEPLOYMENT": "train/gpu",  # on both: a flow `train` never sends it on
    }
    with contextlib.ExitStack() as stack:
        mlflow = stack.enter_context(mlflow_server(folder, child_environment))
        for name, home in homes.items():
            own = {"ASSAY_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
            home.mkdir()
            worker = [PREFECT, "worker", "start", "--type", "process", "--pool", name]
            stack.enter_context(
                process(
                    [*worker, "--name", name],
                    folder / f"{name}.log",
                    cwd=home,
                    env={**shared, **own, "ASSAY_MLFLOW_TRACKING_URI": mlflow},
                )
            )
        for name in homes:  # a worker makes its pool
            wait_for(lambda name=name: pool_is_there(prefect_server, name), f"no pool {name}")
        deploy(checkout, {**shared, "PREFECT_HOME": str(folder / "deploy")})
        wait_for(lambda: answers(f"{mlflow}/health"), "MLflow does not answer")
        yield Site(prefect_server, mlflow, homes, folder)


def pool_is_there(url: str, name: str) -> bool:
    try:
        return bool(ask(url, f"work_pools/{name}"))
    except urllib.error.HTTPError:
        return False


def deploy(checkout: Path, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        [PREFECT, "--no-prompt", "deploy", "--all"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_training_runs_on_the_other_pool(site: Site) -> None:
    parent = site.ended(site.start())
    assert parent["state_type"] == "COMPLETED", parent["state"]["message"]
    child = site.child(parent)
    assert (parent["work_pool_name"], child["work_pool_name"]) == ("cpu", "gpu")
    assert child["state_type"] == "COMPLETED"
    assert set(site.tasks(child)) == {"train"}
    assert set(site.tasks(parent)) >= {"train", *LATER_STAGES}
    wait_for(lambda: "Epoch 1 of" in site.log(child), "the worker's log has no epoch")
    wait_for(lambda: "promoted" in site.log(parent), "the parent's log has no verdict")
    assert "Epoch" not in site.log(parent)

    run = site.mlflow_run(child)
    trained = TrainedModel.model_validate_json(site.record(run, "train"))
    assert trained.job == Job.model_validate_json(site.record(run, "job"))
    assert trained.run_id == run.info.run_id
    assert trained.stage.flow_run_id == parent["id"]  # so that its summary counts it as its own
    assert run.data.tags["assay.train_flow_run_id"] == child["id"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["assay.decision"] == "promoted"
    (model,) = site.client.search_registered_models()
    assert (model.name, model.aliases) == ("tiny", {"champion": "1"})

    locks = {
        name: {path.name for path in (home / "locks").iterdir()}
        for name, home in site.homes.items()
    }
    assert {"register-tiny.lock", "promote-tiny.lock"} <= locks["cpu"]
    assert not {"register-tiny.lock", "promote-tiny.lock"} & locks["gpu"]
    for home in site.homes.values():
        assert not (home / "mlflow").exists()
        assert list((home / "work").iterdir()) == []


def test_a_gates_no_there_is_a_gates_no_here(site: Site) -> None:
    parent = site.ended(site.start("learning_rate=1e30"))
    child = site.child(parent)
    assert (parent["state_type"], child["state_type"]) == ("FAILED", "FAILED")
    assert "GateError: train rejected the candidate: " in parent["state"]["message"]
    assert "must stay finite" in parent["state"]["message"]
    assert not LATER_STAGES & set(site.tasks(parent))
    run = site.mlflow_run(child)
    rejection = Rejection.model_validate_json(site.record(run, "rejection"))
    assert rejection.stage_name == "train"
    assert rejection.failures[0] in parent["state"]["message"]
    assert rejection.stage.flow_run_id == parent["id"]
    assert (run.info.status, run.data.tags["assay.decision"]) == ("FAILED", "rejected")


def test_cancelling_the_run_cancels_the_training(site: Site) -> None:
    parent = site.start("epochs=1000000", "patience=1000000")
    child = site.child(parent)
    wait_for(lambda: site.mlflow_run(child).data.metrics, "the worker never trained")
    cancelling = {"type": "CANCELLING", "name": "Cancelling"}
    ask(site.prefect, f"flow_runs/{parent['id']}/set_state", state=cancelling)
    assert site.ended(parent)["state_type"] == "CANCELLED"
    assert site.ended(child)["state_type"] == "CANCELLED"
    assert site.mlflow_run(child).info.status == "KILLED"
    for home in site.homes.values():
        assert list((home / "work").iterdir()) == []
