"""The same golden file through every engine, and each way in which an engine says no."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from support.row_model import ROWS_B, row_model, write_version

from components.errors import ConfigError, GateError, InfrastructureError
from components.export.golden import read_golden, write_golden
from components.settings import load_settings
from components.smoke_test.engines import installed, run
from components.smoke_test.engines.installed import NAMES, parse_engines
from components.smoke_test.engines.run import REFERENCE_ROWS, run_engines

PACKAGES = {
    "reference": "onnx 1.",
    "openvino": "openvino 20",
    "node": "onnxruntime-node 1.30.0, Node.js ",
    "chromium": "onnxruntime-web 1.30.0, Chromium ",
}


@pytest.mark.parametrize("engine", NAMES)
def test_an_engine_gives_the_golden_answers(
    engine: str, version: Path, node_modules: Path, needs: Callable[..., None]
) -> None:
    needs(engine)
    found = run_engines([engine], version, node_modules=node_modules, atol=1e-6)[engine]
    assert found.version.startswith(PACKAGES[engine])
    assert found.rows == (REFERENCE_ROWS if engine == "reference" else ROWS_B)
    assert 0 <= found.max_difference < 1e-6


@pytest.mark.parametrize("engine", NAMES)
def test_wrong_answers_are_told_with_row_and_value(
    engine: str,
    version: Path,
    node_modules: Path,
    needs: Callable[..., None],
    tmp_path: Path,
) -> None:
    needs(engine)
    folder = shutil.copytree(version, tmp_path / "wrong")
    prefix = "tensor_" if engine == "openvino" else ""
    inputs, outputs = read_golden(folder / f"{prefix}golden.npz")
    name = "p" if engine == "openvino" else "probability"
    outputs[name] = outputs[name] + np.float32(1e-3) * (np.arange(ROWS_B) == 5).reshape(
        -1, *[1] * (outputs[name].ndim - 1)
    ).astype(np.float32)
    if engine != "openvino":
        outputs["label"] = np.where(np.arange(ROWS_B) == 2, "very late", outputs["label"])
    write_golden(folder / f"{prefix}golden.npz", inputs, outputs)
    with pytest.raises(GateError) as refused:
        run_engines([engine], folder, node_modules=node_modules)
    told = sorted(refused.value.failures)
    assert told[-1].startswith(
        f"{engine}: {name!r} must equal the golden values within rtol 0.0001"
    )
    assert told[-1].endswith("row 5 differs by 0.001")
    if engine != "openvino":
        assert told[0].startswith(
            f"{engine}: 'label' must equal the golden values; 1 of 64 differ"
        ) or (engine == "reference" and "1 of 8 differ" in told[0])
        assert "the first in row 2: " in told[0]
        assert told[0].endswith("for 'very late'")


@pytest.mark.parametrize("engine", NAMES)
def test_an_operator_that_an_engine_has_not_is_its_refusal(
    engine: str,
    version: Path,
    node_modules: Path,
    needs: Callable[..., None],
    tmp_path: Path,
) -> None:
    needs(engine)
    folder = shutil.copytree(version, tmp_path / "unknown")
    (folder / "tensor.onnx").unlink()
    onnx.save(row_model(unknown_operator=True), folder / "model.onnx")
    with pytest.raises(GateError, match=f"{engine}: it refused the model: .*NoSuchOperator"):
        run_engines([engine], folder, node_modules=node_modules)


def test_openvino_refuses_text_so_it_gets_the_network_alone(
    version: Path, needs: Callable[..., None], tmp_path: Path
) -> None:
    needs("openvino")
    folder = write_version(tmp_path / "text")
    with pytest.raises(GateError, match="No conversion rule found for.*LabelEncoder"):
        run_engines(["openvino"], folder, node_modules=None)
    assert run_engines(["openvino"], version, node_modules=None)["openvino"].rows == ROWS_B


def test_failures_of_all_engines_are_told_together(
    version: Path, node_modules: Path, needs: Callable[..., None], tmp_path: Path
) -> None:
    needs("node")
    folder = shutil.copytree(version, tmp_path / "damaged")
    (folder / "model.onnx").write_bytes(b"\x08\x09 no protobuf")
    with pytest.raises(GateError) as refused:
        run_engines(["reference", "node"], folder, node_modules=node_modules)
    assert [text.split(":")[0] for text in refused.value.failures] == ["reference", "node"]


def test_a_browser_that_hangs_is_closed_and_leaves_nothing(
    version: Path,
    node_modules: Path,
    needs: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs("chromium")
    browser, work = tmp_path / "browser", tmp_path / "work"
    work.mkdir()
    browser.write_text("#!/bin/sh\nwhile :; do sleep 0.2; done\n")
    browser.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    monkeypatch.setattr("components.smoke_test.engines.run.chromium", lambda: str(browser))
    with pytest.raises(GateError, match="chromium: it must answer within 4 s; it was killed"):
        run_engines(["chromium"], version, node_modules=node_modules, timeout_s=4)
    assert list(work.iterdir()) == []
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"]]
    assert not [words for words in left if str(tmp_path) in " ".join(words)]


@pytest.mark.parametrize(
    ("script", "error", "told"),
    [
        ("echo all is lost >&2; exit 3", GateError, "exited with 3; its last words: all is lost"),
        ("kill -SEGV $$", GateError, "it must exit with 0; it exited with -11"),
        ("exec sleep 60", GateError, "it must answer within 1 s; it was killed"),
        ("exit 0", GateError, "it must answer in JSON as agreed; got FileNotFoundError"),
        ("echo nonsense > $5", GateError, "it must answer in JSON as agreed; got ValidationError"),
        ("echo '{\"batches\": []}' > $5", GateError, "'probability' must be an array"),
        ('echo \'{"broken": "no GLIBC"}\' > $5', InfrastructureError, "got no GLIBC. Reinstall"),
    ],
)
def test_a_child_that_does_not_answer_is_a_rejection(
    script: str,
    error: type[Exception],
    told: str,
    version: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = tmp_path / "node_modules" / "onnxruntime-node" / "package.json"
    package.parent.mkdir(parents=True)
    package.touch()
    program = tmp_path / "node"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(error) as raised:
        run_engines(["node"], version, node_modules=tmp_path / "node_modules", timeout_s=1)
    assert told in str(raised.value)


def test_a_program_that_cannot_start_is_no_fault_of_the_model(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "missing", lambda *_: [])
    monkeypatch.setattr(run, "node", lambda: str(tmp_path / "gone"))
    with pytest.raises(InfrastructureError, match="the process of engine node must start"):
        run_engines(["node"], version, node_modules=None)


def test_the_child_sees_no_secret(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "missing", lambda *_: [])
    program = tmp_path / "node"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\n")
    program.chmod(0o755)
    monkeypatch.setattr(run, "node", lambda: str(program))
    monkeypatch.setenv("ASSAY_MLFLOW_TOKEN", "secret")
    with pytest.raises(GateError):
        run_engines(["node"], version, node_modules=None)
    seen = {line.partition("=")[0] for line in (tmp_path / "seen").read_text().splitlines()}
    assert seen <= {
        "PATH",
        "LD_LIBRARY_PATH",
        "HOME",
        "TMPDIR",
        "OMP_NUM_THREADS",
        "PWD",
        "_",
        "SHLVL",
        "OLDPWD",
    }


@pytest.mark.parametrize(
    ("engine", "hidden", "step"),
    [
        ("reference", "onnx", "pip install 'assay[engines]'"),
        ("openvino", "openvino", "pip install 'assay[engines]'"),
        ("node", "node", "install Node.js"),
        ("node", "node_modules", "run 'make engines' and set ASSAY_NODE_MODULES"),
        ("chromium", "playwright", "pip install 'assay[engines]'"),
        ("chromium", "chromium", "install Debian's chromium"),
        ("chromium", "node_modules", "run 'make engines' and set ASSAY_NODE_MODULES"),
    ],
)
def test_an_engine_that_is_not_installed_is_a_wrong_setting(
    engine: str,
    hidden: str,
    step: str,
    version: Path,
    node_modules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: Any = {"onnx", "openvino", "playwright"} - {hidden}
    monkeypatch.setattr(installed, "find_spec", lambda name: name if name in found else None)
    programs: Any = {"node", "chromium"} - {hidden}
    monkeypatch.setattr(installed.shutil, "which", lambda name: name if name in programs else None)
    where = tmp_path if hidden == "node_modules" else node_modules
    with pytest.raises(ConfigError) as refused:
        run_engines([engine], version, node_modules=where)
    assert f"{engine}: " in str(refused.value)
    assert step in str(refused.value)


def test_without_the_setting_the_next_step_is_told(version: Path) -> None:
    with pytest.raises(ConfigError, match="ASSAY_NODE_MODULES is not set; run 'make engines'"):
        run_engines(["node"], version, node_modules=None)


def test_the_setting_names_engines_once_each() -> None:
    assert parse_engines("") == ()
    assert parse_engines(" node, chromium,node ,") == ("node", "chromium")
    with pytest.raises(ConfigError, match="must name some of reference, .*; got deno, bun"):
        parse_engines("node, deno,bun")


def test_an_unknown_engine_is_refused_before_any_runs(version: Path) -> None:
    with pytest.raises(ConfigError, match="got deno"):
        run_engines(["reference", "deno"], version, node_modules=None)


def test_an_unknown_engine_in_the_settings_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="ASSAY_SMOKE_ENGINES must name some of .*; got deno"):
        load_settings(smoke_engines="node,deno")
