"""The commands beside ``run``: help, the list of pipelines, and the doctor."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from components.settings import Settings

SECRET = "c0rrect-h0rse-battery"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help(assay: Callable[..., Any], arguments: list[str]) -> None:
    outcome = assay(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    words = " ".join(outcome.out.split())
    wanted = ["exit status", "3 a gate rejected", "2 usage", "1 infrastructure", "0 the run"]
    wanted += ["--as-of", "--seed", "--force", "--set", "--json"] if "run" in arguments else []
    wanted += ["run", "reproduce", "pipelines", "doctor"] if len(arguments) == 1 else []
    for word in wanted:
        assert word in words


def test_help_of_reproduce(assay: Callable[..., Any]) -> None:
    outcome = assay("reproduce", "--help")
    assert (outcome.code, outcome.err) == (0, "")
    words = " ".join(outcome.out.split())
    for word in (
        "MODEL@VERSION",
        "--here",
        "--json",
        "0 every digest agrees",
        "3 a digest differs",
    ):
        assert word in words


@pytest.mark.parametrize("command", ["promote", "rollback", "history"])
def test_help_of_moves_by_hand(assay: Callable[..., Any], command: str) -> None:
    outcome = assay(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    words = " ".join(outcome.out.split())
    own = {"promote": ["VERSION", "--reason"], "rollback": ["--to", "--reason"]}
    for word in ["MODEL", "3 the version was rejected", *own.get(command, ["--json"])]:
        assert word in words


def test_there_is_nothing_to_move_in_an_empty_home(
    assay: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = assay("history", "flights", ASSAY_HOME=tmp_path / "home")
    assert (outcome.code, outcome.out) == (2, "")
    assert "has no MLflow store yet" in outcome.err
    assert not (tmp_path / "home" / "mlflow").exists()


def test_no_command(assay: Callable[..., Any]) -> None:
    outcome = assay()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("assay: ")


def test_pipelines_are_listed_without_importing_them(
    tmp_path: Path, child_environment: Mapping[str, str]
) -> None:
    code = (
        "import sys, flows.cli\n"
        "try: flows.cli.main(['pipelines'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'prefect', 'mlflow', 'pydantic', 'numpy', 'pyarrow', 'team_pipelines'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=dict(child_environment),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    listed = dict(line.split() for line in done.stdout.splitlines())
    assert listed["digits"] == "components.pipelines.digits:pipeline"
    assert listed["flights"] == "components.pipelines.flights:pipeline"
    assert listed["tiny"] == "team_pipelines:tiny"
    assert list(listed) == sorted(listed)
    assert list(tmp_path.iterdir()) == []


def test_doctor(tmp_path: Path, assay: Callable[..., Any]) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "assay_mlflow_token").write_text(SECRET)
    (tmp_path / ".env").write_text(f"ASSAY_MLFLOW_USERNAME={SECRET}\n")
    outcome = assay(
        "doctor",
        ASSAY_HOME=tmp_path / "home",
        ASSAY_MLFLOW_PASSWORD=SECRET,
        ASSAY_SECRETS_DIR=secrets,
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert SECRET not in outcome.out
    lines = [re.split(r"\s{2,}", line) for line in outcome.out.splitlines()]
    assert {line[0] for line in lines} == {"ok"}
    services = {subject: text for _, subject, text in lines}
    found = {subject: text for _, subject, text in reversed(lines)}
    for name in ("python", "assay", "prefect", "mlflow", "torch", "onnx", "onnxscript"):
        assert re.match(r"\d+\.\d+", found[name]), name
    assert len({"onnxruntime", "onnxruntime-gpu"} & set(found)) == 1
    assert "CPUExecutionProvider" in found["providers"]
    assert found["devices"].startswith("cpu")
    sources = {name: found[f"setting {name}"] for name in Settings.model_fields}
    given = {name for name, source in sources.items() if source != "from default"}
    assert given == {
        "home",
        "mlflow_username",
        "mlflow_password",
        "mlflow_token",
        "secrets_dir",
    }
    assert sources["home"] == sources["mlflow_password"] == "from environment"
    assert sources["mlflow_username"] == "from .env"
    assert sources["mlflow_token"] == "from secrets directory"
    assert {"digits", "flights", "tiny"} <= set(found["pipelines"].split(", "))
    assert "embedded" in services["mlflow"]
    assert "embedded" in services["prefect"]


def test_doctor_shows_everything_that_is_wrong(tmp_path: Path, assay: Callable[..., Any]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    outcome = assay(
        "doctor",
        ASSAY_HOME=file,
        ASSAY_MLFLOW_TRACKING_URI="http://127.0.0.1:9",
        PREFECT_API_URL="http://127.0.0.1:9/api",
    )
    assert (outcome.code, outcome.err) == (1, "")
    lines = [re.split(r"\s{2,}", line) for line in outcome.out.splitlines()]
    assert [line[1] for line in lines if line[0] == "BAD"] == ["state", "mlflow", "prefect"]
    assert ["ok", "torch"] in [line[:2] for line in lines]


def test_doctor_finds_the_servers(
    tmp_path: Path, assay: Callable[..., Any], prefect_server: str
) -> None:
    outcome = assay("doctor", ASSAY_HOME=tmp_path, PREFECT_API_URL=prefect_server)
    assert outcome.code == 0
    assert f"{prefect_server} answers" in outcome.out
