"""Kills ``assay run`` with SIGKILL at random moments and runs it again until it completes.

Weights, metric history and ONNX file must be those of a run that nobody disturbed, every time.
The moments are drawn in turn from four kinds: during a step, while a checkpoint is being written,
when a stage has just ended, and anywhere.

Usage: python tests/reliability/kill_training.py [--kills N] [--pipeline NAME] [--seed N]
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("step", "checkpoint", "between", "anywhere")
STAGES = ("train", "validate", "export", "register", "smoke_test")
COMPARED = ("train_loss", "validation_loss", "learning_rate", "gradient_norm")
LONGEST_S = 360.0
_LOOK_S = 0.0005


@dataclass(frozen=True)
class Outcome:
    """What a completed run came to, and where it went on."""

    weights: str
    onnx: str
    history: tuple[tuple[str, int, float], ...]
    resumed: str

    def differs(self, other: "Outcome") -> list[str]:
        """Names of what is not equal."""
        return [n for n in ("weights", "onnx", "history") if getattr(self, n) != getattr(other, n)]


class Trial:
    """One home, in which a run is killed and run again.

    Args:
        home: The state folder.
        pipeline: What is run.
        environment: Of the command.
    """

    def __init__(self, home: Path, pipeline: str, environment: Mapping[str, str]) -> None:
        self.home = home
        self._pipeline = pipeline
        self._environment = {
            **environment,
            "ASSAY_HOME": str(home),
            "ASSAY_CHECKPOINT_EVERY_S": "0.25",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> "subprocess.Popen[str]":
        """Start the command."""
        return subprocess.Popen(
            [Path(sys.executable).with_name("assay"), "run", self._pipeline, "--json"],
            cwd=self.home.parent,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def complete(self) -> Outcome:
        """Run to the end and read what was kept."""
        process = self.start()
        out, _ = process.communicate(timeout=LONGEST_S)
        if process.returncode != 0:
            raise SystemExit(f"the command ended with {process.returncode} in {self.home}")
        summary = json.loads(out.splitlines()[-1])
        return self._outcome(summary["mlflow_run_id"], summary["onnx_sha256"])

    def _outcome(self, run_id: str, onnx: str) -> Outcome:
        (record,) = (self.home / "mlflow").glob(
            f"artifacts/*/{run_id}/artifacts/records/train.json"
        )
        weights = json.loads(record.read_bytes())["weights"]["sha256"]
        marks = ",".join("?" * len(COMPARED))
        with closing(sqlite3.connect(self.home / "mlflow" / "mlflow.db")) as database:
            history = database.execute(
                f"SELECT key, step, value FROM metrics WHERE run_uuid = ? AND key IN ({marks}) "
                "ORDER BY key, step, value",
                (run_id, *COMPARED),
            ).fetchall()
            tags = database.execute(
                "SELECT value FROM tags WHERE run_uuid = ? AND key = 'assay.resumed_at'", (run_id,)
            ).fetchall()
        return Outcome(weights, onnx, tuple(history), tags[0][0] if tags else "")

    def kill_at(self, moment: Iterator[bool]) -> bool:
        """Start the command and kill it at the moment; False if it had ended before."""
        process = self.start()
        deadline = time.monotonic() + LONGEST_S
        while process.poll() is None and not next(moment):
            if time.monotonic() > deadline:
                raise SystemExit(f"the moment to kill never came in {self.home}")
            time.sleep(_LOOK_S)
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return not ended


def after(seconds: float) -> Iterator[bool]:
    """True once so much time has gone by."""
    due = time.monotonic() + seconds
    while True:
        yield time.monotonic() >= due


def once(happened: Callable[[], bool], times: int = 1) -> Iterator[bool]:
    """True when something has begun to be so for the n-th time."""
    before, seen = False, 0
    while True:
        now = happened()
        seen += now and not before
        before = now
        yield seen >= times


def then(first: Iterator[bool], second: Callable[[], Iterator[bool]]) -> Iterator[bool]:
    """The second moment, counted from the first."""
    while not next(first):
        yield False
    yield from second()


def moment(kind: str, home: Path, generator: random.Random, seconds: float) -> Iterator[bool]:
    """When to kill.

    Args:
        kind: One of :data:`KINDS`.
        home: The state folder, which is watched.
        generator: Draws the moment.
        seconds: How long a whole run takes.
    """

    def writing() -> bool:
        return any((home / "checkpoints").glob("*/*/.checkpoint-*"))

    def begun() -> bool:
        return any((home / "checkpoints").glob("*/*/checkpoint-*.json"))

    def at_work(stage: str) -> Callable[[], bool]:
        return lambda: any((home / "work").glob(f"{stage}-*"))

    match kind:
        case "step":
            return then(once(begun), lambda: after(generator.uniform(0, 1.5)))
        case "checkpoint":
            return once(writing, generator.randint(1, 12))
        case "between":
            stage = at_work(generator.choice(STAGES))
            return then(once(stage), lambda: once(lambda: not stage()))
    return after(generator.uniform(0.5, seconds))


def strip(home: Path) -> None:
    """Leave only what spares time: prepared data and Prefect's database without results."""
    for name in ("checkpoints", "mlflow", "work", "logs", "prefect/storage"):
        shutil.rmtree(home / name, ignore_errors=True)
    for snapshots in (home / "data").glob("*/snapshots"):
        shutil.rmtree(snapshots)


def run(
    kills: int,
    pipeline: str,
    seed: int,
    environment: Mapping[str, str],
    place: Path,
    server: Mapping[str, str] | None = None,
) -> int:
    """Kill and compare; gives the number of runs that differed.

    Args:
        kills: How many runs are killed.
        pipeline: What is run.
        seed: Of the moments.
        environment: Of the command.
        place: An empty folder.
        server: Variables that name a Prefect server. It spares the start of an embedded one where
            the kill comes when that has long been running; what is killed anywhere has its own.
    """
    generator = random.Random(seed)
    template = place / "template"
    calm = Trial(template, pipeline, environment)
    began = time.monotonic()
    expected = calm.complete()
    seconds = time.monotonic() - began
    print(
        f"undisturbed: {seconds:.1f} s, weights {expected.weights[:12]}, onnx {expected.onnx[:12]}"
    )
    strip(template)
    wrong = killed = resumed = 0
    while killed < kills:
        kind = KINDS[killed % len(KINDS)]
        home = place / f"home-{killed}"
        shutil.copytree(template, home)
        shared = server if server and kind != "anywhere" else {}
        trial = Trial(home, pipeline, {**environment, **shared})
        if not trial.kill_at(moment(kind, home, generator, seconds)):
            shutil.rmtree(home)
            continue
        killed += 1
        outcome = trial.complete()
        differences = expected.differs(outcome)
        wrong += bool(differences)
        resumed += bool(outcome.resumed)
        verdict = f"DIFFERS: {', '.join(differences)}" if differences else "equal"
        where = f"resumed at {outcome.resumed}" if outcome.resumed else "no checkpoint used"
        print(f"kill {killed:>2} ({kind}): {verdict}; {where}", flush=True)
        shutil.rmtree(home)
    print(f"{killed - wrong} of {killed} equal; {resumed} went on from a checkpoint", flush=True)
    if not resumed:
        print("no run went on from a checkpoint: the kills came at the wrong moments")
        return killed
    return wrong


def main() -> int:
    """Parse, run, and give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--pipeline", default="digits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kept: dict[str, Any] = {k: v for k, v in os.environ.items() if not k.startswith("ASSAY_")}
    with tempfile.TemporaryDirectory(prefix="assay-kill-") as place:
        wrong = run(arguments.kills, arguments.pipeline, arguments.seed, kept, Path(place))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
