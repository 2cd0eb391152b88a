"""Imports every module of the product, the libraries first, and prints what that changed."""

import importlib
import json
import logging
import os
import pkgutil
import sys
import threading

LIBRARIES = (
    "matplotlib",
    "mlflow",
    "mlflow.onnx",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "prefect",
    "prefect.blocks.core",
    "prefect.events.worker",
    "prefect.main",
    "pyarrow.csv",
    "pyarrow.parquet",
    "pydantic_settings",
    "rich.progress",
    "safetensors.torch",
    "torch",
)
PACKAGES = ("components", "flows", "tasks")
connected: list[str] = []


def listen(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.bind", "subprocess.Popen", "os.fork"):
        connected.append(event)


def state() -> dict[str, object]:
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    return {
        "environment": dict(os.environ),
        "handlers": sorted(
            f"{logger.name}: {handler!r}"
            for logger in loggers
            if isinstance(logger, logging.Logger)
            for handler in logger.handlers
            if not isinstance(handler, logging.NullHandler)
        ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "connected": list(connected),
    }


def names() -> list[str]:
    found = list(PACKAGES)
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        found += [item.name for item in pkgutil.walk_packages(path, package + ".")]
    return found


for library in LIBRARIES:
    importlib.import_module(library)
sys.addaudithook(listen)
before = state()
modules = names()
for module in modules:
    importlib.import_module(module)
print(json.dumps({"before": before, "after": state(), "modules": modules}))
