"""The training benchmark runs, and refuses a contender that does not do the work."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEADER = "| case | device | contender | samples/s | ratio to plain loop | spread |"
LIBRARIES = {
    "accelerate": "accelerate",
    "skorch": "skorch",
    "pytorch-lightning": "pytorch_lightning",
}
OURS = ("plain loop", "assay", "DataLoader loop")

Run = Callable[..., "subprocess.CompletedProcess[str]"]

WITH_IDLERS = """
import dataclasses
import contenders, training

def idle(case, laps, epochs):
    model = case.build(laps)
    for _ in range(epochs):
        model(*case.inputs)
        laps.lap()
    return model

def skip(case, laps, epochs):
    few = tuple(tensor[:400] for tensor in case.inputs)
    small = dataclasses.replace(case, inputs=few, labels=case.labels[:400])
    return contenders.train_plain(small, laps, 4 * epochs)

contenders.CONTENDERS |= {"idler": idle, "skipper": skip}
for name in contenders.LIBRARIES:
    del contenders.CONTENDERS[name]
training.main()
"""

HIDE = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import contenders, training
contenders.LIBRARIES = {name: "absent_" + name.replace("-", "_") for name in contenders.LIBRARIES}
training.main()
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the prepared rows are kept from one run to the next."""
    return tmp_path_factory.mktemp("rows")


@pytest.fixture
def run(checkout: Path, rows: Path) -> Run:
    """Run the benchmark at its smallest, as a script or from a program that changes it."""

    def start(*options: str, program: str = "") -> "subprocess.CompletedProcess[str]":
        script = ["-c", program] if program else [str(checkout / "benchmarks" / "training.py")]
        path = [str(checkout), str(checkout / "benchmarks")] if program else [str(checkout)]
        return subprocess.run(
            [sys.executable, *script, "--quick", "--rounds", "1", "--data", str(rows), *options],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


def contenders(out: str) -> list[tuple[str, str]]:
    """Case and contender of every row of the first table."""
    lines = out.splitlines()
    body = lines[lines.index(HEADER) + 2 :]
    table = body[: body.index("")]
    return [
        (cells[1], cells[3]) for cells in ([c.strip() for c in row.split("|")] for row in table)
    ]


def test_every_installed_contender_has_a_row_and_learns(run: Run, tmp_path: Path) -> None:
    from importlib.util import find_spec

    path = tmp_path / "figures.json"
    done = run("--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    installed = [name for name, module in LIBRARIES.items() if find_spec(module)]
    here = {(case, name) for case in ("digits-MLP", "flights") for name in (*OURS, *installed)}
    assert set(contenders(done.stdout)) >= here
    for name in set(LIBRARIES) - set(installed):
        assert f"{name}: not installed" in done.stdout.splitlines()
    assert "\nAim (assay at least 1.3 times the plain loop, ahead of every other): " in done.stdout
    figures = json.loads(path.read_bytes())
    assert {(r["case"], r["contender"]) for r in figures["results"]} >= here
    assert figures["threads"] == 1
    assert figures["devices"]["cpu"]["bandwidth"] > 0
    for result in figures["results"]:
        assert result["speed"] > 0
        assert max(result["losses"]) < (2.0 if result["case"] == "digits-MLP" else 0.69), result
    assert all(row["floor_seconds"] > 0 for row in figures["floors"])


def test_contenders_that_skip_work_are_refused(run: Run) -> None:
    done = run("--cases", "digits", program=WITH_IDLERS)
    assert done.returncode == 1
    first, *reasons = done.stderr.splitlines()
    assert first == "contenders that did not do the work:"
    idler, skipper = (line.removeprefix("digits-MLP on cpu: ") for line in reasons)
    assert idler.startswith("idler must bring the training loss from 2.3")
    assert skipper == "skipper must train on 1797 rows per epoch; it took 400"
    assert "Aim" not in done.stdout


def test_a_bare_machine_measures_what_it_can(run: Run) -> None:
    """Neither Prefect, MLflow nor Ray can be imported there, and no library is compared."""
    done = run("--cases", "digits", program="HIDDEN = ('mlflow', 'prefect', 'ray')\n" + HIDE)
    assert done.returncode == 0, done.stderr
    assert {f"{name}: not installed" for name in LIBRARIES} <= set(done.stdout.splitlines())
    found = {name for _, name in contenders(done.stdout)}
    assert found >= set(OURS)
    assert not found & set(LIBRARIES)


def test_a_case_without_rows_is_skipped_and_named(run: Run, tmp_path: Path) -> None:
    program = "HIDDEN = ('sklearn',)\n" + HIDE
    done = run("--cases", "digits", "--data", str(tmp_path), program=program)
    assert done.returncode == 1
    assert "digits: skipped, its rows cannot be had here: No module named" in done.stdout
    assert "no case has rows here" in done.stderr


@pytest.mark.parametrize("options", [("--cases", "cats"), ("--rounds", "0")])
def test_wrong_options_are_refused(run: Run, options: tuple[str, str]) -> None:
    assert run(*options).returncode == 2
