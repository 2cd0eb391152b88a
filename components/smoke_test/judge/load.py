"""The model at work: many threads, many calls, and how long they take.

One noisy measurement rejects no model: rounds are repeated while they are outside the bounds, three
times at most, and the best one counts.
"""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .golden import Array, Named
from .job import Job, describe
from .session import Subject

Call = Callable[[], object]

THREADS = 8
CALLS_PER_THREAD = 25
ROUNDS = 3
WARM_UPS = 200
FEWEST_CALLS = 20
WIDE_BATCH = 1024
WIDE_CALLS = 20

GROWTH_BYTES = 2 << 20
"""How much resident memory a round of calls may gain; allocators take it in steps of 1 MiB."""


class Round(NamedTuple):
    """What a round of single-row calls took: bytes of resident memory, and milliseconds."""

    calls: int
    growth_bytes: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


def concurrency_faults(subject: Subject, seconds: float) -> list[str]:
    """Eight threads with rows of their own must get, bit for bit, what one thread gets."""
    rows = np.arange(min(64, subject.golden.rows))
    feeds = [subject.golden.feed(np.roll(rows, -turn)) for turn in range(THREADS)]
    wanted = [subject.run(feed) for feed in feeds]
    start, faults = threading.Barrier(THREADS), list[str]()
    deadline = time.perf_counter() + seconds

    def work(feed: Named, want: Named) -> None:
        try:
            start.wait(seconds)
            for _ in range(CALLS_PER_THREAD):
                got = subject.run(feed)
                different = [repr(name) for name in want if not identical(got[name], want[name])]
                if different:
                    faults.append(f"{', '.join(different)} differed from a single thread's answers")
                if different or time.perf_counter() > deadline:
                    return
        except Exception as error:
            faults.append(describe(error))

    threads = [
        threading.Thread(target=work, args=pair, daemon=True)
        for pair in zip(feeds, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not faults:
        return []
    return [
        f"{THREADS} threads must all get the same answers as one; {len(faults)} did not: "
        f"{faults[0]}. Find what the model keeps between calls"
    ]


def identical(got: Array, want: Array) -> bool:
    """Compare two arrays bit for bit; text by its characters."""
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return False
    return bool((got == want).all()) if got.dtype == object else got.tobytes() == want.tobytes()


def single_rows(call: Call, job: Job) -> Round:
    """Call with one row, again and again; the least growth and the best latencies of the rounds."""
    for _ in range(min(WARM_UPS, job["calls"])):
        call()
    rounds: list[Round] = []
    while len(rounds) < ROUNDS:
        rounds.append(_round(call, job))
        best = Round(*(min(values) for values in zip(*rounds, strict=True)))
        if best.growth_bytes <= GROWTH_BYTES and best.p99_ms < job["p99_ms"]:
            break
    return best


def single_row_faults(best: Round, job: Job) -> list[str]:
    """Compare a round with the bounds on memory and latency."""
    faults = []
    if best.growth_bytes > GROWTH_BYTES:
        faults.append(
            f"memory must not grow by more than {GROWTH_BYTES} bytes over {best.calls} calls; it "
            f"grew by {best.growth_bytes} in each of {ROUNDS} rounds. Find what the engine keeps"
        )
    if best.p99_ms >= job["p99_ms"]:
        faults.append(
            f"p99 of calls with one row must stay below {job['p99_ms']:g} ms; measured "
            f"{best.p99_ms:.3g} ms, the best of {ROUNDS} rounds of {best.calls} calls. Make the "
            "model smaller, or raise the budget's p99_ms"
        )
    return faults


def throughput(subject: Subject, job: Job) -> float:
    """Rows a second in batches of 1024, the best of the rounds."""
    feed = subject.golden.feed(subject.golden.tiled(WIDE_BATCH)[0])
    best = 0.0
    for _ in range(ROUNDS):
        calls, started, spent = 0, time.perf_counter(), 0.0
        while calls < WIDE_CALLS and spent < job["round_seconds"] / 2:
            subject.run(feed)
            calls, spent = calls + 1, time.perf_counter() - started
        best = max(best, calls * WIDE_BATCH / spent)
        if best >= job["rows_per_s"]:
            break
    return best


def throughput_faults(rows_per_s: float, job: Job) -> list[str]:
    """Compare a throughput with the budget."""
    if rows_per_s >= job["rows_per_s"]:
        return []
    return [
        f"at least {job['rows_per_s']:g} rows a second must be answered in batches of "
        f"{WIDE_BATCH}; measured {rows_per_s:.3g}, the best of {ROUNDS} rounds. Make the model "
        "smaller, or lower the budget's rows_per_s"
    ]


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int:
    """Memory of this process that lies in RAM; where /proc is missing, the most it ever was."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_bytes()


def _peak_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _round(call: Call, job: Job) -> Round:
    laps = np.ones(job["calls"])  # all of its pages are written to before memory is looked at
    gc.collect()
    before = resident_bytes()
    begun = time.perf_counter()
    for done in range(job["calls"]):
        started = time.perf_counter_ns()
        call()
        laps[done] = (time.perf_counter_ns() - started) / 1e6
        if done + 1 >= FEWEST_CALLS and time.perf_counter() - begun > job["round_seconds"]:
            break
    gc.collect()
    growth = max(0, resident_bytes() - before)
    p50_ms, p95_ms, p99_ms = np.percentile(laps[: done + 1], [50, 95, 99])
    return Round(done + 1, growth, float(p50_ms), float(p95_ms), float(p99_ms))
