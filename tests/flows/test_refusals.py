"""What cannot be done is said in one paragraph, with the right status, and leaves nothing."""

import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from components.plan import plan_job
from components.settings import load_settings
from components.state import data_folder

AS_OF = date(2014, 1, 1)


def require_paragraph(outcome: Any, code: int, *words: str) -> None:
    """The last line of stderr explains, no other line does, and no traceback is anywhere."""
    lines = outcome.err.strip().splitlines()
    explained = [line for line in lines if line.startswith("assay:")]
    assert explained == lines[-1:], outcome.err
    assert outcome.code == code, outcome.err
    for word in words:
        assert word in explained[0]
    assert "nothing foresaw" not in outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    assert outcome.out == ""


def files_of(home: Path) -> set[Path]:
    """Files that a run keeps; logs, locks and Prefect's own files say that it was tried.

    So do the rows that were read, their profile, and what training that ended left to go on from.
    """
    own = {"prefect", "logs", "locks", "cache", "checkpoints"}
    found = {p for p in home.rglob("*") if p.is_file() and p.relative_to(home).parts[0] not in own}
    tried = ("mlflow.db", "profile.")
    return {p for p in found if not p.name.startswith(tried) and "snapshots" not in p.parts}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tyni"], 2, ["'tyni'", "Did you mean tiny"]),
        (["frobnicator"], 2, ["one of", "tiny", "'frobnicator'"]),
        (["tiny", "--set", "epoch=3"], 2, ["epochs", "'epoch=3'"]),
        (["tiny", "--set", "epochs"], 2, ["KEY=VALUE", "'epochs'"]),
        (["tiny", "--set", "seed=3"], 2, ["--seed"]),
        (["tiny", "--set", "epochs=many"], 2, ["epochs", "integer", "'many'"]),
        (["tiny", "--set", "epochs=0"], 2, ["epochs", "greater than or equal to 1", "'0'"]),
        (["tiny", "--set", "learning_rate=nan"], 2, ["learning_rate", "finite"]),
        (["tiny", "--set", "epochs=1", "--set", "epochs=2"], 2, ["'epochs'", "twice"]),
        (["tiny", "--as-of", "soon"], 2, ["--as-of", "2014-01-01", "'soon'"]),
        (["tiny", "--as-of", "2013-02-30"], 2, ["--as-of", "'2013-02-30'"]),
        (["tiny", "--seed", "-1"], 2, ["seed", "-1"]),
        (["tiny", "--seed", "1.5"], 2, ["--seed", "1.5"]),
        (["tiny", "--seed", str(2**31)], 2, ["seed", str(2**31)]),
        (["tiny", "--wish"], 2, ["--wish"]),
        (["raising"], 2, ["'raising'", "team_raising", "RuntimeError: the module is broken"]),
        (["not_a_pipeline"], 2, ["team_pipelines:not_a_pipeline", "str"]),
        (["tiny", "--set", "require_gpu=true"], 1, ["require_gpu", "GPU"]),
        (["tiny", "--set", "device=cuda"], 1, ["device is cuda", "GPU"]),
        (["no_column"], 2, ["missing: c", "a, b, label"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else str(value),
)
def test_request_is_refused_before_anything_is_recorded(
    lab: Any, command: Callable[..., Any], arguments: list[str], code: int, words: list[str]
) -> None:
    before = files_of(lab.home), lab.client.search_experiments(), registered(lab)
    if code == 1:
        import torch

        if torch.cuda.is_available():
            pytest.skip("a GPU is there")
    require_paragraph(command("run", *arguments), code, *words)
    after = files_of(lab.home), lab.client.search_experiments(), registered(lab)
    assert [e.name for e in before[1]] == [e.name for e in after[1]]
    assert (before[0], before[2]) == (after[0], after[2])


def registered(lab: Any) -> list[tuple[str, str]]:
    return [(v.name, v.version) for v in lab.client.search_model_versions()]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad_label", ["'label'", "0..1", "row 5 has 7"]),
        ("all_nan", ["'c'", "finite"]),
        ("incomplete", ["Incomplete", "missing: predict"]),
    ],
)
def test_rows_or_model_that_cannot_be_used(
    lab: Any, command: Callable[..., Any], name: str, words: list[str]
) -> None:
    before = files_of(lab.home)
    require_paragraph(command("run", name), 2, *words)
    assert lab.versions(name) == {}
    assert lab.aliases(name) == {}
    for run in lab.runs(name):
        assert run.info.status == "FAILED"
        assert words[0] in run.data.tags["assay.reason"]
    assert files_of(lab.home) == before


def test_next_good_run_works(lab: Any, command: Callable[..., Any]) -> None:
    require_paragraph(command("run", "tiny", "--set", "epochs=many"), 2)
    require_paragraph(command("run", "no_column"), 2)
    outcome = command("run", "tiny", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["decision"] in ("promoted", "kept_champion")


def test_truncated_data(lab: Any, command: Callable[..., Any]) -> None:
    from components.pipelines.digits import pipeline

    folder = data_folder(lab.home) / "digits" / "source"
    job = plan_job(pipeline, load_settings())
    stored = folder / "train.parquet"
    stored.write_bytes(stored.read_bytes()[:-1000])
    require_paragraph(command("run", "digits"), 2, str(stored), "Delete the folder", str(folder))
    assert lab.versions("digits") == {}
    assert lab.runs("digits") == []
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()  # as the message says
    assert plan_job(pipeline, load_settings()) == job


def test_date_without_data_and_truncated_month(lab: Any, command: Callable[..., Any]) -> None:
    outcome = command("run", "flights", "--as-of", "2013-01-15")
    require_paragraph(outcome, 2, "2013-01-15", "2013-01 to 2013-12")
    month = data_folder(lab.home) / "flights" / "source" / "2013-03.parquet"
    month.write_bytes(month.read_bytes()[: -(1 << 10)])
    require_paragraph(command("run", "flights"), 2, str(month), "sha256", "Delete the folder")
    assert lab.versions("flights") == {}
    assert lab.runs("flights") == []


@pytest.mark.parametrize("below", [False, True], ids=["a file", "below a file"])
def test_state_folder_that_cannot_be(
    tmp_path: Path, assay: Callable[..., Any], below: bool
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    home = file / "home" if below else file
    require_paragraph(assay("run", "tiny", ASSAY_HOME=home), 1, str(home), "ASSAY_HOME")
    assert file.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, ["PREFECT_API_URL", "refused"]),
        ({"ASSAY_PREFECT_API_URL": "http://127.0.0.1:9/api"}, ["PREFECT_API_URL", "refused"]),
        ({"PREFECT_API_URL": "localhost"}, ["PREFECT_API_URL", "localhost"]),
        ({"ASSAY_MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, ["TRACKING_URI", "refused"]),
        ({"ASSAY_MLFLOW_TRACKING_URI": "http://127.0.0.1:x"}, ["TRACKING_URI", "port"]),
        ({"ASSAY_PREFECT_PORT": "0x"}, ["ASSAY_PREFECT_PORT", "'0x'"]),
        ({"ASSAY_SECRETS_DIR": "nowhere"}, ["ASSAY_SECRETS_DIR", "nowhere"]),
    ],
    ids=lambda value: "=".join(*value.items()) if isinstance(value, dict) else "",
)
def test_service_that_does_not_answer(
    tmp_path: Path, assay: Callable[..., Any], variables: Mapping[str, str], words: list[str]
) -> None:
    began = time.monotonic()
    outcome = assay("run", "tiny", ASSAY_HOME=tmp_path / "home", **variables)
    usage = "ASSAY_PREFECT_PORT" in variables or "ASSAY_SECRETS_DIR" in variables
    require_paragraph(outcome, 2 if usage else 1, *words)
    assert time.monotonic() - began < 10
    assert not (tmp_path / "home" / "mlflow").exists()


def test_port_of_the_embedded_server_is_taken(tmp_path: Path, assay: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = assay("run", "tiny", ASSAY_HOME=tmp_path / "home", ASSAY_PREFECT_PORT=port)
    require_paragraph(outcome, 1, str(port), "ASSAY_PREFECT_PORT")


def test_mlflow_uri_that_names_no_store(lab: Any, command: Callable[..., Any]) -> None:
    outcome = command("run", "tiny", ASSAY_MLFLOW_TRACKING_URI="gopher://store")
    require_paragraph(outcome, 1, "gopher://store")


def test_mlflow_database_that_is_none(tmp_path: Path, command: Callable[..., Any]) -> None:
    database = tmp_path / "home" / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"no database" * 1000)
    outcome = command("run", "tiny", ASSAY_HOME=tmp_path / "home")
    require_paragraph(outcome, 1, str(database), "not a database")


@pytest.mark.parametrize("limit", [1 << 12, 1 << 17])
def test_disk_that_is_full(
    tmp_path: Path, child_environment: Mapping[str, str], prefect_server: str, limit: int
) -> None:
    """No file may grow beyond the limit: the probe of the folder fails, or MLflow's database."""
    home = tmp_path / "home"
    done = subprocess.run(
        [Path(sys.executable).with_name("assay"), "run", "tiny"],
        cwd=tmp_path,
        env={**child_environment, "ASSAY_HOME": str(home), "PREFECT_API_URL": prefect_server},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert lines[-1].startswith("assay: ")
    assert "nothing foresaw" not in done.stderr
    assert "Traceback" not in done.stderr
    assert str(home) in lines[-1]
    assert not list(home.glob(".probe-*"))


def test_disk_that_fills_up_while_training(
    lab: Any, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import components.train.run

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    before = files_of(lab.home)
    with monkeypatch.context() as patch:
        patch.setattr(components.train.run, "write_atomic", full)
        outcome = command("run", "filling")
    require_paragraph(outcome, 1, "No space left on device", "ASSAY_HOME")
    (run,) = lab.runs("filling")
    assert run.info.status == "FAILED"
    assert "No space left" in run.data.tags["assay.reason"]
    assert files_of(lab.home) == before
    assert command("run", "filling", "--json").json["decision"] == "promoted"


def test_two_distributions_with_one_name(
    tmp_path: Path,
    team: Path,
    child_environment: dict[str, str],
    assay: Callable[..., Any],
    distribution: Callable[..., None],
) -> None:
    other = tmp_path / "other"
    distribution(other, "rival", {"tiny": "rival_pipelines:tiny"})
    path = f"{other}:{child_environment['PYTHONPATH']}"
    for arguments in (("run", "digits"), ("pipelines",)):
        outcome = assay(*arguments, ASSAY_HOME=tmp_path / "home", PYTHONPATH=path)
        require_paragraph(
            outcome, 2, "'tiny'", "rival_pipelines:tiny", "team_pipelines:tiny", "Rename"
        )
    assert not (tmp_path / "home").exists()
