"""The tracking store on real SQLite, and servers that do not answer as they should."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from components.adapters.mlflow_tracking import (
    TAG,
    Tracking,
    check_mlflow,
    configure_mlflow,
    connect,
    mlflow_errors,
)
from components.adapters.prefect_server import free_port
from components.errors import ConfigError, InfrastructureError
from components.records import Artifact
from components.settings import Settings, load_settings


@pytest.fixture
def run_id(tracking: Tracking, request: pytest.FixtureRequest) -> str:
    return tracking.start_run("tracking", request.node.name, {}, {})


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def at(uri: str, home: Path, **values: object) -> Settings:
    return load_settings(home=home, mlflow_tracking_uri=uri, **values)


def artifact_file(store: Settings, artifact: Artifact) -> Path:
    """Where the embedded store keeps a file."""
    run_id, name = artifact.uri.removeprefix("runs:/").split("/", 1)
    (path,) = (store.root / "mlflow" / "artifacts").glob(f"*/{run_id}/artifacts/{name}")
    return path


def test_the_embedded_store_lies_below_the_state_folder(
    tracking: Tracking, store: Settings
) -> None:
    assert tracking.uri == f"sqlite:///{store.root}/mlflow/mlflow.db"
    assert (store.root / "mlflow" / "mlflow.db").is_file()


def test_a_store_is_opened_once_per_process(tracking: Tracking, store: Settings) -> None:
    assert connect(store) is tracking
    assert connect(load_settings(home=store.home)) is tracking, "equal settings, one store"


def test_a_run_keeps_its_tags_and_params_and_says_who_owns_it(tracking: Tracking) -> None:
    run_id = tracking.start_run(
        "tracking", "a name", {"assay.window": "w"}, {"epochs": 3, "long": "x" * 10_000}
    )
    run = tracking.client.get_run(run_id)
    assert run.info.run_name == "a name"
    assert run.info.status == "RUNNING"
    assert run.data.params["epochs"] == "3"
    assert run.data.params["long"] == "x" * 6000
    assert run.data.tags["assay.window"] == "w"
    assert run.data.tags[TAG + "pid"] == str(os.getpid())
    assert run.data.tags[TAG + "host"] == socket.gethostname()


def test_an_experiment_is_made_once_and_its_files_lie_in_the_store(
    tracking: Tracking, store: Settings
) -> None:
    first = tracking.experiment("once")
    assert tracking.experiment("once") == first
    location = tracking.client.get_experiment(first).artifact_location
    assert location == (store.root / "mlflow" / "artifacts" / "once").as_uri()


def test_a_deleted_experiment_comes_back(tracking: Tracking) -> None:
    first = tracking.experiment("deleted")
    tracking.client.delete_experiment(first)
    assert tracking.experiment("deleted") == first
    assert tracking.client.get_experiment(first).lifecycle_stage == "active"


def test_metrics_are_logged_by_step_and_in_batches(tracking: Tracking, run_id: str) -> None:
    tracking.log_metrics(run_id, {"loss": 2.0}, step=1)
    tracking.log_metrics(run_id, {"loss": 1.0}, step=2)
    history = tracking.client.get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0)]
    many = {f"m/{number}": float(number) for number in range(1001)}
    tracking.log_metrics(run_id, many)
    known = tracking.client.get_run(run_id).data.metrics
    assert {name: value for name, value in known.items() if name.startswith("m/")} == many


def test_a_metric_may_be_named_after_any_value(tracking: Tracking, run_id: str) -> None:
    tracking.log_metrics(run_id, {"auc/c/AT&T (US), Inc": 1.0, "auc/c/..": 2.0, "auc/c/": 3.0})
    known = tracking.client.get_run(run_id).data.metrics
    assert known["auc/c/AT_T _US__ Inc"] == 1.0 and "auc/c/_" in known


def test_a_metric_comes_back_by_step_and_the_last_of_a_step_counts(
    tracking: Tracking, run_id: str
) -> None:
    """A training that is resumed logs an epoch again."""
    for step, value in ((1, 4.0), (2, 3.0), (2, 2.0)):
        tracking.log_metrics(run_id, {"again": value}, step=step)
        time.sleep(0.002)
    assert tracking.history(run_id, "again") == {1: 4.0, 2: 2.0}
    assert tracking.history(run_id, "never") == {}


def test_tags_have_the_prefix(tracking: Tracking, run_id: str) -> None:
    tracking.tag(run_id, {"decision": "promoted", "reason": 'it\'s "better" — ä'})
    tags = tracking.client.get_run(run_id).data.tags
    assert tags["assay.decision"] == "promoted"
    assert tags["assay.reason"] == 'it\'s "better" — ä'


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_a_status(tracking: Tracking, run_id: str, status: str) -> None:
    tracking.finish(run_id, status)
    info = tracking.client.get_run(run_id).info
    assert info.status == status
    assert info.end_time is not None


def test_an_artifact_comes_back_as_it_was(tracking: Tracking, run_id: str, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    artifact = tracking.put(run_id, path, "train")
    assert artifact.uri == f"runs:/{run_id}/train/weights.bin"
    assert artifact.size == len(content)
    into = tmp_path / "into"
    into.mkdir()
    found = tracking.fetch(artifact, into)
    assert found.read_bytes() == content
    assert into in found.parents


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty"])
def test_changed_bytes_are_refused(
    tracking: Tracking, store: Settings, run_id: str, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)))
    artifact = tracking.put(run_id, path, "train")
    stored = artifact_file(store, artifact)
    good = stored.read_bytes()
    match damage:
        case "flip":
            stored.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        case "truncate":
            stored.write_bytes(good[:-1])
        case "extend":
            stored.write_bytes(good + b"\0")
        case "empty":
            stored.write_bytes(b"")
    with pytest.raises(InfrastructureError, match=r"must keep its bytes.*retrain with --force"):
        tracking.fetch(artifact, tmp_path)


def test_a_lost_artifact_is_refused(
    tracking: Tracking, store: Settings, run_id: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x")
    artifact = tracking.put(run_id, path, "train")
    artifact_file(store, artifact).unlink()
    with pytest.raises(InfrastructureError, match="must store what a run gives it"):
        tracking.fetch(artifact, tmp_path)


def test_an_unknown_run_is_refused(tracking: Tracking, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: tracking.finish("0" * 32, "FINISHED"),
        lambda: tracking.tag("0" * 32, {"a": "b"}),
        lambda: tracking.log_metrics("0" * 32, {"a": 1.0}),
        lambda: tracking.put("0" * 32, tmp_path / "absent", "train"),
    ]
    for call in calls:
        with pytest.raises(InfrastructureError, match="refused: "):
            call()


def test_the_record_of_a_stage_is_read_back(
    tracking: Tracking, run_id: str, tmp_path: Path
) -> None:
    path = tmp_path / "train.json"
    path.write_text('{"ä": 1}', encoding="utf-8")
    tracking.put(run_id, path, "records")
    assert tracking.read_record(run_id, "train") == '{"ä": 1}'
    for known, stage in ((run_id, "export"), ("0" * 32, "train"), ("../..", "train")):
        with pytest.raises(ConfigError, match=f"an MLflow run in which {stage} has passed"):
            tracking.read_record(known, stage)


def test_runs_of_dead_processes_are_killed_and_others_left(tracking: Tracking, gone: int) -> None:
    def start(**owner: object) -> str:
        run_id = tracking.start_run("reconciled", "run", {}, {})
        tracking.tag(run_id, {name: str(value) for name, value in owner.items()})
        return run_id

    dead = [start(pid=gone), start(pid=gone)]
    living = [start(), start(pid=1), start(pid=gone, host="another-machine")]
    finished = start(pid=gone)
    tracking.finish(finished, "FINISHED")
    other = tracking.start_run("another experiment", "run", {}, {})
    tracking.tag(other, {"pid": str(gone)})
    assert sorted(tracking.reconcile("reconciled")) == sorted(dead)

    def status(run_id: str) -> str:
        return str(tracking.client.get_run(run_id).info.status)

    assert [status(run_id) for run_id in dead] == ["KILLED"] * 2
    assert [status(run_id) for run_id in (*living, other)] == ["RUNNING"] * 4
    assert status(finished) == "FINISHED"
    assert tracking.reconcile("reconciled") == []


def test_a_run_that_nobody_claims_is_left_alone(tracking: Tracking) -> None:
    """Someone else's run in our experiment has no process id."""
    experiment = tracking.experiment("shared")
    tags = {TAG + "host": socket.gethostname()}
    run_id = tracking.client.create_run(experiment, tags=tags).info.run_id
    assert tracking.reconcile("shared") == []
    assert tracking.client.get_run(run_id).info.status == "RUNNING"


def test_credentials_reach_the_environment_and_pickle_is_off(tmp_path: Path) -> None:
    settings = load_settings(
        home=tmp_path, mlflow_username="u", mlflow_password="hunter2", mlflow_token="hunter3"
    )
    configure_mlflow(settings)
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "u"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hunter2"
    assert os.environ["MLFLOW_TRACKING_TOKEN"] == "hunter3"
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_empty_credentials_leave_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "from elsewhere")
    configure_mlflow(load_settings(home=tmp_path))
    assert os.environ["MLFLOW_TRACKING_TOKEN"] == "from elsewhere"
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ


@pytest.mark.parametrize("check", [check_mlflow, connect])
def test_an_address_where_nobody_listens_is_refused_quickly(
    tmp_path: Path, check: Callable[[Settings], object]
) -> None:
    settings = at(f"http://127.0.0.1:{free_port()}", tmp_path)
    start = time.monotonic()
    with pytest.raises(InfrastructureError, match="ASSAY_MLFLOW_TRACKING_URI.*Connection refused"):
        check(settings)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("address", ["http://127.0.0.1:notaport", "http://", "http://[::1"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(InfrastructureError, match="mend the address"):
        check_mlflow(at(address, tmp_path))


def test_a_silent_server_is_refused_in_time(
    tmp_path: Path, foreign: Callable[[bytes | None], int]
) -> None:
    start = time.monotonic()
    with pytest.raises(InfrastructureError, match="timed out"):
        check_mlflow(at(f"http://127.0.0.1:{foreign(None)}", tmp_path, mlflow_timeout_s=0.2))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"\x15\x03\x01\x00\x02\x02"])
def test_a_server_of_another_protocol_is_refused(
    tmp_path: Path, foreign: Callable[[bytes | None], int], greeting: bytes
) -> None:
    with pytest.raises(InfrastructureError, match="ASSAY_MLFLOW_TRACKING_URI"):
        check_mlflow(at(f"http://127.0.0.1:{foreign(greeting)}", tmp_path))


@pytest.mark.parametrize("status", [200, 401, 403, 404, 405, 499])
def test_a_server_that_answers_is_there(
    tmp_path: Path, answering: Callable[[int], str], status: int
) -> None:
    """A server behind a login, or without this page, is a server: the call itself will tell."""
    address = answering(status)
    assert check_mlflow(at(f"{address}/", tmp_path)) == f"{address}/"


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_broken_server_is_refused(
    tmp_path: Path, answering: Callable[[int], str], status: int
) -> None:
    with pytest.raises(InfrastructureError, match=f"HTTP Error {status}"):
        check_mlflow(at(answering(status), tmp_path))


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_refuses_the_first_call_is_refused(
    tmp_path: Path, answering: Callable[[int], str], status: int, tracking: Tracking
) -> None:
    start = time.monotonic()
    with pytest.raises(InfrastructureError, match=f"refused: .*{status}"):
        connect(at(answering(status), tmp_path / "home"))
    assert time.monotonic() - start < 5
    assert tracking.uri.startswith("sqlite"), "the fixture puts the embedded store back"


def test_a_password_in_an_address_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ASSAY_MLFLOW_PASSWORD") as caught:
        check_mlflow(at(f"http://someone:hunter2@127.0.0.1:{free_port()}", tmp_path))
    assert "hunter2" not in str(caught.value)


def test_a_password_of_a_database_is_not_shown() -> None:
    with (
        pytest.raises(InfrastructureError) as caught,
        mlflow_errors("postgresql://someone:hunter2@host/db"),
    ):
        raise OSError("no route to postgresql://someone:hunter2@host/db")
    assert "hunter2" not in str(caught.value)
    assert "host/db refused: no route to" in str(caught.value)


def test_a_database_that_is_none_is_refused(
    tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "mlflow").mkdir(parents=True)
    (tmp_path / "home" / "mlflow" / "mlflow.db").write_bytes(b"this is no database" * 100)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with pytest.raises(InfrastructureError, match="not a database"):
        connect(load_settings(home=tmp_path / "home"))


def test_a_store_below_a_regular_file_is_refused(tmp_path: Path, tracking: Tracking) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InfrastructureError, match="ASSAY_HOME"):
        connect(load_settings(home=tmp_path / "file" / "home"))
