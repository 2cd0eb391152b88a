"""``assay verify`` by its exit status, its report and its errors, on components good and broken."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = "support.broken_components"


@pytest.fixture
def verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run the command in this process, in a folder of its own; files are given by name."""
    from components.errors import AssayError
    from flows.cli import build_parser, dispatch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def run(*arguments: str, **files: str) -> tuple[int, str, str]:
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        capsys.readouterr()
        try:
            status = dispatch(build_parser().parse_args(["verify", *arguments]))
        except AssayError as error:
            print(f"assay: {error}", file=sys.stderr)
            status = error.exit_code
        return status, *capsys.readouterr()

    yield run
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


BROKEN = {
    "Detached": ("block", "gradients  failed", "block.fc.weight: FAIL broken_path"),
    "Factor": ("block", "gradients  failed", "mismatch"),
    "Direct": ("block", "contract   failed", "hooks: a module must be called"),
    "PlainList": ("block", "contract   failed", "caused by block.weights[0]"),
    "TrainingNorm": ("block.1", "contract   failed", "weights_kept: predict in eval mode"),
}


def test_right_component(verify: Callable[..., Any]) -> None:
    status, out, _ = verify(f"{HERE}:Right")
    assert (status, "rejected" in out, "culprit" in out) == (0, False, False), out
    assert out.startswith(f"component  {HERE}:Right: passed\nsource     passed: ")
    assert "contract   passed: 14 of 14 checks hold" in out
    assert "gradients  passed: 6 of 6 tensors and " in out


@pytest.mark.parametrize("name", BROKEN)
def test_broken_component(verify: Callable[..., Any], name: str) -> None:
    culprit, *words = BROKEN[name]
    status, out, _ = verify(f"{HERE}:{name}")
    assert status == 3, out
    assert f"culprit    {culprit!r}" in out
    for word in words:
        assert word in out


def test_findings_of_the_source_stand_with_file_and_line(verify: Callable[..., Any]) -> None:
    text = (
        "import pickle\nfrom support.broken_components import Right\npassword = 'hunter2'\n"
        "class Own(Right):\n    pass\n"
    )
    status, out, _ = verify("pickling:Own", pickling=text)
    assert status == 3
    assert "- pickling.py:1: unpickling" in out
    assert "- pickling.py:3: a credential" in out
    assert "(B403)" in out
    assert "hunter2" not in out


def test_not_a_number(verify: Callable[..., Any]) -> None:
    status, out, _ = verify(f"{HERE}:NotANumber")
    assert status == 3
    assert "finite: forward in eval mode must give finite numbers" in out


def test_incomplete_class(verify: Callable[..., Any]) -> None:
    status, out, _ = verify(f"{HERE}:Incomplete")
    assert status == 3
    assert "missing: get_model_metadata, predict." in out
    assert "gradients  not looked at" in out


def test_class_that_does_not_fit(verify: Callable[..., Any]) -> None:
    text = (
        "from components.contract import Model\n"
        "class Late(Model):\n"
        "    async def forward(self, x): pass\n"
        "    predict = 3\n"
    )
    status, out, _ = verify("mistyped:Late", mistyped=text)
    assert status == 3
    assert "forward must be a plain method; got an async one; predict must be a method" in out
    assert "source     passed: 1 file\n" in out


def test_a_forward_that_ends_the_process(verify: Callable[..., Any]) -> None:
    status, out, _ = verify(f"{HERE}:Leaving")
    assert status == 3
    assert "SystemExit" in out


@pytest.mark.parametrize(
    ("target", "text", "words"),
    [
        ("absent:Net", None, ["there is no 'absent'", "Check the spelling"]),
        ("lone:Net", "", ["no 'Net'", "Its models and pipelines: none"]),
        ("needing:Net", "import absent_library", ["needing.py:1", "absent_library"]),
        ("raising:Net", "\n1 / 0", ["ZeroDivisionError", "raising.py:2"]),
        ("spelled:Net", "x = 1\nclass Net(:\n", ["SyntaxError", "spelled.py:2"]),
        ("leaving:Net", "import sys\nsys.exit(0)", ["SystemExit", "leaving.py:2"]),
        (f"{HERE}:number", None, ["must name a model", "got int"]),
        (f"{HERE}:build_nothing", None, ["must build an nn.Module", "got int"]),
        (f"{HERE}:build_with", None, ["without arguments", "it needs width"]),
        (f"{HERE}:Needy", None, ["without arguments", "it needs width"]),
        (f"{HERE}:Raising", None, ["ZeroDivisionError", "broken_components.py", "no such width"]),
        (f"{HERE}:Right.nothing", None, ["has no 'Right.nothing'"]),
        ("nothing", None, ["MODULE:NAME", "digits, flights"]),
        (":Net", None, ["MODULE:NAME"]),
        ("module:", None, ["MODULE:NAME"]),
        ("./mine.py:Net", None, ["a module, not a file", "mine:Net"]),
        ("mine.py", None, ["a module, not a file", "mine:NAME"]),
        ("..mine:Net", None, ["a module, not a file", "mine:Net"]),
    ],
)
def test_bad_input(
    verify: Callable[..., Any], target: str, text: str | None, words: list[str]
) -> None:
    files = {} if text is None else {target.partition(":")[0]: text}
    status, out, err = verify(target, **files)
    assert (status, out) == (2, "")
    for word in words:
        assert word in err
    assert "Traceback" not in err


def test_the_command_prints_one_object_and_needs_no_server(
    tmp_path: Path, checkout: Path, child_environment: Mapping[str, str]
) -> None:
    shutil.copy(checkout / "tests" / "support" / "broken_components.py", tmp_path / "mine.py")
    code = (
        "import sys, flows.cli\n"
        "try: flows.cli.main(['verify', 'mine:Noisy', '--json'])\n"
        "except SystemExit as ended: assert ended.code == 0, ended.code\n"
        "heavy = {'prefect', 'mlflow', 'ray', 'onnxruntime', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env=dict(child_environment),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "hello on stdout" in done.stderr
    assert "noise" in done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    fields = [
        "target",
        "passed",
        "culprit",
        "source",
        "contract",
        "gradients",
        "trouble",
        "seconds",
    ]
    assert list(report) == fields
    assert report["passed"] is True
    assert report["source"]["files"] == ["mine.py"]
    assert report["seconds"] < 10
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_the_command_rejects_a_broken_component(
    tmp_path: Path, checkout: Path, assay: Callable[..., Any]
) -> None:
    shutil.copy(checkout / "tests" / "support" / "broken_components.py", tmp_path / "mine.py")
    outcome = assay("verify", "mine:Detached", "--json")
    assert outcome.code == 3, outcome.err
    assert outcome.json["culprit"] == outcome.json["gradients"]["culprit"] == "block"
    assert outcome.out.count("\n") == 1
    outcome = assay("verify", "--help")
    assert "MODULE:NAME" in outcome.out
    assert "3 something is not" in " ".join(outcome.out.split())
