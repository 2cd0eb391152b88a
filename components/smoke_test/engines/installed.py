"""What each engine needs on this machine, and what to do where it is missing."""

import shutil
from importlib.util import find_spec
from pathlib import Path

from components.errors import ConfigError
from components.smoke_test.engines.child import ORT_WEB_FILES

NAMES = ("reference", "openvino", "node", "chromium")
"""Every engine beside onnxruntime for Python."""

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def parse_engines(setting: str) -> tuple[str, ...]:
    """Names of engines from the setting ``smoke_engines``, each once.

    Raises:
        ConfigError: A name is unknown.
    """
    names = tuple(dict.fromkeys(name.strip() for name in setting.split(",") if name.strip()))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(
            f"ASSAY_SMOKE_ENGINES must name some of {', '.join(NAMES)}; got {', '.join(unknown)}. "
            "Correct the setting."
        )
    return names


def missing(engine: str, node_modules: Path | None) -> list[str]:
    """What an engine needs and has not, one sentence each; empty if it can run.

    Args:
        engine: One of :data:`NAMES`.
        node_modules: The folder in which npm installed the packages for JavaScript.
    """
    match engine:
        case "reference":
            return _missing_packages("onnx")
        case "openvino":
            return _missing_packages("openvino")
        case "node":
            return [
                *([] if node() else ["node is not on the path; install Node.js 18 or newer"]),
                *_missing_modules(node_modules, "onnxruntime-node/package.json"),
            ]
        case _:
            browser = f"none of {', '.join(_BROWSERS)} is on the path; install Debian's chromium"
            return [
                *_missing_packages("playwright"),
                *([] if chromium() else [browser]),
                *_missing_modules(
                    node_modules, *(f"onnxruntime-web/dist/{f}" for f in ORT_WEB_FILES)
                ),
            ]


def node() -> str | None:
    """The path of Node.js, if it is installed."""
    return shutil.which("node")


def chromium() -> str | None:
    """The path of Chromium or of its sibling, if it is installed."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def _missing_packages(name: str) -> list[str]:
    if find_spec(name) is not None:
        return []
    return [f"the package {name} is not installed; pip install 'assay[engines]'"]


def _missing_modules(node_modules: Path | None, *files: str) -> list[str]:
    step = "run 'make engines' and set ASSAY_NODE_MODULES to the folder that it names"
    if node_modules is None:
        return [f"ASSAY_NODE_MODULES is not set; {step}"]
    absent = [file for file in files if not (node_modules / file).is_file()]
    if absent:
        return [f"{node_modules} has no {absent[0]}; {step}"]
    return []
