"""``assay reproduce``: versions of a team's ledger rebuilt, and what may stand against it.

Nothing is ever written to MLflow, and nothing stays in the state folder.
"""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import ledger
from support.repository import Repository

LEDGER = Path(ledger.__file__)
NAMES = ("kept", "swapped", "broken", "unrecorded")
FIELDS = {
    "model",
    "version",
    "mlflow_run_id",
    "code",
    "agrees",
    "verdict",
    "checks",
    "environment",
    "notes",
    "difference",
    "seconds",
}
DIGESTS = ["data", "snapshot", "config", "code", "encoding", "weights", "onnx", "registered"]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory, distribution_of: Callable[..., None]) -> Path:
    """A folder with the ledger's pipelines, as if installed, and its rows."""
    folder = tmp_path_factory.mktemp("shelf")
    shutil.copy(LEDGER, folder / "ledger.py")
    distribution_of(folder, "shelf", {name: f"ledger:{name}" for name in NAMES})
    ledger.write_rows(folder / "rows.txt")
    return folder


@pytest.fixture(scope="session")
def distribution_of() -> Callable[..., None]:
    """Write the metadata of a distribution that registers pipelines."""

    def write(folder: Path, name: str, entries: Mapping[str, str]) -> None:
        information = folder / f"{name}-1.0.dist-info"
        information.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        (information / "METADATA").write_text(text)
        lines = [f"{key} = {value}" for key, value in entries.items()]
        entry_points = "\n".join(["[assay.pipelines]", *lines, ""])
        (information / "entry_points.txt").write_text(entry_points)

    return write


@pytest.fixture
def books(lab: Any, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The session's home, with the ledger's pipelines and rows."""
    monkeypatch.syspath_prepend(str(shelf))
    monkeypatch.setenv("TEAM_ROWS", str(shelf / "rows.txt"))
    return lab


@pytest.fixture
def kept(books: Any) -> Any:
    """The home with version 1 of ``kept``, which tests read and do not change."""
    if not books.versions("kept"):
        books.retrain("kept")
    return books


@pytest.fixture(autouse=True)
def _nothing_stays(lab_home: Path) -> Iterator[None]:
    yield
    work = lab_home / "work"
    assert not work.exists() or list(work.glob("reproduce-*")) == []


def agreement(outcome: Any) -> dict[str, bool | None]:
    return {check["what"]: check["agrees"] for check in outcome.json["checks"]}


def mlflow_content(home: Path) -> tuple[list[str], dict[str, bytes]]:
    database = sqlite3.connect(f"file:{home}/mlflow/mlflow.db?mode=ro", uri=True)
    try:
        lines = list(database.iterdump())
    finally:
        database.close()
    artifacts = home / "mlflow" / "artifacts"
    files = {str(p): p.read_bytes() for p in artifacts.rglob("*") if p.is_file()}
    return lines, files


@pytest.mark.parametrize("version", ["1", "champion"])
def test_version_is_rebuilt_byte_for_byte_and_nothing_is_written(
    kept: Any, command: Callable[..., Any], version: str
) -> None:
    before = mlflow_content(kept.home)
    outcome = command("reproduce", f"kept@{version}", "--json")
    assert outcome.code == 0, outcome.err
    assert mlflow_content(kept.home) == before
    assert len(outcome.out.splitlines()) == 1
    found = outcome.json
    assert set(found) == FIELDS
    assert (found["model"], found["version"], found["code"]) == ("kept", 1, "here")
    assert found["agrees"] is True
    assert agreement(outcome) == dict.fromkeys(DIGESTS, True)
    assert all(check["agrees"] for check in found["environment"])
    assert found["difference"] is None
    tags = kept.versions("kept")[1]
    rebuilt = {check["what"]: check["rebuilt"] for check in found["checks"]}
    assert rebuilt["onnx"] == tags["onnx_sha256"]
    assert rebuilt["data"] == tags["data_fingerprint"]


def test_table_for_people(kept: Any, command: Callable[..., Any]) -> None:
    outcome = command("reproduce", "kept@1")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["what", "recorded", "rebuilt", "agrees"]
    rows = [line.split() for line in lines[1 : 1 + len(DIGESTS)]]
    assert [row[0] for row in rows] == DIGESTS
    assert all(row[1] == row[2] and len(row[1]) == 12 and row[3] == "yes" for row in rows)
    assert lines[-1] == "kept version 1 is rebuilt byte for byte: every digest agrees."
    assert [line.split()[0] for line in outcome.err.splitlines()] == ["data"] + ["training"] * 2


def test_training_does_not_take_checkpoints_or_cached_results(
    kept: Any, command: Callable[..., Any]
) -> None:
    import ledger as module

    steps = []
    original = module.kept.loss
    object.__setattr__(module.kept, "loss", lambda *a: steps.append(1) or original(*a))
    try:
        command("reproduce", "kept@1")
    finally:
        object.__setattr__(module.kept, "loss", original)
    assert len(steps) >= 2 * (270 // 32)


def test_changed_row_in_the_source(
    kept: Any, command: Callable[..., Any], shelf: Path, tmp_path: Path
) -> None:
    lines = (shelf / "rows.txt").read_text().splitlines()
    changed = tmp_path / "rows.txt"
    changed.write_text("\n".join(["9.0" + lines[0][lines[0].index(" ") :], *lines[1:]]))
    outcome = command("reproduce", "kept@1", "--json", TEAM_ROWS=changed)
    assert outcome.code == 3, outcome.err
    agrees = agreement(outcome)
    assert [what for what in DIGESTS if agrees[what] is not True] == ["data"]
    (data,) = [check for check in outcome.json["checks"] if check["what"] == "data"]
    assert data["recorded"] == kept.versions("kept")[1]["data_fingerprint"] != data["rebuilt"]
    told = " ".join(outcome.json["notes"])
    for word in (data["recorded"], data["rebuilt"], "values differ in a (train)"):
        assert word in told
    assert "data differs; the rebuilt weights and ONNX file are" in outcome.json["verdict"]


def test_weights_of_another_seed_in_the_record(books: Any, command: Callable[..., Any]) -> None:
    books.retrain("swapped")
    runs = [run.info.run_id for run in books.runs("swapped")]
    other = books.retrain("swapped", seed=1).tested.registered.exported.validated.trained
    records = {run: record(books, run) for run in runs}
    (run_id,) = runs
    forged = {**json.loads(records[run_id].read_text())}
    forged["weights"] = other.weights.model_dump()
    records[run_id].write_text(json.dumps(forged))
    outcome = command("reproduce", "swapped@1", "--json")
    assert outcome.code == 3, outcome.err
    differing = [what for what, agrees in agreement(outcome).items() if agrees is False]
    assert differing == ["weights", "record of weights"]
    difference = outcome.json["difference"]
    assert difference["weight"] > 0
    assert difference["outputs"] == {"probabilities": 0.0}
    assert f"{difference['weight']:.1e} in a weight" in outcome.json["verdict"]
    people = command("reproduce", "swapped@1").out
    assert "NO" in people
    assert f"at most in a weight, in {difference['tensor']}" in people


def record(lab: Any, run_id: str, name: str = "records/train.json") -> Path:
    """The file of an artifact below the home."""
    root = lab.client.get_run(run_id).info.artifact_uri.removeprefix("file://")
    path = Path(root) / name
    assert path.is_file()
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kept@99", ["kept@99", "no version '99'", "champion (version 1)"]),
        ("kept@blessed", ["kept@blessed", "'blessed'", "champion (version 1)"]),
        ("tept@1", ["tept@1", "'tept'", "no aliases"]),
        ("kept", ["MODEL@VERSION", "'kept'"]),
        ("@1", ["MODEL@VERSION", "'@1'"]),
        ("kept@", ["MODEL@VERSION", "'kept@'"]),
        ("kept@1@2", ["MODEL@VERSION", "'kept@1@2'"]),
        ("kept@-1", ["kept@-1", "no version"]),
    ],
)
def test_version_that_is_not_there(
    kept: Any, command: Callable[..., Any], name: str, words: list[str]
) -> None:
    before = mlflow_content(kept.home)
    require_refusal(command("reproduce", name), 2, *words)
    assert mlflow_content(kept.home) == before


def require_refusal(outcome: Any, code: int, *words: str) -> None:
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("assay: ")
    for word in words:
        assert word in last


def test_home_without_a_store_stays_without_one(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    home = tmp_path / "home"
    require_refusal(command("reproduce", "kept@1", ASSAY_HOME=home), 2, str(home), "no MLflow")
    assert not home.exists()


def test_server_that_does_not_answer(command: Callable[..., Any]) -> None:
    address = "http://127.0.0.1:9"
    outcome = command("reproduce", "kept@1", ASSAY_MLFLOW_TRACKING_URI=address)
    require_refusal(outcome, 1, "TRACKING_URI", "refused")


def test_registered_file_that_is_damaged_or_gone(books: Any, command: Callable[..., Any]) -> None:
    registered = books.retrain("broken").tested.registered
    (path,) = [
        p
        for p in (books.home / "mlflow" / "artifacts").rglob("model.onnx")
        if "models" in p.parts and p.read_bytes() == onnx_of(books, registered)
    ]
    before = books.versions("broken")
    path.write_bytes(path.read_bytes() + b"\0")
    outcome = command("reproduce", "broken@1", "--json")
    assert outcome.code == 3, outcome.err
    differing = [what for what, agrees in agreement(outcome).items() if agrees is False]
    assert differing == ["registered"]
    path.unlink()
    outcome = command("reproduce", "broken@1", "--json")
    assert outcome.code == 3, outcome.err
    (check,) = [check for check in outcome.json["checks"] if check["what"] == "registered"]
    assert check["rebuilt"] == "missing"
    assert books.versions("broken") == before


def onnx_of(lab: Any, registered: Any) -> bytes:
    run_id = registered.exported.validated.trained.run_id
    return record(lab, run_id, "export/model.onnx").read_bytes()


def test_version_without_a_record(books: Any, command: Callable[..., Any]) -> None:
    trained = books.retrain("unrecorded").tested.registered.exported.validated.trained
    path = record(books, trained.run_id)
    whole = path.read_text()
    path.write_text("{}")
    require_refusal(command("reproduce", "unrecorded@1"), 2, "fields differ", "Check out")
    path.unlink()
    require_refusal(command("reproduce", "unrecorded@1"), 2, trained.run_id, "not there")
    path.write_text(whole)
    forged = json.loads(whole)
    forged.update(device="cuda:0")
    path.write_text(json.dumps(forged))
    outcome = command("reproduce", "unrecorded@1", "--json")
    import torch

    if not torch.cuda.is_available():
        assert outcome.err.startswith("notice")
        assert "trained on cuda and is rebuilt on cpu" in outcome.json["notes"][0]


@pytest.fixture
def repository(
    tmp_path: Path,
    shelf: Path,
    assay: Callable[..., Any],
    prefect_server: str,
) -> Repository:
    folder = tmp_path / "repository"
    shutil.copytree(shelf, folder, ignore=shutil.ignore_patterns("__pycache__", "rows.txt"))
    (folder / ".gitignore").write_text("__pycache__/\n")
    variables: dict[str, object] = {
        "PYTHONPATH": folder,
        "ASSAY_HOME": tmp_path / "home",
        "PREFECT_API_URL": prefect_server,
        "TEAM_ROWS": shelf / "rows.txt",
    }
    made = Repository(folder, assay, variables)
    made.git("init", "--quiet")
    return made


def test_changed_code_is_rebuilt_with_the_recorded_commit(repository: Repository) -> None:
    first = repository.commit("first")
    assert repository.assay("run", "kept").code == 0
    repository.widen(8, 16)
    repository.commit("wider")
    outcome = repository.assay("reproduce", "kept@1", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["code"] == first
    assert first[:12] in outcome.json["notes"][0]
    assert agreement(outcome) == dict.fromkeys(DIGESTS, True)

    outcome = repository.assay("reproduce", "kept@1", "--json", "--here")
    assert outcome.code == 3
    differing = [what for what, agrees in agreement(outcome).items() if agrees is False]
    assert differing == ["code", "weights", "onnx"]
    assert outcome.json["code"] == "here"
    assert "other names or shapes" in " ".join(outcome.json["notes"])
    assert repository.git("status", "--porcelain") == ""

    repository.widen(16, 4)
    assert repository.assay("run", "kept").code == 0  # not committed
    repository.widen(4, 8)
    outcome = repository.assay("reproduce", "kept@2", "--json")
    assert outcome.code == 3
    assert "changes that were not committed" in outcome.json["notes"][0]
    assert "code" in [what for what, agrees in agreement(outcome).items() if agrees is False]
    assert list((Path(str(repository.variables["ASSAY_HOME"])) / "work").iterdir()) == []


def test_recorded_code_that_cannot_rebuild(repository: Repository) -> None:
    (repository.folder / "more.py").write_text("WIDTH = 8\n")
    path = repository.folder / "ledger.py"
    path.write_text(path.read_text().replace("WIDTH = 8\n", "from more import WIDTH\n"))
    (repository.folder / ".gitignore").write_text("__pycache__/\nmore.py\n")
    repository.commit("a module is forgotten")
    version = repository.assay("run", "kept", "--json").json["version"]
    (repository.folder / "more.py").unlink()
    path.write_text(path.read_text().replace("from more import WIDTH\n", "WIDTH = 8\n"))
    outcome = repository.assay("reproduce", f"kept@{version}")
    require_refusal(outcome, 2, "status 2", "--here")
    assert "No module named 'more'" in outcome.err


def test_interruption_leaves_nothing(
    repository: Repository, child_environment: Mapping[str, str], tmp_path: Path
) -> None:
    repository.commit("first")
    assert repository.assay("run", "kept").code == 0
    work = tmp_path / "home" / "work"
    for attempt, number in enumerate((signal.SIGTERM, signal.SIGTERM, signal.SIGINT)):
        if attempt == 1:
            repository.widen(8, 16)  # from here on in a process of its own, with the first code
        mark = tmp_path / f"mark-{attempt}"
        own = {name: str(value) for name, value in repository.variables.items()}
        process = subprocess.Popen(
            [Path(sys.executable).with_name("assay"), "reproduce", "kept@1"],
            cwd=tmp_path,
            env={**child_environment, **own, "TEAM_WAIT": str(mark)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + 60
            while not mark.exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert len(list(work.iterdir())) == (2 if attempt else 1)
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
        assert (process.returncode, out) == (130, ""), err
        assert err.splitlines()[-1] == "assay: interrupted; nothing was changed."
        assert "Traceback" not in err
        assert list(work.iterdir()) == []
