"""What the documents say is true: commands run or parse, the example works, links lead somewhere.

``make`` targets are resolved by ``make -n`` and not run: this test is part of ``make test``, and
``make retrain`` is the command ``assay run`` that is run here. Commands on ``flights`` are parsed;
the same ones on ``digits`` are run, which takes seconds.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from pydantic import SecretStr

from components.settings import PREFIX, Settings
from flows.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BIN = Path(sys.executable).parent
OUTSIDE = ("ASSAY_", "PREFECT_", "MLFLOW_", "MAKE", "MFLAGS")
SLOW = "flights"

Run = Callable[..., subprocess.CompletedProcess[str]]


def blocks(document: Path, *languages: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands(document: Path) -> list[str]:
    lines = [line for body in blocks(document, "bash") for line in body.splitlines()]
    typed = [line for body in blocks(document, "console") for line in body.splitlines()]
    lines += [line.removeprefix("$ ") for line in typed if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def expected_status(command: str) -> int:
    said = re.search(r"#.*exit status (\d)", command)
    return int(said[1]) if said else 0


EVERYWHERE = sorted({command for document in DOCUMENTS for command in commands(document)})
IN_README = commands(README)


@pytest.fixture(scope="module")
def run(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a command of the virtual environment in a home of its own, on the session's server."""
    folder = tmp_path_factory.mktemp("readme")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
    own = {"HOME": folder, "ASSAY_HOME": folder / "state", "PREFECT_API_URL": prefect_server}

    def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / command[0], *command[1:]],
            cwd=folder,
            env={**kept, **{k: str(v) for k, v in own.items()}, **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="module")
def printed(run: Run) -> Mapping[str, subprocess.CompletedProcess[str]]:
    """What the README's ``assay`` commands did, in order, those on flights left out."""
    chosen = [c for c in IN_README if words(c)[0] == "assay" and SLOW not in words(c)]
    return {command: run(*words(command)) for command in chosen}


def test_readme_shows_something_to_run():
    assert {words(command)[0] for command in IN_README} == {"assay", "export", "make", "prefect"}
    assert ["Pipeline(" in body for body in blocks(README, "python")] == [True, False]


@pytest.mark.parametrize("command", [c for c in EVERYWHERE if words(c)[0] == "make"])
def test_make_target_exists(command: str):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MA")}
    done = subprocess.run(
        ["make", "-n", *words(command)[1:]], cwd=ROOT, env=kept, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for line in done.stdout.splitlines():
        if line.startswith(".venv/bin/assay "):
            build_parser().parse_args(words(line)[1:])


@pytest.mark.parametrize("command", [c for c in EVERYWHERE if words(c)[0] == "assay"])
def test_assay_command_parses(command: str):
    build_parser().parse_args(words(command)[1:])


@pytest.mark.server
def test_assay_commands_end_as_the_readme_says(printed):
    ended = {command: done.returncode for command, done in printed.items()}
    assert ended == {command: expected_status(command) for command in printed}


@pytest.mark.server
def test_printed_summary_has_the_lines_that_the_readme_shows(printed):
    (rejected,) = [done.stdout for command, done in printed.items() if "epochs=1" in command]
    fresh, cached = (labels(body) for body in blocks(README, "text")[:2])
    assert labels(rejected) == fresh
    assert [label for label in cached if label != "cached"] == fresh


def labels(summary: str) -> list[str]:
    return [line.split()[0] for line in summary.splitlines() if re.match(r"[a-z]+  ", line)]


@pytest.mark.server
def test_json_has_the_fields_that_the_readme_shows(printed):
    (done,) = [done for command, done in printed.items() if "--json" in command]
    (shown,) = blocks(README, "json")
    assert fields(json.loads(shown)) == fields(json.loads(done.stdout))


def fields(value: object) -> object:
    return {k: fields(v) for k, v in value.items()} if isinstance(value, dict) else None


@pytest.mark.server
@pytest.mark.parametrize("command", [c for c in IN_README if words(c)[0] == "prefect"])
def test_prefect_knows_command_and_options(command: str, run: Run):
    done = run(*words(command), "--help")
    assert done.returncode == 0, done.stdout + done.stderr
    unknown = {word for word in words(command) if word.startswith("--") and word not in done.stdout}
    if unknown:  # options of prefect itself stand before the command
        everywhere = run("prefect", "--help").stdout
        unknown = {option for option in unknown if option not in everywhere}
    assert unknown == set()


@pytest.mark.parametrize("command", [c for c in EVERYWHERE if words(c)[0] == "export"])
def test_exported_variable_is_read_by_something(command: str):
    name = words(command)[1].partition("=")[0]
    settings = {PREFIX + field.upper() for field in Settings.model_fields}
    deployment = re.findall(r"\$ ?([A-Z_]+)", (ROOT / "prefect.yaml").read_text())
    assert name in {*settings, *deployment} or name.startswith("PREFECT_")


@pytest.mark.server
def test_readme_pipeline_reaches_a_decision(run: Run, tmp_path: Path):
    (registration,) = blocks(README, "toml")
    entries = tomllib.loads(registration)["project"]["entry-points"]["assay.pipelines"]
    ((name, place),) = entries.items()
    code, consumer = blocks(README, "python")
    (tmp_path / f"{place.partition(':')[0]}.py").write_text(code, encoding="utf-8")
    information = tmp_path / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[assay.pipelines]\n{name} = {place}\n")
    done = run("assay", "run", name, "--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["decision"] == "promoted"
    answers = consume(run, consumer.replace("flights", name))
    assert len(answers) == 3
    assert {answer["label"] for answer in answers} <= {"malignant", "benign"}
    assert all(0 <= answer["probability"] <= 1 for answer in answers)


def consume(run: Run, code: str) -> list[dict[str, float | str]]:
    """The README's consumer on raw rows, where assay cannot be imported."""
    state = Path(run("python", "-c", "import os; print(os.environ['ASSAY_HOME'])").stdout.strip())
    script = f"""
import sys
sys.modules["components"] = sys.modules["flows"] = None
from sklearn.datasets import load_breast_cancer
frame = load_breast_cancer(as_frame=True).frame.head(3)
{code.replace("model.predict", "answers = model.predict")}
print(answers.to_json(orient="records"))
"""
    store = f"sqlite:///{state / 'mlflow' / 'mlflow.db'}"
    done = run("python", "-W", "ignore", "-c", script, MLFLOW_TRACKING_URI=store)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, float | str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_compile(document: Path):
    for body in blocks(document, "python"):
        compile(body, str(document), "exec", dont_inherit=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    dead = [link for link in links if not leads_somewhere(document, link)]
    assert not dead


def leads_somewhere(document: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = document.parent / path if path else document
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_env_example_lists_every_setting_with_its_default():
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    shown = {line for line in lines if line.startswith(f"# {PREFIX}")}
    wanted = set()
    for name, field in Settings.model_fields.items():
        secret = isinstance(field.default, SecretStr)
        wanted.add(f"# {PREFIX}{name.upper()}={'' if secret else field.default}")
        assert f"# {field.description}" in lines
    assert shown == wanted


def test_the_examples_of_verification_print_what_they_say(capsys: pytest.CaptureFixture[str]):
    examples = [
        body
        for body in blocks(ROOT / "docs" / "verification.md", "python")
        if "gradients(" in body or "Line" in body
    ]
    assert len(examples) == 3
    names: dict[str, object] = {}
    exec("\n".join(examples), names)  # one after the other, as a reader would
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"# (.+)$", "\n".join(examples), flags=re.MULTILINE)
    told = [text for text in said if not text.startswith("the minus")]
    assert len(printed) == len(told) == 4
    for line, text in zip(printed, told, strict=True):
        assert re.fullmatch(re.escape(text).replace(r"\.\.\.", ".*"), line)
