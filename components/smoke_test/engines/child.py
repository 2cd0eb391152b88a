"""The child of the engines that Python drives: ``reference``, ``openvino`` and ``chromium``.

Run as ``python -I child.py`` with a :class:`Job` as JSON on stdin; its :class:`Answer` is written
to a file. It is stand-alone: nothing of assay is imported here.

Legend: N = golden rows.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.generic]

ORT_WEB_FILES = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
"""What a page needs of onnxruntime-web's folder ``dist`` to run on the processor."""

QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
"""Options with which Chromium asks nothing of any host but this one."""

_HERE = Path(__file__).parent
_KINDS = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm"}
# The browser itself holds the page to its own origin; WebAssembly needs its own permission.
_POLICY = "default-src 'self' 'wasm-unsafe-eval'"


class Job(TypedDict):
    """Which engine is to answer which rows; ``rows`` are fewer than N where it is slow."""

    engine: str
    model: str
    golden: str
    answer: str
    rows: int | None
    chromium: str
    node_modules: str


class Tensor(TypedDict):
    """One output; numbers are base64 of their little-endian bytes, strings a list."""

    type: str
    shape: list[int]
    data: str | list[str]


class Answer(TypedDict):
    """``broken``: the engine cannot load. ``failure``: it refused. Else outputs by batch."""

    version: NotRequired[str]
    batches: NotRequired[list[dict[str, Tensor]]]
    broken: NotRequired[str]
    failure: NotRequired[str]


class BrokenEngineError(Exception):
    """The engine itself does not work here, whatever the model."""


def main() -> None:
    """Read the job from stdin, answer it, and write the answer to its file."""
    job: Job = json.loads(sys.stdin.buffer.read())
    Path(job["answer"]).write_text(json.dumps(attempt(job)), encoding="utf-8")


def attempt(job: Job) -> Answer:
    """Let the engine answer; whatever it raises is the answer too."""
    try:
        return ANSWERS[job["engine"]](job)
    except (ImportError, BrokenEngineError) as error:
        return {"broken": describe(error)}
    except Exception as error:  # an engine's way to refuse a model
        return {"failure": describe(error)}


def describe(error: Exception) -> str:
    """One bounded line about an exception."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def answer_reference(job: Job) -> Answer:
    """ONNX's own evaluator: NumPy, one operator after the other."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(job["model"], load_external_data=False))

    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        found: Any = evaluator.run(None, dict(feed))
        return dict(zip(evaluator.output_names, found, strict=True))

    return {"version": f"onnx {onnx.__version__}", "batches": in_batches(job, run)}


def answer_openvino(job: Job) -> Answer:
    """OpenVINO on the processor, in float32: it would choose bfloat16 where that is faster."""
    # Without this package openvino takes its own stand-in, which sends nothing anywhere.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(job["model"], "CPU", hints)

    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        found = compiled(dict(feed))
        return {output.get_any_name(): found[output] for output in compiled.outputs}

    version = openvino.__version__.partition("-")[0]
    return {"version": f"openvino {version}", "batches": in_batches(job, run)}


def answer_chromium(job: Job) -> Answer:
    """onnxruntime-web in a page of a headless Chromium, served on this machine alone."""
    from playwright.sync_api import Error, sync_playwright

    web = Path(job["node_modules"]) / "onnxruntime-web" / "dist"
    files = {f"/{name}": _HERE / name for name in ("page.mjs", "answer.mjs", "npz.mjs")}
    files |= {f"/ort/{name}": web / name for name in ORT_WEB_FILES}
    files |= {"/model.onnx": Path(job["model"]), "/golden.npz": Path(job["golden"])}
    with serve(files) as address, sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(
                executable_path=job["chromium"], args=chromium_options()
            )
            page = browser.new_page()
            page.goto(address)
        except Error as error:
            raise BrokenEngineError(f"{job['chromium']}: {error}") from error
        found: Answer = json.loads(page.evaluate("import('./page.mjs').then((m) => m.run())"))
        version = f"{found['version']}, Chromium {browser.version}"
        browser.close()
    return {"version": version, "batches": found["batches"]}


ANSWERS: dict[str, Callable[[Job], Answer]] = {
    "reference": answer_reference,
    "openvino": answer_openvino,
    "chromium": answer_chromium,
}


def in_batches(
    job: Job, run: Callable[[Mapping[str, Array]], Mapping[str, Array]]
) -> list[dict[str, Tensor]]:
    """Answer the first golden row in a batch of its own, then the others in another."""
    import numpy as np

    with np.load(job["golden"], allow_pickle=False) as archive:
        inputs = {
            key.removeprefix("input/"): archive[key]
            for key in archive.files
            if key.startswith("input/")
        }
    batches = []
    for rows in (slice(0, 1), slice(1, job["rows"])):
        outputs = run({name: array[rows] for name, array in inputs.items()})
        batches.append({name: encode(np.asarray(array)) for name, array in outputs.items()})
    return batches


def encode(array: Array) -> Tensor:
    """An output as JSON can hold it."""
    shape = list(array.shape)
    if array.dtype.kind in "UO":
        return {"type": "string", "shape": shape, "data": [str(v) for v in array.ravel().tolist()]}
    little = array.astype(array.dtype.newbyteorder("<"), order="C")
    data = base64.b64encode(little.tobytes()).decode()
    return {"type": array.dtype.name, "shape": shape, "data": data}


def chromium_options() -> list[str]:
    """Options of a Chromium that stays on this machine; as root it starts only unsandboxed."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return [*QUIET, *(["--no-sandbox"] if root else [])]


@contextmanager
def serve(files: Mapping[str, Path]) -> Iterator[str]:
    """Serve these files, an empty page at ``/`` and nothing else on loopback; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = files.get(self.path)
            if path is None and self.path != "/":
                self.send_error(404)
                return
            body = path.read_bytes() if path else b"<!doctype html><title>engine</title>"
            kind = _KINDS.get(path.suffix if path else ".html", "application/octet-stream")
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
