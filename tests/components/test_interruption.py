"""Stopping on a signal, held back until the work can be stopped."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from components.interruption import deferred_signals
from components.storage import Storage
from components.train.checkpoint import Checkpoints

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Signals that come to this process's own handlers, for the time of a test."""
    found: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        found.append(number)

    before = {number: signal.signal(number, note) for number in NUMBERS}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_waits_until_the_block_ends(received: list[int], number: int) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    with deferred_signals() as arrived:
        assert not arrived()
        assert [signal.getsignal(each) for each in NUMBERS] != before
        os.kill(os.getpid(), number)
        assert arrived()
        assert received == []
        assert [signal.getsignal(each) for each in NUMBERS] == before, "for a second one"
    assert received == [number]
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_a_second_signal_acts_at_once(received: list[int]) -> None:
    with deferred_signals() as arrived:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert arrived()
        assert received == [signal.SIGINT]
    assert received == [signal.SIGINT, signal.SIGTERM]


def test_work_that_hangs_is_stopped_where_it_is(received: list[int]) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with deferred_signals(patience_s=0.05) as arrived:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == []
        deadline = time.monotonic() + 10
        while not received:
            assert time.monotonic() < deadline
        assert arrived()
    assert received == [signal.SIGTERM], "once"
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_without_a_signal_nothing_happens(received: list[int]) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    with pytest.raises(ValueError, match="mine"), deferred_signals():
        raise ValueError("mine")
    assert received == []
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_a_signal_is_raised_even_if_the_block_fails(received: list[int]) -> None:
    with pytest.raises(ValueError, match="mine"), deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("mine")
    assert received == [signal.SIGTERM]


def test_outside_of_the_main_thread_nothing_is_done(received: list[int]) -> None:
    before = [signal.getsignal(each) for each in NUMBERS]
    found: list[object] = []

    def work() -> None:
        with deferred_signals() as arrived:
            found.extend([arrived(), [signal.getsignal(each) for each in NUMBERS] == before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, True]
    assert received == []


TRAINING = textwrap.dedent(
    """
    import sys
    from components.interruption import deferred_signals
    from components.storage import Storage
    from components.train.checkpoint import Checkpoints
    from components.train.loop import Reports
    from support.training_lab import change, fit, make_rows

    def steps(done, total):
        if done > 3:
            print("training", flush=True)

    with deferred_signals() as stop:
        kept = Checkpoints(Storage(sys.argv[1]), "key", print)
        config = change(epochs=1_000_000, patience=1_000_000, batch_size=4)
        fit(make_rows(), config, checkpoints=kept, reports=Reports(steps=steps, stop=stop))
    """
)

STUBBORN = textwrap.dedent(
    """
    import time
    from components.interruption import deferred_signals

    with deferred_signals() as stop:
        print("deaf", flush=True)
        while not stop():
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(60)
    """
)


@pytest.fixture
def start(checkout: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: object) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(checkout), str(checkout / "tests")])
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def hear(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, 1)])
def test_training_that_is_told_to_end_leaves_a_checkpoint_first(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: int, code: int
) -> None:
    process = start(TRAINING, tmp_path)
    hear(process, "training")
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, "what the handler of before makes of the signal"
    assert err.rstrip().endswith("KeyboardInterrupt") == (number == signal.SIGINT)
    found = Checkpoints(Storage(tmp_path), "key", print).load()
    assert found is not None
    assert not found.progress.finished
    assert found.progress.step > 0, "in the midst of an epoch"


def test_a_process_that_does_not_look_is_ended_by_a_second_signal(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start(STUBBORN)
    hear(process, "deaf")
    process.send_signal(signal.SIGTERM)
    hear(process, "asked")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - began < 10
