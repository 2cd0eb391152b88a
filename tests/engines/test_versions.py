"""Registered versions through every engine, and in the page that predicts from a form."""

import functools
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Finished, Lab, Outcome
from support.row_model import answers

from components.adapters.mlflow_registry import Registry
from components.adapters.mlflow_tracking import connect
from components.errors import ConfigError
from components.export.golden import read_golden, write_golden
from components.settings import load_settings
from components.smoke_test.engines.child import chromium_options
from components.smoke_test.engines.installed import NAMES, chromium
from components.smoke_test.engines.run import run_engines

SHOWN = """
(wanted) => Math.abs(document.querySelectorAll(".share")[1].dataset.share - wanted) < 1e-5
"""

pytestmark = pytest.mark.server


def fetch(model: str, into: Path) -> Path:
    """The folder of the first version, downloaded as a consumer would."""
    return Registry(connect(load_settings()), model).fetch(1, into).parent


@pytest.fixture
def trips(lab: Lab, tmp_path: Path) -> Path:
    """The files of a registered version that takes rows, trained once in a session."""
    if not lab.versions("trips"):
        assert lab.retrain("trips").decision == "promoted"
    return fetch("trips", tmp_path / "version")


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """Serve a folder on loopback as any file server would."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_registered_version_of_rows_agrees_everywhere(
    trips: Path, node_modules: Path, needs: Callable[..., None]
) -> None:
    needs(*NAMES)
    assert (trips / "tensor.onnx").is_file()
    found = run_engines(NAMES, trips, node_modules=node_modules, rtol=0, atol=1e-5)
    assert set(found) == set(NAMES)


def test_a_registered_version_of_images_agrees_everywhere(
    finished: Finished,
    node_modules: Path,
    needs: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs(*NAMES)
    connect.cache_clear()
    monkeypatch.setenv("ASSAY_HOME", str(finished.home))
    folder = fetch("digits", tmp_path)
    connect.cache_clear()
    found = run_engines(NAMES, folder, node_modules=node_modules, rtol=0, atol=1e-5)
    assert set(found) == set(NAMES)


def test_a_row_is_the_same_through_pyfunc_node_and_chromium(
    trips: Path, node_modules: Path, needs: Callable[..., None], tmp_path: Path
) -> None:
    needs("node", "chromium")
    import mlflow.pyfunc

    inputs, _ = read_golden(trips / "golden.npz")
    rows = pd.DataFrame({name: array[:3] for name, array in inputs.items()})
    loaded = mlflow.pyfunc.load_model(str(trips))
    said: Any = loaded.predict(rows)
    outputs = {
        "probability": np.asarray(said["probability"], np.float32),
        "label": np.asarray(said["label"], np.str_),
    }
    folder = tmp_path / "pyfunc"
    folder.mkdir()
    (folder / "model.onnx").symlink_to(trips / "model.onnx")
    write_golden(folder / "golden.npz", {k: v[:3] for k, v in inputs.items()}, outputs)
    found = run_engines(["node", "chromium"], folder, node_modules=node_modules, rtol=0, atol=1e-5)
    assert {result.rows for result in found.values()} == {3}


def test_the_page_shows_what_python_predicts(
    trips: Path,
    command: Callable[..., Outcome],
    node_modules: Path,
    needs: Callable[..., None],
    serve: Callable[[Path], str],
    tmp_path: Path,
) -> None:
    needs("chromium")
    from playwright.sync_api import sync_playwright

    folder = tmp_path / "page"
    done = command("page", "trips@1", "--folder", folder, ASSAY_NODE_MODULES=node_modules)
    assert done.code == 0, done.err
    assert "trips version 1: 8 files" in done.out
    schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
    assert len(schema["examples"]) == 12
    address = serve(folder)
    asked, faults = [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=chromium_options())
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.goto(address)
        page.wait_for_selector("button:enabled")
        assert page.inner_text("h1") == schema["title"]
        assert "Model trips, version 1" in page.inner_text("header")

        page.select_option("#example", "3")
        check(page, trips, schema["examples"][3])
        page.get_by_label("Carrier").select_option("B6")
        page.get_by_label("Origin").select_option("")
        page.get_by_label("Minute").fill("1300")
        page.get_by_label("Distance").fill("")
        page.get_by_label("Weekend").check()
        page.get_by_role("button", name="Predict").click()
        row = {"carrier": "B6", "origin": "", "minute": 1300, "distance": None, "weekend": True}
        check(page, trips, row)

        page.get_by_label("Minute").fill("")  # a whole number is never missing
        assert not page.evaluate("document.getElementById('form').checkValidity()")
        browser.close()
    assert faults == []
    assert {url.startswith((address, "data:")) for url in asked} == {True}


def check(page: Any, version: Path, row: Mapping[str, Any]) -> None:
    """Compare what the page shows with onnxruntime for Python, once it has answered."""
    inputs = {
        "carrier": np.array([row["carrier"]]),
        "origin": np.array([row["origin"]]),
        "minute": np.array([row["minute"]]),
        "distance": np.array([np.nan if row["distance"] is None else row["distance"]]),
        "weekend": np.array([row["weekend"]]),
    }
    want = answers(version / "model.onnx", inputs)
    probability = float(want["probability"][0])
    page.wait_for_function(
        SHOWN,
        arg=probability,
        timeout=5000,
    )
    assert page.inner_text("#label") == str(want["label"][0])
    assert page.locator(".share").nth(1).inner_text() == f"{100 * probability:.1f} %"


def test_a_page_needs_columns_and_an_installation(
    finished: Finished, command: Callable[..., Outcome], node_modules: Path, tmp_path: Path
) -> None:
    connect.cache_clear()
    without = command("page", "digits", ASSAY_HOME=finished.home)
    assert without.code == 2
    assert "ASSAY_NODE_MODULES is not set. Run 'make engines'" in without.err
    empty = command("page", "digits", ASSAY_HOME=finished.home, ASSAY_NODE_MODULES=tmp_path)
    assert empty.code == 2
    assert "ort.wasm.bundle.min.mjs, " in empty.err
    connect.cache_clear()


def test_the_smoke_test_asks_the_engines_of_the_deployment(
    trips: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_SMOKE_ENGINES", "reference")
    assert lab.retrain("trips").tested.engines == ("reference",)
    monkeypatch.setenv("ASSAY_SMOKE_ENGINES", "node")
    with pytest.raises(ConfigError, match="ASSAY_NODE_MODULES is not set"):
        lab.retrain("trips")


def test_a_page_is_made_of_intact_files_alone(
    trips: Path,
    lab: Lab,
    command: Callable[..., Outcome],
    node_modules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (trips / "model.onnx").open("ab") as stream:
        stream.write(b"more")
    monkeypatch.setattr(Registry, "download", lambda *_: trips / "model.onnx")
    done = command("page", "trips@1", "--folder", tmp_path / "p", ASSAY_NODE_MODULES=node_modules)
    assert done.code == 3
    assert "sha256" in done.err
    assert not (tmp_path / "p").exists()
