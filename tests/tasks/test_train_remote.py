"""Train on another work pool: what the run that waits makes of each way in which the other ends.

A thread stands in for the worker: it finds the flow run on the session's server, does what a test
says with the MLflow run, and sets the state that a worker would.
"""

import contextlib
import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from components.adapters import prefect_deployments
from components.adapters.mlflow_tracking import connect
from components.errors import ConfigError, DataError, GateError, InfrastructureError
from components.records import Job, Record, Rejection, TrainedModel
from components.settings import load_settings
from tasks.checkpoints import checkpoint_storage
from tasks.plan import plan
from tasks.resume import find_record, released
from tasks.train import train, train_into
from tasks.train_remote import adopted_job, check_placement

pytestmark = pytest.mark.server
AS_OF = date(2014, 1, 1)
PLACE = "train/remote"


@pytest.fixture
def place(lab: Any, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A deployment of the flow ``train`` on a pool without a worker; the settings name it."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("train")
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name="remote", type="process"))
        client.create_deployment(flow_id, "remote", work_pool_name="remote")
    monkeypatch.setattr(prefect_deployments, "POLL_S", 0.02)
    monkeypatch.setenv("ASSAY_TRAIN_DEPLOYMENT", PLACE)
    return PLACE


@pytest.fixture
def worker(place: str) -> Iterator[Callable[..., list[str]]]:
    """Have the next flow run of the deployment taken; the list gets its id."""
    threads: list[threading.Thread] = []

    def start(work: Callable[[str], tuple[str, str]], runs: int = 1) -> list[str]:
        taken: list[str] = []
        context = contextvars.copy_context()  # Prefect's settings are in it
        threads.append(threading.Thread(target=context.run, args=(take, work, taken, runs)))
        threads[-1].start()
        return taken

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def take(work: Callable[[str], tuple[str, str]], taken: list[str], runs: int) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.client.schemas.objects import StateType
    from prefect.states import State

    scheduled = {
        "deployment_filter": DeploymentFilter(name={"any_": ["remote"]}),
        "flow_run_filter": FlowRunFilter(state={"type": {"any_": [StateType.SCHEDULED]}}),
    }
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while len(taken) < runs:
            if time.monotonic() > deadline:
                os.kill(os.getpid(), signal.SIGINT)  # else the test would wait for ever
                return
            for run in client.read_flow_runs(**scheduled):
                client.set_flow_run_state(run.id, State(type="RUNNING"), force=True)
                taken.append(str(run.id))
                try:
                    kind, message = work(run.parameters["run_id"])
                except BaseException as error:  # noqa: BLE001
                    kind, message = "CRASHED", repr(error)
                if kind:
                    state: Any = State(type=kind, message=message)
                    client.set_flow_run_state(run.id, state, force=True)
            time.sleep(0.1)


def trained_there(run_id: str) -> tuple[str, str]:
    """What the flow ``train`` does."""
    released(train_into.fn(adopted_job(run_id), run_id))
    return "COMPLETED", ""


def rejected_there(run_id: str) -> tuple[str, str]:
    with pytest.raises(GateError) as raised:
        train_into.fn(adopted_job(run_id), run_id)
    return "FAILED", f"Flow run encountered an exception: {raised.value}"


def make_job(*settings: str, pipeline: str = "placed") -> Job:
    return plan(pipeline, AS_OF, 0, settings, False)


def keep(run_id: str, name: str, record: Record, folder: Path) -> None:
    path = folder / f"{name}.json"
    path.write_text(record.model_dump_json())
    connect(load_settings()).put(run_id, path, "records")


def test_record_and_weights_come_back(lab: Any, worker: Callable[..., list[str]]) -> None:
    job = make_job()
    taken = worker(trained_there)
    trained = train.fn(job)
    (run,) = lab.runs("placed")
    assert trained.job == job
    assert trained.run_id == run.info.run_id
    assert trained.weights.uri == f"runs:/{run.info.run_id}/train/weights.safetensors"
    assert find_record(TrainedModel, "train", trained.run_id) == trained
    assert find_record(Job, "job", trained.run_id) == job
    tags = run.data.tags
    assert tags["assay.train_flow_run_id"] == taken[0]
    assert run.info.status == "RUNNING"  # the next stages follow, in this process
    assert tags["assay.pid"] == str(os.getpid())


def test_training_elsewhere_gives_the_weights_of_training_here(
    lab: Any, worker: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(trained_there)
    there = train.fn(make_job())
    monkeypatch.delenv("ASSAY_TRAIN_DEPLOYMENT")
    here = train.fn(make_job())
    assert (there.weights.sha256, there.encoding.sha256) == (
        here.weights.sha256,
        here.encoding.sha256,
    )
    assert there.job.key == here.job.key


def test_a_result_is_taken_from_the_cache(lab: Any, worker: Callable[..., list[str]]) -> None:
    from prefect import flow

    @flow(result_serializer="json")
    def parent() -> tuple[str, str]:
        job = make_job("epochs=3")
        return train(job).run_id, train(job).run_id

    taken = worker(trained_there)
    first, second = parent()
    assert first == second
    assert len(taken) == 1


def test_a_gates_no_arrives_with_every_failure(lab: Any, worker: Callable[..., list[str]]) -> None:
    worker(rejected_there)
    with pytest.raises(GateError, match="must stay finite") as raised:
        train.fn(make_job("learning_rate=1e30"))
    assert raised.value.stage == "train"
    assert raised.value.rejection is not None
    run = lab.runs("placed")[0]
    kept = find_record(Rejection, "rejection", run.info.run_id)
    assert kept == raised.value.rejection
    assert kept.failures == raised.value.failures
    assert (run.info.status, run.data.tags["assay.decision"]) == ("FAILED", "rejected")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("FAILED", "ended as failed: the disk is full. "),
        ("CRASHED", "ended as crashed: the disk is full. "),
        ("CANCELLED", "ended as cancelled: the disk is full. "),
        ("COMPLETED", "completed, and there is none that can be read"),
    ],
)
def test_other_ends_name_run_and_reason(
    lab: Any, worker: Callable[..., list[str]], kind: str, words: str
) -> None:
    taken = worker(lambda run_id: (kind, "the disk is full."))
    with pytest.raises(InfrastructureError) as raised:
        train.fn(make_job())
    assert words in str(raised.value)
    assert f"{taken[0]} of {PLACE}" in str(raised.value)
    run = lab.runs("placed")[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["assay.reason"] == str(raised.value)


def test_a_record_of_another_job_is_refused(
    lab: Any, worker: Callable[..., list[str]], tmp_path: Path
) -> None:
    other = make_job("epochs=1")

    def forge(run_id: str) -> tuple[str, str]:
        trained_there(run_id)
        trained = find_record(TrainedModel, "train", run_id)
        keep(run_id, "train", trained.model_copy(update={"job": other}), tmp_path)
        return "COMPLETED", ""

    worker(forge)
    with pytest.raises(InfrastructureError, match="must train the job that it was given"):
        train.fn(make_job())


def test_interrupting_the_run_cancels_the_training(
    lab: Any, worker: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client

    def interrupt(run_id: str) -> tuple[str, str]:
        os.kill(os.getpid(), signal.SIGINT)
        return "", ""

    monkeypatch.setattr(prefect_deployments, "CANCEL_S", 0.2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
    taken = worker(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.fn(make_job())
    finally:
        signal.signal(signal.SIGINT, before)
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(taken[0]).state
    assert state is not None
    assert state.is_cancelling()
    assert lab.runs("placed")[0].info.status == "KILLED"


@pytest.fixture
def planned(lab: Any, tmp_path: Path) -> Callable[..., str]:
    """An MLflow run with the job that was planned here, some fields changed."""

    def make(**changes: Any) -> str:
        job = make_job()
        tracking = connect(load_settings())
        run_id = tracking.start_run(job.pipeline, "given", {}, {})
        keep(run_id, "job", job.model_copy(update=changes), tmp_path)
        tracking.finish(run_id, "FINISHED")
        return run_id

    return make


def test_a_job_that_looks_the_same_here_is_adopted(planned: Callable[..., str]) -> None:
    assert adopted_job(planned(force_token="mine")) == make_job().model_copy(
        update={"force_token": "mine"}
    )


@pytest.mark.parametrize("name", ["code_digest", "config_digest"])
def test_other_code_or_configuration_is_refused(planned: Callable[..., str], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is ffffffffffff in the job") as raised:
        adopted_job(planned(**{name: "f" * 64}))
    assert "Install the same revision" in str(raised.value)


def test_other_data_is_refused(lab: Any, planned: Callable[..., str]) -> None:
    run_id = planned(data_fingerprint="f" * 64)
    with pytest.raises(DataError, match="this worker sees other data"):
        train_into.fn(adopted_job(run_id), run_id)
    run = lab.client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert "f" * 64 in run.data.tags["assay.reason"]


def test_checkpoints_go_where_they_were_written(lab: Any, planned: Callable[..., str]) -> None:
    run_id = planned(force_token="checkpoints")
    job = adopted_job(run_id)
    train_into.fn(job, run_id)
    assert not checkpoint_storage(load_settings(), job).names()


def test_a_run_without_a_job_is_refused(planned: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in which retrain left a job") as raised:
        adopted_job("0" * 32)
    assert "ASSAY_MLFLOW_TRACKING_URI" in str(raised.value)
    run_id = planned()
    path = tmp_path / "job.json"
    path.write_text('{"pipeline": "placed"}')
    connect(load_settings()).put(run_id, path, "records")
    with pytest.raises(ConfigError, match="of this version of assay"):
        adopted_job(run_id)


def test_flow_trains_into_the_run_and_sends_it_nowhere(
    lab: Any, place: str, planned: Callable[..., str]
) -> None:
    from flows.train import train as flow

    run_id = planned()
    before = len(lab.runs("placed"))
    trained = flow("placed", run_id=run_id)
    assert trained.run_id == run_id
    assert len(lab.runs("placed")) == before
    assert lab.client.get_run(run_id).info.status == "FINISHED"
    assert flow("placed").run_id != run_id
    assert len(lab.runs("placed")) == before + 1


def test_nothing_is_recorded_when_training_cannot_be_sent(
    lab: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(lab.runs("placed"))
    with pytest.raises(ConfigError, match="needs an MLflow server"):
        lab.retrain("placed")
    monkeypatch.setenv("ASSAY_MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    check_placement()
    monkeypatch.setenv("ASSAY_TRAIN_DEPLOYMENT", "train/absent")
    with pytest.raises(ConfigError, match="'train/absent' is not there"):
        lab.retrain("placed")
    monkeypatch.delenv("ASSAY_MLFLOW_TRACKING_URI")
    assert len(lab.runs("placed")) == before


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "needs an MLflow server"),
        ({"ASSAY_MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "needs a Prefect server"),
        ({"ASSAY_TRAIN_DEPLOYMENT": "gpu"}, "deployment of the flow train"),
    ],
)
def test_command_without_servers_is_refused(
    assay: Callable[..., Any], tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    home = tmp_path / "home"
    given = {"ASSAY_HOME": home, "ASSAY_TRAIN_DEPLOYMENT": PLACE, **variables}
    outcome = assay("run", "placed", **given)
    assert outcome.code == 2, outcome.err
    assert words in outcome.err
    assert not home.exists()
