"""What every test stands on: a clean environment, one Prefect server, and a small team's pipelines.

Nothing here touches the state folder of the checkout: every home is a temporary folder.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from components.adapters.prefect_server import EmbeddedServer, run_environment
from components.settings import load_settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from xdist.scheduler import LoadScopeScheduling

    from components.records import Decision

CHECKOUT = Path(__file__).resolve().parents[1]
PREFIXES = ("ASSAY_", "PREFECT_", "MLFLOW_", "TEAM_")
# Files that use what is costly to make: one worker takes them together.
TOGETHER = {
    "tests/components/data/test_statistics.py": "tests/components/data/test_flights.py",
    "tests/reliability/test_ray_training.py": "tests/components/adapters/test_ray_train.py",
    "tests/tasks/test_smoke_test.py": "tests/tasks/test_register.py",
    "tests/test_pickle.py": "tests/flows/test_digits.py",
}
_FOLDERS = contextlib.ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Keep libraries that read the environment when they are imported away from the user's home."""
    import tempfile

    root = _FOLDERS.enter_context(tempfile.TemporaryDirectory(prefix="assay-tests-"))
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        del os.environ[name]
    os.environ.update(run_environment(Path(root)), OMP_NUM_THREADS="1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's "&", which children inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    _FOLDERS.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadScopeScheduling":
    """Give parallel workers whole files, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return TOGETHER.get(file, file)

    config.option.loadscopereorder = False
    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have parallel workers begin with files that take minutes, so that they end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.nodeid.startswith("tests/components/"))


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    """Give each test the environment that the session began with."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object on the last line of stdout."""
        value = json.loads(self.out.splitlines()[-1])
        assert isinstance(value, dict)
        return value


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the repository."""
    return CHECKOUT


@pytest.fixture(scope="session")
def child_environment(team: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a child process: ours without settings, the team's package on the path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES)}
    path = [str(team), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "HOME": str(tmp_path_factory.mktemp("user")),
        "PYTHONPATH": os.pathsep.join(path),
    }


@pytest.fixture
def assay(child_environment: Mapping[str, str], tmp_path: Path) -> Callable[..., Outcome]:
    """Run the installed command; keyword arguments are variables of its environment."""
    return make_assay(child_environment, tmp_path)


def make_assay(environment: Mapping[str, str], folder: Path) -> Callable[..., Outcome]:
    def run(*arguments: str, timeout: float = 240, **variables: object) -> Outcome:
        done = subprocess.run(
            [Path(sys.executable).with_name("assay"), *arguments],
            cwd=folder,
            env={**environment, **{k: str(v) for k, v in variables.items()}},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of an installed distribution with pipelines of its own."""
    folder = tmp_path_factory.mktemp("team")
    source = CHECKOUT / "tests" / "support" / "team_pipelines.py"
    shutil.copy(source, folder)
    (folder / "team_raising.py").write_text('raise RuntimeError("the module is broken")\n')
    names = re.findall(r"^([a-z_]+) = ", source.read_text(), flags=re.MULTILINE)
    entries = {name: f"team_pipelines:{name}" for name in names}
    write_distribution(folder, "team", {**entries, "raising": "team_raising:pipeline"})
    return folder


def write_distribution(folder: Path, name: str, entries: Mapping[str, str]) -> None:
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (information / "entry_points.txt").write_text("\n".join(["[assay.pipelines]", *lines, ""]))


@pytest.fixture
def distribution() -> Callable[[Path, str, Mapping[str, str]], None]:
    """Write the metadata of a distribution that registers pipelines."""
    return write_distribution


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server that serves the whole session."""
    server = EmbeddedServer(tmp_path_factory.mktemp("prefect"))
    server.start()
    try:
        yield server.wait()
    finally:
        server.stop()


@dataclass(frozen=True)
class Finished:
    """A home in which digits was trained by the real command, and how that ended."""

    home: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def finished(
    child_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """One run of digits with an embedded server; tests may read this home, not change it."""
    folder = tmp_path_factory.mktemp("finished")
    home = folder / "home"
    outcome = make_assay(child_environment, folder)("run", "digits", "--json", ASSAY_HOME=home)
    return Finished(home, outcome)


@dataclass(frozen=True)
class Lab:
    """A home of the session in which this process runs flows and stages itself."""

    home: Path

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client of this home."""
        from components.adapters.mlflow_tracking import connect

        return connect(load_settings()).client

    def retrain(self, pipeline: str, *settings: str, **parameters: Any) -> "Decision":
        """Run the flow; a pipeline has its own experiment and its own registered model."""
        from flows.retrain import retrain

        return retrain(pipeline, settings=list(settings), **parameters)

    def aliases(self, model: str) -> dict[str, int]:
        """Version numbers by alias."""
        found = self.client.search_registered_models(f"name = '{model}'")
        return {alias: int(v) for item in found for alias, v in item.aliases.items()}

    def versions(self, model: str) -> dict[int, dict[str, str]]:
        """The tags of every version, without their prefix."""
        return {
            int(v.version): {k.removeprefix("assay."): value for k, value in v.tags.items()}
            for v in self.client.search_model_versions(f"name = '{model}'")
        }

    def runs(self, pipeline: str) -> list[Any]:
        """The MLflow runs of a pipeline's candidates, the latest first."""
        experiment = self.client.get_experiment_by_name(pipeline)
        found = self.client.search_runs([experiment.experiment_id]) if experiment else []
        return [run for run in found if "assay.kind" not in run.data.tags]


@pytest.fixture(scope="session")
def lab_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab") / "home"


@pytest.fixture
def bench(lab_home: Path, team: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The session's home for stages that are called without Prefect."""
    return enter_home(lab_home, team, monkeypatch)


@pytest.fixture
def lab(
    lab_home: Path, team: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lab]:
    """The session's home, with flows of this process recorded by the session's server."""
    laboratory = enter_home(lab_home, team, monkeypatch)
    with prefect_session(lab_home, prefect_server):
        yield laboratory


@pytest.fixture
def command(
    lab: Lab,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Outcome]:
    """Run a command in this process; keyword arguments are variables of the environment."""
    from flows.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)

    def run(*arguments: object, **variables: object) -> Outcome:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        capsys.readouterr()
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
        before = {number: signal.getsignal(number) for number in numbers}
        try:
            with pytest.raises(SystemExit) as ended:
                main([str(argument) for argument in arguments])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, *capsys.readouterr())

    return run


def enter_home(home: Path, team: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    from components.adapters.mlflow_tracking import connect

    connect.cache_clear()
    monkeypatch.setenv("ASSAY_HOME", str(home))
    monkeypatch.syspath_prepend(str(team))
    return Lab(home)


@contextlib.contextmanager
def prefect_session(home: Path, url: str) -> Iterator[None]:
    """Prefect's settings as a run of the command would have them."""
    from prefect.logging.handlers import PrefectConsoleHandler
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        PREFECT_LOCAL_STORAGE_PATH,
        PREFECT_LOGGING_TO_API_ENABLED,
        PREFECT_RESULTS_DEFAULT_SERIALIZER,
        temporary_settings,
    )

    from components.adapters.prefect_runtime import flush_prefect

    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):  # it keeps the stream of another test
            handler.console.file, handler.console.stderr = None, True
    folder = home / "prefect"
    with temporary_settings(
        {
            PREFECT_API_URL: url,
            PREFECT_HOME: folder,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # a flow that ends waits a second for it
            PREFECT_LOGGING_TO_API_ENABLED: False,
            PREFECT_LOCAL_STORAGE_PATH: folder / "storage",
            PREFECT_RESULTS_DEFAULT_SERIALIZER: "json",
        }
    ):
        yield
        flush_prefect()
