"""What workers report, on its way to MLflow."""

import logging
from typing import Any

import pytest

from components.train.checkpoint import Epoch
from tasks.training import _Watch


class Space:
    """Takes what would go to MLflow."""

    def __init__(self) -> None:
        self.run_id = "run"
        self.tracking = self
        self.log = logging.getLogger("assay")
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int = 0) -> None:
        self.logged.append((step, metrics))


class Bar:
    """Takes what would be shown."""

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def steps(self, done: int, total: int) -> None:
        self.shown.append((done, total))

    def epoch(self, epoch: Epoch, log: logging.Logger) -> None:
        self.shown.append(epoch.number)


def values(number: int) -> dict[str, float]:
    losses = {"train_loss": 1.0 / number, "validation_loss": 2.0 / number}
    return {"number": number, **losses, "learning_rate": 0.1, "gradient_norm": 1.0}


def test_every_epoch_of_replaced_workers_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    space, bar = Space(), Bar()
    watch = _Watch(space, bar, 100)  # type: ignore[arg-type]
    watch.report({"epoch": values(1)})
    watch.report({"epoch": values(2)})
    watch.report({"steps": [3, 10]})
    watch.report({"resumed": [values(1)]})  # a group that was started again, from epoch 1
    watch.report({"epoch": values(2)})
    watch.report({"epoch": values(3)})
    with caplog.at_level(logging.WARNING, "assay"):
        watch.report({"warning": "a disk is full"})
    watch.report({"environment": {"torch": "2"}, "device": "cuda:0"})
    assert [step for step, _ in space.logged] == [1, 2, 3]
    assert space.logged[2][1]["train_loss"] == pytest.approx(1 / 3)
    assert bar.shown == [1, 2, (3, 10), 2, 3]
    assert "a disk is full" in caplog.text
    assert (watch.device, watch.environment) == ("cuda:0", {"torch": "2"})
