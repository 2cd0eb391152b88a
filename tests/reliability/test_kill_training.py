"""A few kills at random moments; ``make kill-test`` does thirty."""

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from reliability.kill_training import Outcome, moment, run

KILLS = 5


def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path,
    child_environment: Mapping[str, str],
    prefect_server: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = {"PREFECT_API_URL": prefect_server}
    wrong = run(KILLS, "digits", 1, child_environment, tmp_path, server)
    printed = capsys.readouterr().out
    assert wrong == 0, printed
    assert f"{KILLS} of {KILLS} equal" in printed


def test_any_difference_is_named() -> None:
    one = Outcome("a", "b", (("train_loss", 1, 0.5),), "")
    assert one.differs(Outcome("a", "b", (("train_loss", 1, 0.5),), "epoch 1, step 2")) == []
    other = Outcome("x", "y", (("train_loss", 1, 0.6),), "")
    assert one.differs(other) == ["weights", "onnx", "history"]


def test_moments_are_seen_where_they_happen(tmp_path: Path) -> None:
    during = moment("checkpoint", tmp_path, random.Random(3), 1.0)
    times = random.Random(3).randint(1, 12)
    file = tmp_path / "checkpoints" / "p" / "k" / ".checkpoint-x"
    file.parent.mkdir(parents=True)
    for number in range(1, times + 1):
        assert not next(during)
        file.touch()
        assert next(during) is (number == times)
        file.unlink()
