"""Register a candidate at an MLflow server, from a machine of one's own; the last line is JSON.

    register_once.py URI HOME RUN_ID ONNX_FILE MODE [BARRIER PROCESSES]

``race`` waits, once it has found no version, until as many processes as there are have found none;
``crash`` dies when files are uploaded and the version is about to be made; ``crash-after`` when it
is made and not yet settled.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from support.column_model import METADATA, ROWS

from components.adapters.mlflow_registry import Registry
from components.adapters.mlflow_tracking import connect
from components.digest import digest_file
from components.settings import load_settings


def main(uri: str, home: str, run_id: str, onnx_file: str, mode: str, *barrier: str) -> None:
    tracking = connect(load_settings(home=home, mlflow_tracking_uri=uri, _env_file=None))
    registry = Registry(tracking, "once")
    make = tracking.client.create_model_version

    def crash(*args: Any, **kwargs: Any) -> None:
        os._exit(9)

    def crash_after(*args: Any, **kwargs: Any) -> None:
        make(*args, **kwargs)
        os._exit(9)

    wrapped = {"crash": crash, "crash-after": crash_after}
    if mode in wrapped:
        tracking.client.create_model_version = wrapped[mode]
    digest = {"onnx_sha256": digest_file(Path(onnx_file))}
    found = registry.find(digest)
    if mode == "race":
        wait(Path(barrier[0]), int(barrier[1]))
    made = found or registry.create(
        run_id,
        Path(onnx_file),
        metadata=METADATA,
        example=ROWS,
        requirements=["onnxruntime==1.0"],
        tags=digest,
    )
    version = registry.settle(made)
    print(json.dumps({"found": found is not None, "made": made.number, "kept": version.number}))


def wait(folder: Path, processes: int) -> None:
    (folder / str(os.getpid())).touch()
    ends = time.monotonic() + 60
    while len(list(folder.iterdir())) < processes:
        assert time.monotonic() < ends, "the others did not come"
        time.sleep(0.01)


main(*sys.argv[1:])
