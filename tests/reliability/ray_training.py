"""Two Ray workers: the same bytes twice, also when one is killed; close to one process.

Usage: PYTHONPATH=. python tests/reliability/ray_training.py
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import save

from components.adapters.ray_train import run_workers
from components.data.snapshot import Snapshot
from components.data.take import take_snapshot
from components.pipeline import load_pipeline
from components.plan import code_digest, open_source
from components.settings import load_settings
from components.storage import Storage
from components.train.loop import Trained
from components.train.run import run_training
from components.train.together import ENTRY, Assignment, read_result

WORKERS = 2
AS_OF = date(2013, 3, 1)
SETTINGS = {"dropout": 0.0, "epochs": 3, "batch_size": 256, "workers": WORKERS}


def digest(trained: Trained) -> str:
    """sha256 of the weights."""
    return sha256(save(trained.state)).hexdigest()


def train(
    snapshot: Snapshot, folder: Path, name: str, on_report: Callable[[dict[str, Any]], None]
) -> tuple[Trained, int]:
    """Train in two workers; gives the result and how often the group was started."""
    pipeline = load_pipeline("flights")
    config = pipeline.config.model_copy(update=SETTINGS)
    given = Assignment(
        pipeline="flights",
        config=config.model_dump(mode="json"),
        code_digest=code_digest(pipeline),
        snapshots=str(folder / "snapshots"),
        fingerprint=snapshot.fingerprint,
        checkpoints=str(folder / name),
        key=name,
        every_s=0.2,
    )
    starts = run_workers(
        ENTRY,
        given.model_dump_json(),
        workers=WORKERS,
        folder=folder / f"ray-{name}",
        on_report=on_report,
    )
    return read_result(given, "cpu"), starts


def kill_a_worker() -> None:
    """SIGKILL one of this process's training workers."""
    found = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    os.kill(found[0], signal.SIGKILL)


def main() -> int:
    """Train four times and print what was found as JSON."""
    pipeline = load_pipeline("flights")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = open_source(pipeline, load_settings(home=folder / "home"))
        source.prepare()
        place = Storage(folder / "snapshots")
        snapshot = take_snapshot(source, pipeline.features, AS_OF, place)
        config = pipeline.config.model_copy(update=SETTINGS)
        alone, _ = run_training(pipeline, config, snapshot)  # both shards in one process

        calm, starts = train(snapshot, folder, "calm", lambda report: None)
        found["calm"] = {"weights": digest(calm), "starts": starts}
        found["difference"] = max(
            float((calm.state[name] - alone.state[name]).abs().max()) for name in alone.state
        )
        found["loss"] = [calm.best.validation_loss, alone.best.validation_loss]

        killed = threading.Event()

        def kill_once(report: dict[str, Any]) -> None:
            if "epoch" in report and not killed.is_set():
                killed.set()  # the next epoch is under way
                threading.Timer(0.3, kill_a_worker).start()

        began = time.perf_counter()
        disturbed, starts = train(snapshot, folder, "killed", kill_once)
        found["killed"] = {
            "weights": digest(disturbed),
            "starts": starts,
            "history_equal": disturbed.history == calm.history,
            "seconds": round(time.perf_counter() - began, 1),
        }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
