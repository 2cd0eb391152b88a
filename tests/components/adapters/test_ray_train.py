"""Workers on Ray: they meet, are replaced when lost, and end in order."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.adapters.prefect_server import free_port
from components.adapters.ray_train import decode_error, encode_error, run_workers
from components.errors import (
    AssayError,
    ConfigError,
    ContractError,
    DataError,
    GateError,
    InfrastructureError,
)

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is absent: assay[ray]")
MARK = "TEAM_RAY_TEST"


class Bench:
    """Runs workers from a folder, and knows every process that came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = f"{MARK}={os.getpid()}-{folder.name}"
        self.work = folder / "work"
        self.ray = folder / "state" / "ray"
        self.work.mkdir()

    def payload(self, **values: Any) -> str:
        return json.dumps({"folder": str(self.work), **values})

    def run(self, entry: str, values: dict[str, Any], **options: Any) -> int:
        entry = f"support.ray_work:{entry}"
        options = {"workers": 2, "folder": self.ray, "max_failures": 1, **options}
        return run_workers(entry, self.payload(**values), **options)

    def pid(self, rank: int) -> int:
        (path,) = self.work.glob(f"pid-{rank}-*")
        return int(path.name.rpartition("-")[2])

    def running(self) -> list[int]:
        """Processes that inherited the mark and live."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
            except OSError:  # it ended, or is another user's
                continue
        return [pid for pid in found if pid != os.getpid()]

    def all_gone(self) -> bool:
        deadline = time.monotonic() + 15
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.running()


def strays(folder: Path) -> set[Path]:
    """What Ray, or the adapter for it, may leave in the temporary folder of the machine.

    Links that lead out of the folder belong to other processes, which come and go.
    """
    found = {path for name in ("ray", "assay-ray-*") for path in Path("/tmp").glob(name)}
    return {path for path in found if not leads_elsewhere(path / "r", folder)}


def leads_elsewhere(link: Path, folder: Path) -> bool:
    try:
        return not link.readlink().is_relative_to(folder)
    except OSError:
        return False


@pytest.fixture
def ray_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench whose user's home and temporary folder are empty before and after."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are found in /proc, which this system lacks")
    bench = Bench(tmp_path)
    name, _, value = bench.mark.partition("=")
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    before = strays(tmp_path)
    for variable, folder in {"HOME": home, "TMPDIR": temporary}.items():
        folder.mkdir()
        monkeypatch.setenv(variable, str(folder))
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("TEAM_SEEN", "by workers")
    yield bench
    try:
        assert bench.all_gone(), "a process outlived the job"
        assert [*home.iterdir(), *temporary.iterdir()] == []
        assert strays(tmp_path) == before
        assert {path.name for path in tmp_path.iterdir()} == {"home", "state", "tmp", "work"}
    finally:
        for pid in bench.running():
            os.kill(pid, signal.SIGKILL)


def listening(pids: list[int]) -> set[str]:
    """Addresses on which processes listen."""
    sockets = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(str(path.readlink()))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
                family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
                found.add(socket.inet_ntop(family, b"".join(words)))
    return found


@needs_ray
def test_a_killed_worker_is_replaced_and_the_job_completes(ray_bench: Bench) -> None:
    reports: list[dict[str, Any]] = []
    addresses: set[str] = set()

    def on_report(report: dict[str, Any]) -> None:
        reports.append(report)
        if report["step"] == 5 and not addresses:
            addresses.update(listening(ray_bench.running()))
            os.kill(ray_bench.pid(1), signal.SIGKILL)

    assert ray_bench.run("count", {"steps": 60, "seconds": 0.05}, on_report=on_report) == 2
    steps = [report["step"] for report in reports]
    assert steps[-1] == 59
    assert sorted(set(steps)) == list(range(60))
    first, again = sorted({report["first"] for report in reports})
    assert first == 0
    assert 5 < again < 60, "the second group went on from the checkpoint"
    assert addresses
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@needs_ray
def test_workers_meet_and_a_refusal_keeps_its_type(
    ray_bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    reports: list[dict[str, Any]] = []
    values = {"text": "hä", "error": "gate"}
    with pytest.raises(GateError) as caught:
        ray_bench.run("meet_and_refuse", values, on_report=reports.append, max_failures=3)
    assert str(caught.value) == "train rejected the candidate: ä: no; b"
    assert (caught.value.culprit, caught.value.metrics) == ("layer", {"loss": 1.5})
    assert reports == [
        {"sum": 3.0, "world": 2, "seen": "by workers"},
        {"sent": "hä", "backend": "gloo"},
    ]
    assert capfd.readouterr() == ("", ""), "Ray and its workers speak to the log"


@needs_ray
def test_workers_that_keep_failing_end_the_job(ray_bench: Bench) -> None:
    with pytest.raises(InfrastructureError, match=r"more than 0 times.*KeyError: 'a bug'"):
        ray_bench.run("refuse", {"error": "bug"}, max_failures=0)
    assert list(ray_bench.ray.rglob("*.log")), "logs of a failed job stay"


@pytest.fixture
def caller(ray_bench: Bench, checkout: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process whose workers are at work."""
    script = checkout / "tests" / "support" / "ray_run.py"
    payload = ray_bench.payload(steps=10_000, seconds=0.05)
    process = subprocess.Popen(
        [sys.executable, str(script), "support.ray_work:count", payload, str(ray_bench.ray)],
        env={**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'tests'}"},
    )
    deadline = time.monotonic() + 120
    while not (ray_bench.work / "checkpoint").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    assert len(ray_bench.running()) > 5
    yield process
    process.kill()
    process.wait()


@needs_ray
def test_an_interrupt_ends_every_worker(
    ray_bench: Bench, caller: "subprocess.Popen[bytes]"
) -> None:
    caller.send_signal(signal.SIGTERM)
    assert caller.wait(40) == 130
    assert ray_bench.all_gone()


@needs_ray
def test_nothing_survives_a_caller_that_is_killed(
    ray_bench: Bench, caller: "subprocess.Popen[bytes]"
) -> None:
    before = strays(ray_bench.folder)
    caller.kill()
    caller.wait()
    assert ray_bench.all_gone()
    for path in before - {Path("/tmp/ray")}:  # only the link is left
        (path / "r").unlink()
        path.rmdir()


@needs_ray
@pytest.mark.parametrize("address", ["ray://127.0.0.1:{}", "127.0.0.1:{}"])
def test_a_cluster_that_is_not_there_is_said_so_at_once(tmp_path: Path, address: str) -> None:
    started = time.monotonic()
    with pytest.raises(InfrastructureError, match="a Ray cluster must answer at ASSAY_RAY_ADDRESS"):
        run_workers("a:b", "{}", workers=2, folder=tmp_path, address=address.format(free_port()))
    assert time.monotonic() - started < 10


@needs_ray
def test_a_listener_that_is_no_cluster_is_given_up(
    tmp_path: Path, foreign: Callable[[bytes | None], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.adapters.ray_train._START_S", 4.0)
    address = f"127.0.0.1:{foreign(None)}"
    with pytest.raises(InfrastructureError, match=r"Ray must be ready within 4 s"):
        run_workers("a:b", "{}", workers=2, folder=tmp_path, address=address)


@pytest.mark.parametrize("address", ["cluster", "http://127.0.0.1:80", "ray://", "host:", ":1"])
def test_an_address_must_have_host_and_port(tmp_path: Path, address: str) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is absent: assay[ray]")
    with pytest.raises(ConfigError, match="ASSAY_RAY_ADDRESS must be ray://HOST:PORT"):
        run_workers("a:b", "{}", workers=2, folder=tmp_path, address=address)


def test_without_ray_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Install assay\[ray\], or set workers=1"):
        run_workers("a:b", "{}", workers=2, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("c"),
        DataError("d"),
        ContractError("e"),
        InfrastructureError("f: ä\nsecond line"),
        GateError("train", ["a", "b"], culprit="layer", metrics={"loss": 2.0}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_type_and_message_as_json(error: AssayError) -> None:
    back = decode_error(json.loads(json.dumps(encode_error(error))))
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))


def test_an_error_of_a_pipeline_arrives_as_its_family() -> None:
    class SensorError(DataError):
        pass

    back = decode_error(encode_error(SensorError("a sensor fell silent")))
    assert (type(back), str(back)) == (DataError, "a sensor fell silent")


def test_importing_the_adapter_does_not_import_ray(child_environment: Mapping[str, str]) -> None:
    code = "import sys, components.adapters.ray_driver; sys.exit('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=dict(child_environment), timeout=60)
    assert done.returncode == 0


def test_the_kubernetes_manifest_has_what_a_cluster_needs(checkout: Path) -> None:
    text = (checkout / "deploy" / "kuberay.yaml").read_text()
    documents = {document["kind"]: document for document in yaml.safe_load_all(text)}
    assert set(documents) == {"RayCluster", "PersistentVolumeClaim", "NetworkPolicy"}
    spec = documents["RayCluster"]["spec"]
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    pods = [part["template"]["spec"] for part in (spec["headGroupSpec"], group)]
    (head,), (worker,) = (pod["containers"] for pod in pods)
    assert head["image"] == worker["image"]
    assert {"name": "client", "containerPort": 10001} in head["ports"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "8"
    for pod in pods:
        (container,) = pod["containers"]
        assert {item["name"] for item in container["volumeMounts"]} == {
            item["name"] for item in pod["volumes"]
        }
        variables = {item["name"]: item for item in container["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in variables["RAY_AUTH_TOKEN"]["valueFrom"]
    claim = documents["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    label = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for part in (spec["headGroupSpec"], group):
        assert label.items() <= part["template"]["metadata"]["labels"].items()


@needs_ray
def test_the_manifest_names_the_ray_that_is_tested(checkout: Path) -> None:
    text = (checkout / "deploy" / "kuberay.yaml").read_text()
    assert f'rayVersion: "{version("ray")}"' in text
