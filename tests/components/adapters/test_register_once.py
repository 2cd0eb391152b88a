"""One version per candidate at a real MLflow server, from machines that share no lock."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.column_model import METADATA, ROWS, column_model

from components.adapters.mlflow_registry import Registry
from components.adapters.mlflow_tracking import Tracking, connect
from components.digest import digest_file
from components.settings import load_settings

PROCESSES = 2


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, child_environment: Mapping[str, str]
) -> Iterator[str]:
    """The address of an MLflow server on loopback."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"),
        *("--artifacts-destination", str(folder / "artifacts")),
        *("--allowed-hosts", f"127.0.0.1:{port}"),
    ]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            command,
            cwd=folder,
            env={**child_environment, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                    break
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)


class Candidate:
    """A run and an ONNX file, and processes that register them."""

    def __init__(self, url: str, folder: Path, environment: Mapping[str, str], factor: float):
        self.folder = folder
        self.environment = environment
        self.url = url
        settings = load_settings(home=folder / "home", mlflow_tracking_uri=url, _env_file=None)
        self.tracking: Tracking = connect(settings)
        self.registry = Registry(self.tracking, "once")
        self.run_id = self.tracking.start_run("once", "run", {}, {})
        self.onnx_file = folder / "model.onnx"
        self.onnx_file.write_bytes(column_model(factor).SerializeToString(deterministic=True))
        self.digest = digest_file(self.onnx_file)
        self.homes = 0

    def start(self, mode: str, *more: object) -> "subprocess.Popen[str]":
        """Start a process with a state folder of its own."""
        self.homes += 1
        script = Path(__file__).parents[2] / "support" / "register_once.py"
        tests, checkout = script.parents[1], script.parents[2]
        path = os.pathsep.join([str(checkout), str(tests), self.environment["PYTHONPATH"]])
        arguments = [self.url, self.folder / f"home-{self.homes}", self.run_id, self.onnx_file]
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, (*arguments, mode, *more))],
            env={**self.environment, "PYTHONPATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process: "subprocess.Popen[str]") -> dict[str, Any] | int:
        """What a process said, or how it died."""
        out, err = process.communicate(timeout=120)
        if process.returncode == 9:
            return 9
        assert process.returncode == 0, err
        answer = json.loads(out.splitlines()[-1])
        assert isinstance(answer, dict)
        return answer

    def versions(self) -> list[int]:
        """Numbers of all versions with these bytes."""
        found = self.tracking.client.search_model_versions(
            f"name = 'once' and tags.`assay.onnx_sha256` = '{self.digest}'"
        )
        return sorted(int(version.version) for version in found)

    def register(self) -> int:
        """Register in this process, and give the version's number."""
        found = self.registry.find({"onnx_sha256": self.digest})
        made = found or self.registry.create(
            self.run_id,
            self.onnx_file,
            metadata=METADATA,
            example=ROWS,
            requirements=["onnxruntime==1.0"],
            tags={"onnx_sha256": self.digest},
        )
        return self.registry.settle(made).number

    def copy_of(self, number: int) -> int:
        """Another version of the same files."""
        held = self.registry.by_number(number)
        assert held is not None
        made = self.tracking.client.create_model_version(
            "once",
            held.source,
            held.run_id,
            tags={f"assay.{name}": value for name, value in held.tags.items()},
            model_id=held.source.removeprefix("models:/"),
        )
        return int(made.version)


@pytest.fixture
def candidate(
    server: str,
    tmp_path: Path,
    child_environment: Mapping[str, str],
    request: pytest.FixtureRequest,
) -> Iterator[Candidate]:
    import mlflow

    before = mlflow.get_tracking_uri()
    factor = float(sum(map(ord, request.node.name)))
    yield Candidate(server, tmp_path, child_environment, factor)
    mlflow.set_tracking_uri(before)


def test_machines_that_register_at_once_agree_on_one_version(candidate: Candidate) -> None:
    barrier = candidate.folder / "barrier"
    barrier.mkdir()
    processes = [candidate.start("race", barrier, PROCESSES) for _ in range(PROCESSES)]
    answers = [candidate.end(process) for process in processes]
    made = {answer["made"] for answer in answers if isinstance(answer, dict)}
    assert len(made) == PROCESSES, "each of them had found none, and made one"
    assert {answer["kept"] for answer in answers if isinstance(answer, dict)} == {min(made)}
    assert candidate.versions() == [min(made)]


@pytest.mark.parametrize("mode", ["crash", "crash-after"])
def test_a_crash_between_files_and_version_leaves_one_version(
    candidate: Candidate, mode: str
) -> None:
    assert candidate.end(candidate.start(mode)) == 9
    assert len(candidate.versions()) == (mode == "crash-after")
    number = candidate.register()
    assert candidate.versions() == [number]


def test_a_request_that_is_sent_twice_leaves_one_version(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a client sends it that gets no answer to the first."""
    client = candidate.tracking.client
    make = client.create_model_version
    made: list[int] = []

    def twice(*args: Any, **kwargs: Any) -> Any:
        for _ in range(2):
            answer = make(*args, **kwargs)
            made.append(int(answer.version))
        return answer

    monkeypatch.setattr(client, "create_model_version", twice)
    assert candidate.register() == made[0]
    assert len(made) == 2
    assert candidate.versions() == made[:1]
    assert candidate.registry.download(made[0], candidate.folder).is_file()
    kept = candidate.registry.by_number(made[0])
    assert kept is not None
    model = client.get_logged_model(kept.source.removeprefix("models:/"))
    assert model.status == "READY", "both versions had the same files"


def test_what_a_dead_process_left_is_swept_away(candidate: Candidate) -> None:
    first = candidate.register()
    made = [candidate.copy_of(first) for _ in range(3)]
    candidate.registry.set_alias("champion", made[0])
    candidate.registry.tag(made[1], {"decision": "kept_champion"})
    assert candidate.register() == first
    assert candidate.versions() == [first, made[0], made[1]], "never one that serves or was judged"


def test_a_damaged_version_is_registered_anew(candidate: Candidate) -> None:
    first = candidate.register()
    candidate.registry.tag(first, {"damaged": "true"})
    second = candidate.register()
    assert second > first
    assert candidate.versions() == [first, second]
    assert candidate.register() == second


def test_a_version_that_another_process_deletes_is_no_error(candidate: Candidate) -> None:
    first = candidate.register()
    gone = candidate.registry.by_number(candidate.copy_of(first))
    assert gone is not None
    candidate.tracking.client.delete_model_version("once", str(gone.number))
    candidate.registry._delete(gone, files=False)
    assert candidate.registry.settle(gone).number == first


def test_an_upload_that_fails_is_marked(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(candidate.tracking.client, "log_model_artifacts", refuse)
    with pytest.raises(Exception, match="no space"):
        candidate.register()
    run = candidate.tracking.client.get_run(candidate.run_id)
    models = candidate.tracking.client.search_logged_models([run.info.experiment_id])
    assert [m.status for m in models if m.source_run_id == candidate.run_id] == ["FAILED"]
    assert candidate.versions() == []
