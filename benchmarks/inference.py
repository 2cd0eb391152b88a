"""Latency and throughput of a model's network: onnxruntime against PyTorch, eager and compiled.

Every contender is given the same prepared rows and a fixed number of threads, and gives NumPy
arrays; one whose answers differ from the module's ends the benchmark with status 1. Contenders take
turns within a round, each round in another order. A ratio says how many times as fast as eager
PyTorch one is, by the medians of one round; the best call is what a busy machine disturbs least.

The line to quote is ``onnxruntime``, with the options of assay's own sessions: threads spin within
a call and sleep between calls. The other two always spin, which is onnxruntime's default, or never:
with one thread nobody waits; with two, a thread that sleeps has to be woken for every operator,
which takes about as long as a small product.

``--extra NAME=MODEL.onnx,GOLDEN.npz`` also times another file on its golden rows, for example the
registered one, which reads raw columns. Its ratio includes work that the others do not do.

Usage: python benchmarks/inference.py [--cases flights,digits] [--batches 1,256,1024]
    [--threads 1,2] [--rounds N] [--home FOLDER] [--json PATH] [--no-compile] [--quick]
    [--extra NAME=MODEL.onnx,GOLDEN.npz]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from inference_cases import (
    EAGER,
    ORT,
    ROWS,
    Call,
    Case,
    contenders,
    load_case,
    onnxruntime_shares,
    torch_shares,
)

AIMS = {1: 5.0, 1024: 1.0}
"""How many times as fast as eager PyTorch the flights model wants to be, by batch."""

TOLERANCE = 1e-4
_WARM_UPS = 30
_CALLS = {1: 300, 256: 60}
_FEWEST_CALLS = 20


@dataclass
class Result:
    """Seconds of every call of one contender, and its ratio to eager PyTorch in each round."""

    case: str
    threads: int
    batch: int
    contender: str
    seconds: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over the rounds: how many times as fast as eager PyTorch."""
        return statistics.median(self.ratios)

    def quantile(self, share: float) -> float:
        """Microseconds that this share of the calls stay below."""
        return float(np.quantile(self.seconds, share)) * 1e6

    def figures(self) -> dict[str, object]:
        """What is kept of it."""
        return {
            "case": self.case,
            "threads": self.threads,
            "batch": self.batch,
            "contender": self.contender,
            "p50_us": self.quantile(0.5),
            "p99_us": self.quantile(0.99),
            "best_us": self.quantile(0.0),
            "ratio": self.ratio,
            "ratios": self.ratios,
        }


def measure(case: Case, threads: int, batch: int, options: argparse.Namespace) -> list[Result]:
    """Let every contender answer the same batch in every round."""
    calls = contenders(case, batch, threads, compiled=options.compile)
    refuse_others(case, calls)
    results = {name: Result(case.name, threads, batch, name) for name in calls}
    count = 5 if options.quick else _CALLS.get(batch, _FEWEST_CALLS)
    for call in calls.values():
        seconds_of(call, 3 if options.quick else _WARM_UPS)
    names = list(calls)
    for turn in range(options.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = seconds_of(calls[name], count)
            results[name].seconds += seconds
            results[name].medians.append(statistics.median(seconds))
    for result in results.values():
        pairs = zip(results[EAGER].medians, result.medians, strict=True)
        result.ratios = [eager / own for eager, own in pairs]
    return list(results.values())


def seconds_of(call: Call, count: int) -> list[float]:
    """Seconds of each of so many calls."""
    found = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found


def refuse_others(case: Case, calls: Mapping[str, Call]) -> None:
    """End the benchmark if a contender answers something else than the module."""
    wanted = calls[EAGER]()
    for name in calls.keys() - {EAGER, *case.extra}:
        pairs = zip(calls[name](), wanted, strict=True)
        gap = max(float(np.abs(np.subtract(a, b, dtype=np.float64)).max()) for a, b in pairs)
        if not gap <= TOLERANCE:
            sys.exit(
                f"{case.name}: {name} must answer as the module does, within {TOLERANCE}; it is "
                f"{gap:.3g} off"
            )


def print_table(case: str, results: Sequence[Result]) -> None:
    """One row per contender, batch and number of threads."""
    print(f"\n{case}\n")
    print("| threads | batch | contender | best µs | p50 µs | p99 µs | rows/s | ratio | spread |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for result in results:
        p50 = result.quantile(0.5)
        print(
            f"| {result.threads} | {result.batch} | {result.contender} | "
            f"{result.quantile(0.0):,.1f} | {p50:,.1f} | "
            f"{result.quantile(0.99):,.1f} | {result.batch / p50 * 1e6:,.0f} | "
            f"{result.ratio:.2f} | {min(result.ratios):.2f} to {max(result.ratios):.2f} |"
        )


def explain(case: Case, quick: bool) -> None:
    """Say where the time of a large batch goes, by each engine's own profiler."""
    calls = 5 if quick else 100
    sides = (
        ("onnxruntime", onnxruntime_shares(case, ROWS, calls)),
        ("PyTorch", torch_shares(case, ROWS, calls)),
    )
    for engine, shares in sides:
        largest = ", ".join(f"{name} {share:.0%}" for name, share in [*shares.items()][:5])
        print(f"\nBatch {ROWS} on one thread, {engine}: {largest}.")


def judge_aims(results: Sequence[Result]) -> list[str]:
    """Say where the flights model misses its aims."""
    return [
        f"{r.case} at batch {r.batch}, {r.threads} threads: {r.ratio:.2f}, aim {AIMS[r.batch]}"
        for r in results
        if r.case == "flights" and r.contender == ORT and r.ratio < AIMS.get(r.batch, 0.0)
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="flights,digits")
    parser.add_argument("--batches", default="1,256,1024")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--home", type=Path, help="state folder in which prepared rows are kept")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--quick", action="store_true", help="few calls, to see that it works")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME=MODEL,GOLDEN")
    options = parser.parse_args(arguments)
    options.cases = options.cases.split(",")
    try:
        options.batches = [int(size) for size in options.batches.split(",")]
        options.threads = [int(count) for count in options.threads.split(",")]
        named = [entry.split("=", 1) for entry in options.extra]
        options.extra = {
            name: tuple(Path(part) for part in paths.split(",", 1)) for name, paths in named
        }
    except ValueError:
        parser.error("batches and threads are numbers, and extra is NAME=MODEL.onnx,GOLDEN.npz")
    if min(options.rounds, *options.batches, *options.threads) < 1:
        parser.error("rounds, batches and threads must be 1 or more")
    if max(options.batches) > ROWS:
        parser.error(f"batches must be {ROWS} or less")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table per case, and say which aims hold."""
    options = parse(arguments)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, PyTorch "
        f"{torch.__version__}, onnxruntime {onnxruntime.__version__}, {options.rounds} rounds"
    )
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="inference-") as temporary:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(temporary) / "compiled"))
        for name in options.cases:
            case = load_case(
                name, options.home or Path(temporary) / "home", options.extra, options.quick
            )
            found = [
                result
                for threads in options.threads
                for batch in options.batches
                for result in measure(case, threads, batch, options)
            ]
            print_table(name, found)
            explain(case, options.quick)
            results += found
    if options.json:
        figures = [result.figures() for result in results]
        options.json.write_text(json.dumps({"results": figures}, indent=1) + "\n")
    missed = judge_aims(results)
    verdict = f"missed: {'; '.join(missed)}" if missed else "holds"
    print(f"\nAim (flights: 5 times as fast as eager at batch 1, no slower at 1024): {verdict}")


if __name__ == "__main__":
    main()
