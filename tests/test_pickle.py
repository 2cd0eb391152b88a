"""Nothing is pickled, and a forged result that asks for pickle is refused."""

import base64
import json
import lzma
import os
import pickle
import pickletools
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


def is_pickle(path: Path) -> bool:
    """Whether a file begins with a whole pickle of protocol 2 or later."""
    with path.open("rb") as stream:
        if not (stream.read(1) == b"\x80" and stream.read(1) <= b"\x05"):
            return False
    try:
        for _ in pickletools.genops(path.read_bytes()):
            pass
    except ValueError:
        return False
    return True


def test_a_pickle_is_told_from_other_files(tmp_path: Path) -> None:
    for protocol in (2, 5):
        (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
        assert is_pickle(tmp_path / "pickle")
    (tmp_path / "other").write_bytes(b"\x80\x02 and more")
    assert not is_pickle(tmp_path / "other")


def test_whole_chain_looks_for_no_pickled_class(
    tmp_path: Path,
    checkout: Path,
    child_environment: Mapping[str, str],
    prefect_server: str,
    finished: Any,
) -> None:
    home = tmp_path / "home"
    script = checkout / "tests" / "support" / "run_audited.py"
    done = subprocess.run(
        [sys.executable, str(script), "run", "digits", "--json"],
        cwd=tmp_path,
        env={**child_environment, "ASSAY_HOME": str(home), "PREFECT_API_URL": prefect_server},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *_, summary, audit = map(json.loads, done.stdout.splitlines())
    assert summary["decision"] == "promoted"
    assert audit == {"code": 0, "found": []}
    # Another home, another server: the same bytes.
    assert summary["onnx_sha256"] == finished.outcome.json["onnx_sha256"]
    files = [path for path in home.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if is_pickle(path)] == []


def test_no_pickle_in_a_home_with_an_embedded_server(finished: Any) -> None:
    assert [path for path in finished.home.rglob("*") if path.is_file() and is_pickle(path)] == []


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def forgeries(proof: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Serializer and content of stored results that would make a file if Prefect read them."""
    pickled = base64.encodebytes(pickle.dumps(Payload(proof))).decode()
    packed = base64.encodebytes(lzma.compress(pickled.encode())).decode()
    touch = f"touch {proof}"
    return {
        "pickle": ({"type": "pickle", "picklelib": "pickle"}, pickled),
        "compressed": ({"type": "compressed/pickle"}, packed),
        "decoder": (
            {"type": "json", "object_decoder": "subprocess.Popen"},
            json.dumps({"touch": 1, str(proof): 1}),
        ),
        "class": (
            {"type": "json"},
            json.dumps({"__class__": "subprocess.getoutput", "data": [touch]}),
        ),
        "value": ({"type": "json"}, json.dumps({"touch": str(proof)})),
    }


@pytest.mark.parametrize("name", ["pickle", "compressed", "decoder", "class"])
def test_forgery_would_run_code_without_assay(tmp_path: Path, name: str) -> None:
    """The attack is real: in a process that has not disarmed Prefect, it works."""
    proof = tmp_path / "proof"
    serializer, content = forgeries(proof)[name]
    code = (
        "import json, sys\n"
        "from prefect.serializers import Serializer\n"
        "serializer, content = json.load(sys.stdin)\n"
        "answer = Serializer(**serializer).loads(content.encode())\n"
        "getattr(answer, 'wait', int)()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([serializer, content]),
        env={**os.environ, "PREFECT_HOME": str(tmp_path)},
        text=True,
        timeout=60,
    )
    assert proof.exists()


@pytest.mark.parametrize("name", ["pickle", "compressed", "decoder", "class", "value"])
def test_forged_result_is_not_read_and_the_stage_runs_again(
    lab: Any, tmp_path: Path, name: str
) -> None:
    from flows.train import train

    trained = train("forged")
    assert train("forged") == trained
    folder = lab.home / "prefect" / "storage"
    (stored,) = (p for p in folder.glob("train-*") if trained.run_id in p.read_text())
    record = json.loads(stored.read_text())
    proof = tmp_path / "proof"
    record["metadata"]["serializer"], record["result"] = forgeries(proof)[name]
    stored.write_text(json.dumps(record))
    again = train("forged")
    assert not proof.exists()
    assert again.run_id != trained.run_id
    assert again.weights.sha256 == trained.weights.sha256


def test_results_are_set_to_json(lab: Any, command: Callable[..., Any]) -> None:
    from prefect.settings import PREFECT_RESULTS_DEFAULT_SERIALIZER, temporary_settings

    with temporary_settings({PREFECT_RESULTS_DEFAULT_SERIALIZER: "pickle"}):
        outcome = command("run", "forged")
    assert outcome.code == 2
    assert "PREFECT_RESULTS_DEFAULT_SERIALIZER" in outcome.err.splitlines()[-1]
