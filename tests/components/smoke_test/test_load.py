"""Threads, memory, latency and throughput: each check passes the sound and stops the broken."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.smoke_models import raw_model, raw_recorded
from support.smoke_types import Recorded, Smoke

from components.smoke_test.judge import load
from components.smoke_test.judge.golden import Golden
from components.smoke_test.judge.job import Job
from components.smoke_test.judge.session import Subject


def job(**changes: Any) -> Job:
    """A job of which only the bounds matter."""
    bounds = {"p99_ms": np.inf, "rows_per_s": 0.0, "calls": 1000, "round_seconds": 5.0}
    return {**bounds, **changes}  # type: ignore[typeddict-item, return-value]


class Linear:
    """A session that works as the linear model does, by one thread or many."""

    def run(self, names: list[str], feed: Any) -> list[Any]:
        scores = feed["features"] * np.float32(2)
        return [scores if name == "scores" else scores.argmax(axis=1) for name in names]


class Forgetful(Linear):
    """One that keeps its rows in a place that all threads share."""

    def run(self, names: list[str], feed: Any) -> list[Any]:
        self.feed = feed
        time.sleep(0.0005)
        return super().run(names, self.feed)


class Jittery(Linear):
    """One whose last bit depends on how many threads are at it."""

    def run(self, names: list[str], feed: Any) -> list[Any]:
        answers = super().run(names, feed)
        if threading.current_thread() is not threading.main_thread():
            answers[0] = np.nextafter(answers[0], np.float32(np.inf))
        return answers


class Lonely(Linear):
    """One that cannot be called twice at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def run(self, names: list[str], feed: Any) -> list[Any]:
        if not self.lock.acquire(blocking=False):
            raise RuntimeError("busy")
        try:
            time.sleep(0.0005)
            return super().run(names, feed)
        finally:
            self.lock.release()


@pytest.fixture
def subject(
    recorded: Recorded, save_golden: Callable[[Recorded], Path]
) -> Callable[[Any], Subject]:
    return lambda session: Subject(session, Golden(save_golden(recorded)))


def test_threads_that_agree(subject: Callable[[Any], Subject]) -> None:
    assert load.concurrency_faults(subject(Linear()), 5) == []


@pytest.mark.parametrize(
    ("session", "expected"),
    [
        (Forgetful, "differed from a single thread's answers"),
        (Jittery, "8 did not: 'scores' differed"),
        (Lonely, "RuntimeError: busy"),
    ],
)
def test_threads_that_disagree(
    subject: Callable[[Any], Subject], session: Callable[[], Any], expected: str
) -> None:
    (fault,) = load.concurrency_faults(subject(session()), 5)
    assert "8 threads must all get the same answers as one; " in fault
    assert expected in fault


def test_arrays_are_compared_bit_by_bit() -> None:
    numbers, text = np.array([0.0, 1.0]), np.array(["a", "b"], dtype=object)
    assert load.identical(numbers, numbers.copy()) and load.identical(text, text.copy())
    assert not load.identical(numbers, np.array([-0.0, 1.0]))
    assert not load.identical(text, np.array(["a", "c"], dtype=object))
    assert not load.identical(numbers, numbers.astype(np.float32))
    assert not load.identical(numbers, numbers[:1])


def test_memory_that_stays() -> None:
    best = load.single_rows(lambda: os.urandom(8192), job())
    assert best.calls == 1000
    assert load.single_row_faults(best, job()) == []


def test_memory_that_grows_with_every_call() -> None:
    kept: list[bytes] = []
    best = load.single_rows(lambda: kept.append(os.urandom(8192)), job())
    assert len(kept) == load.WARM_UPS + 3 * 1000
    (fault,) = load.single_row_faults(best, job())
    assert "memory must not grow by more than 2097152 bytes over 1000 calls; it grew by" in fault
    assert 6_000_000 < best.growth_bytes < 16_000_000


def test_memory_taken_once_is_no_growth() -> None:
    kept: list[bytes] = []
    calls = itertools.count()

    def cache() -> None:
        if next(calls) == load.WARM_UPS + 500:
            kept.append(os.urandom(16 << 20))

    best = load.single_rows(cache, job())
    assert kept and best.growth_bytes <= load.GROWTH_BYTES


def test_memory_without_proc(tmp_path: Path) -> None:
    now, peak = load.resident_bytes(), load.resident_bytes(tmp_path / "statm")
    assert now > 0 and peak > 0
    assert now <= peak * 1.1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """A clock that only moves when it is told to."""
    now = [0.0]

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(load.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(load.time, "perf_counter_ns", lambda: round(now[0] * 1e9))
    return pass_by


def test_latency_is_that_of_the_calls(clock: Callable[[float], None]) -> None:
    laps = itertools.cycle([0.001] * 60 + [0.002] * 38 + [0.010] * 2)
    best = load.single_rows(lambda: clock(next(laps)), job())
    assert (best.p50_ms, best.p95_ms) == pytest.approx((1, 2))
    assert best.p99_ms == pytest.approx(10)
    assert load.single_row_faults(best, job(p99_ms=10.5)) == []
    (fault,) = load.single_row_faults(best, job(p99_ms=10))
    assert "must stay below 10 ms; measured 10 ms, the best of 3 rounds of 1000 calls" in fault


def test_one_noisy_round_rejects_nothing(clock: Callable[[float], None]) -> None:
    calls = itertools.count()

    def call() -> None:
        clock(0.050 if next(calls) < load.WARM_UPS + 1000 else 0.001)

    bounds = job(p99_ms=5, round_seconds=1e9)
    best = load.single_rows(call, bounds)
    assert next(calls) == load.WARM_UPS + 2000
    assert load.single_row_faults(best, bounds) == []


def test_a_slow_model_is_called_less_often(clock: Callable[[float], None]) -> None:
    assert load.single_rows(lambda: clock(0.1), job(round_seconds=3.05)).calls == 31
    assert load.single_rows(lambda: clock(10), job()).calls == load.FEWEST_CALLS


def test_throughput_counts_rows(
    subject: Callable[[Any], Subject], clock: Callable[[float], None]
) -> None:
    class Slow(Linear):
        def run(self, names: list[str], feed: Any) -> list[Any]:
            assert feed["features"].shape == (1024, 3)
            clock(0.5)
            return super().run(names, feed)

    measured = load.throughput(subject(Slow()), job(rows_per_s=2049))
    assert measured == pytest.approx(2048)
    assert load.throughput_faults(measured, job(rows_per_s=2048)) == []
    (fault,) = load.throughput_faults(measured, job(rows_per_s=2049))
    assert "at least 2049 rows a second must be answered in batches of 1024" in fault
    assert "measured 2.05e+03, the best of 3 rounds" in fault


def test_budget_of_a_real_model(tmp_path: Path, smoke: Smoke, reject: Callable[..., str]) -> None:
    path = tmp_path / "raw.onnx"
    path.write_bytes(raw_model())
    report = smoke(path, raw_recorded(), p99_ms=20_000, rows_per_s=1)
    assert report.p99_ms < 20_000 and report.rows_per_s > 1
    message = reject(path, raw_recorded(), p99_ms=1e-6, rows_per_s=1e12)
    assert "many calls: p99 of calls with one row must stay below 1e-06 ms; measured" in message
    assert "throughput: at least 1e+12 rows a second must be answered" in message
