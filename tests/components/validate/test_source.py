"""Every rule of the look at a component's source finds its line, and shipped code is clean."""

import importlib
import socket
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from components import import_guard
from components.errors import ConfigError
from components.import_guard import NetworkRefusedError, network_refused
from components.pipeline import load_pipeline
from components.validate import source_files
from components.validate.source import RULES, SourceReport, scan_source, verify_source
from components.validate.source_files import component_files

BAD = {
    "B102": "exec('x = 1')",
    "B105": "db_password = 'hunter2'",
    "B106": "connect(password='hunter2')",
    "B107": "def connect(password='hunter2'): ...",
    "B301": "import pickle  # nosec B403\npickle.loads(b'')",
    "B302": "import marshal  # nosec B403\nmarshal.loads(b'')",
    "B307": "eval('1')",
    "B323": "import ssl\nssl._create_unverified_context()",
    "B403": "import dill",
    "B501": "import requests\nrequests.get('https://host', verify=False)",
    "B506": "import yaml\nyaml.load(text)",
    "B602": "import subprocess\nsubprocess.run('ls', shell=True)",
    "B604": "start('ls', shell=True)",
    "B605": "import os\nos.system('ls')",
    "B614": "import torch\ntorch.load('model.pt', weights_only=False)",
}


def scan(folder: Path, text: str) -> SourceReport:
    path = folder / "component.py"
    path.write_text(textwrap.dedent(text))
    return scan_source([("component.py", path)])


def test_every_rule_has_a_broken_module() -> None:
    assert set(BAD) == set(RULES)


@pytest.mark.parametrize("rule", BAD)
def test_rule_fires(tmp_path: Path, rule: str) -> None:
    report = scan(tmp_path, BAD[rule])
    assert not report.passed
    (finding,) = report.findings
    assert (finding.rule, finding.file) == (rule, "component.py")
    assert finding.line == len(BAD[rule].splitlines())
    assert finding.sentence.startswith(f"component.py:{finding.line}: ")
    assert finding.sentence.endswith(".")
    assert "hunter2" not in report.model_dump_json()
    assert SourceReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("from torch import load\nload('model.pt')", None),
        ("import torch\ntorch.load('model.pt')", "B614"),
        ("import torch as t\nt.load('model.pt')", "B614"),
        ("import torch\ntorch.load('model.pt', weights_only=True)", None),
        ("import joblib", "B403"),
        ("from joblib import load", "B403"),
        ("import marshal", "B403"),
        ("import cloudpickle", "B403"),
        ("import shelve", "B403"),
        ("__import__('pickle')", "B403"),
        ("import importlib\nimportlib.import_module('joblib')", "B403"),
        ("import pandas\npandas.read_pickle('x')", "B301"),
        ("model.eval()", None),
        ("import subprocess\nsubprocess.run(['ls'])", None),
        ("import yaml\nyaml.safe_load(text)", None),
        ("pad_token = '[PAD]'", None),
        ("unk_token = '<unk>'", None),
        ("password = ''", None),
        ("PASS = 'PASS'", None),
        ("import os\npassword = os.environ['PASSWORD']", None),
    ],
)
def test_what_is_meant(tmp_path: Path, text: str, rule: str | None) -> None:
    findings = scan(tmp_path, text).findings
    assert [f.rule for f in findings] == ([] if rule is None else [rule])


def test_all_findings_at_once_in_order(tmp_path: Path) -> None:
    report = scan(tmp_path, "import pickle\neval('1'); exec('1')\nimport joblib\n")
    assert [(f.line, f.rule) for f in report.findings] == [
        (1, "B403"),
        (2, "B102"),
        (2, "B307"),
        (3, "B403"),
    ]
    assert report.findings[1].code == "eval('1'); exec('1')"


def test_suppressed_findings_are_counted(tmp_path: Path) -> None:
    report = scan(tmp_path, "import pickle  # nosec\nimport dill  # nosec B403\neval('1')\n")
    assert [f.rule for f in report.findings] == ["B307"]
    assert report.suppressed == 2


def test_a_file_that_cannot_be_read_does_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    report = scan(tmp_path, "def broken(:\n")
    assert [f.rule for f in report.findings] == ["unreadable"]
    missing = scan_source([("gone.py", tmp_path / "gone.py")])
    assert [f.rule for f in missing.findings] == ["unreadable"]
    assert capsys.readouterr() == ("", "")
    assert caplog.records == []


def test_nothing_to_look_at(tmp_path: Path) -> None:
    assert scan_source([]) == SourceReport(passed=True, findings=(), files=(), suppressed=0)
    with pytest.raises(ValidationError, match="must follow from the findings"):
        SourceReport(passed=False, findings=(), files=(), suppressed=0)


def test_without_bandit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bandit.core", None)
    with pytest.raises(ConfigError, match="bandit, which is not installed.*pip install"):
        scan(tmp_path, "x = 1")


# which files


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write modules into a folder from which they can be imported."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text)
            if path.parent != tmp_path:
                (path.parent / "__init__.py").touch()
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_what_a_module_imports_beside_it_is_looked_at(project: Callable[..., None]) -> None:
    project(
        alpha__net="from . import layers\nfrom .deep.parts import Part\nimport torch, beta\n",
        alpha__layers="def late():\n    import alpha.lazy\n",
        alpha__lazy="",
        alpha__unused="import pickle\n",
        alpha__deep__parts="from ..cousin import thing\nPart = 1\n",
        alpha__cousin="thing = 1\n",
        beta="import components.contract, alpha.net\n",
    )
    names = [name for name, _ in component_files(["alpha.net"])]
    assert names == [
        "alpha/__init__.py",
        "alpha/cousin.py",
        "alpha/deep/__init__.py",
        "alpha/deep/parts.py",
        "alpha/layers.py",
        "alpha/lazy.py",
        "alpha/net.py",
        "beta.py",
    ]


def test_other_peoples_modules_are_not_looked_at(project: Callable[..., None]) -> None:
    project(alpha="import torch\n")
    named = ["alpha", "torch.nn.functional", "components.metrics", "json", "sys", "absent_module"]
    assert [name for name, _ in component_files(named)] == ["alpha.py"]
    assert component_files(["sys"]) == []
    own = component_files(["components.metrics", "torch.nn.functional"])
    assert [name for name, _ in own] == ["components/metrics.py"]


def test_code_of_assay_beside_a_component_is_not_looked_at(
    project: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(engine__core="import pickle\n", alpha="import engine.core\n")
    assert "engine/core.py" in [name for name, _ in component_files(["alpha"])]
    monkeypatch.setattr(source_files, "_OWN", (tmp_path / "engine",))
    assert [name for name, _ in component_files(["alpha"])] == ["alpha.py"]


@pytest.mark.parametrize("name", ["digits", "flights"])
def test_shipped_pipelines_are_clean(name: str) -> None:
    report = verify_source(load_pipeline(name))
    assert report.findings == ()
    assert f"components/pipelines/{name}.py" in report.files
    assert f"components/data/{name}.py" in report.files


def test_all_of_components_is_clean(checkout: Path) -> None:
    files = sorted((checkout / "components").rglob("*.py"))
    report = scan_source([(str(path), path) for path in files])
    assert report.findings == ()
    assert report.suppressed == 0


# the network at import


def test_network_at_import_is_refused_and_named(
    project: Callable[..., None], tmp_path: Path
) -> None:
    project(
        calling="import socket\n\nsocket.getaddrinfo('host.invalid', 80)\n",
        catching=(
            "import urllib.request\n"
            "try:\n"
            "    urllib.request.urlopen('http://127.0.0.1:9/weights', timeout=1)\n"
            "except OSError:\n"
            "    weights = None\n"
        ),
        deferring="import socket\ndef call(): socket.create_connection(('127.0.0.1', 9), 1)\n",
    )
    with network_refused() as found, pytest.raises(NetworkRefusedError, match=r"calling\.py:3"):
        importlib.import_module("calling")
    assert [(Path(a.file).name, a.line, a.event) for a in found] == [
        ("calling.py", 3, "socket.getaddrinfo")
    ]
    with network_refused() as found:
        importlib.import_module("catching")
        deferring = importlib.import_module("deferring")
    assert {(Path(a.file).name, a.line) for a in found} == {("catching.py", 3)}
    report = scan_source(component_files(["catching"]), found)
    assert [(f.rule, f.file, f.line) for f in report.findings] == [("network", "catching.py", 3)]
    assert "urlopen" in report.findings[0].code
    assert scan_source(component_files(["deferring"]), found).passed
    with pytest.raises(ConnectionRefusedError):
        deferring.call()  # nothing is refused once the import is over


def test_local_sockets_and_hooks_are_left_alone(tmp_path: Path) -> None:
    before = len(import_guard.attempts)
    with (
        network_refused() as found,
        socket.socket(socket.AF_UNIX) as unix,
        pytest.raises(FileNotFoundError),
    ):
        unix.connect(str(tmp_path / "absent"))
    assert found == []
    assert len(import_guard.attempts) == before


def test_other_threads_keep_the_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, network_refused() as found:
        place = listener.getsockname()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: socket.create_connection(place, timeout=5).close()).result()
        assert found == []
        with pytest.raises(NetworkRefusedError):
            socket.create_connection(place, timeout=5)
    assert len(found) == 1


def test_a_thread_that_ends_takes_no_other_watch_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread begins to watch just while another takes its own watch off the list."""
    began, found = threading.Event(), []

    def other() -> None:
        with network_refused() as attempts:
            began.set()
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", 9), timeout=1)
            found.extend(attempts)

    thread = threading.Thread(target=other)

    class Slow(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            if not thread.ident:
                thread.start()
                began.wait(0.2)

    monkeypatch.setattr(import_guard, "_watching", Slow())
    with network_refused():
        pass
    thread.join()
    assert len(found) == 1
