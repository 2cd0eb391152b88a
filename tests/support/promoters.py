"""Processes that move one model's champion, all at once, or that die while they do.

    python promoters.py crowd MODEL MOVES HOME...       one process for each home
    python promoters.py die HOME WHEN MODEL ...         one for each model, killed where WHEN says:
                                                        before-alias or after-alias

MLflow is imported once, and the processes are forked from there. ``TRACKING_URI`` names a server.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from typing import Any

import mlflow.tracking  # noqa: F401  once for all

from components.adapters.mlflow_ledger import Ledger
from components.adapters.mlflow_registry import Registry
from components.adapters.mlflow_tracking import connect
from components.decide.moves import move, reconcile
from components.errors import ConflictError
from components.settings import Settings, load_settings
from components.state import exclusive


def settings_of(home: str) -> Settings:
    return load_settings(
        home=home, mlflow_tracking_uri=os.environ.get("TRACKING_URI", ""), _env_file=None
    )


def promote(home: str, model: str, versions: list[int], start: Any, results: Any) -> None:
    """Make each version champion in its turn, whoever is champion then."""
    settings = settings_of(home)
    tracking = connect(settings)
    ledger = Ledger(tracking, Registry(tracking, model))
    start.wait()
    conflicts, moved = 0, []
    while versions:
        with exclusive(settings.root, f"promote-{model}"):
            champion = reconcile(ledger).champion
            try:
                entry = move(
                    ledger,
                    expected=champion,
                    to=versions[0],
                    kind="promote",
                    why=f"process {os.getpid()}",
                    who=str(os.getpid()),
                )
            except ConflictError:
                conflicts += 1
                continue
        moved.append([entry.seq, entry.before, versions.pop(0)])
    results.put({"moved": moved, "conflicts": conflicts})


def crowd(model: str, moves: int, homes: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(len(homes)), context.Queue()
    crew = [
        context.Process(
            target=promote,
            args=(home, model, [n * moves + i + 1 for i in range(moves)], start, results),
        )
        for n, home in enumerate(homes)
    ]
    for process in crew:
        process.start()
    began = time.perf_counter()
    found = [results.get(timeout=120) for _ in crew]
    for process in crew:
        process.join()
    assert all(process.exitcode == 0 for process in crew)
    print(json.dumps({"processes": found, "seconds": round(time.perf_counter() - began, 1)}))


def die(home: str, when: str, model: str) -> None:
    """Move to the next version, and be killed on the way."""
    tracking = connect(settings_of(home))
    registry = Registry(tracking, model)
    ledger = Ledger(tracking, registry)
    champion = reconcile(ledger).champion
    original = Registry.set_alias

    def killed(self: Registry, alias: str, version: int) -> None:
        if when == "after-alias":
            original(self, alias, version)
        os.kill(os.getpid(), signal.SIGKILL)

    Registry.set_alias = killed  # type: ignore[method-assign]
    move(
        ledger,
        expected=champion,
        to=(champion or 0) + 1,
        kind="promote",
        why="the last thing it did",
        who="a process that died",
    )


def die_each(home: str, cases: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    codes = []
    for when, model in zip(cases[::2], cases[1::2], strict=True):
        process = context.Process(target=die, args=(home, when, model))
        process.start()
        process.join()
        codes.append(process.exitcode)
    print(json.dumps(codes))


if __name__ == "__main__":
    mode, first, *rest = sys.argv[1:]
    if mode == "crowd":
        crowd(first, int(rest[0]), rest[1:])
    else:
        die_each(first, rest)
