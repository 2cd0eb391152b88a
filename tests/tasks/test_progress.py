"""Progress of training, on a real Prefect server."""

import logging
import time
from typing import Any

import httpx
import pytest

import tasks.progress
from components.adapters.prefect_runtime import ProgressArtifact
from components.train.checkpoint import Epoch
from tasks.progress import TrainingProgress, progress_bar

pytestmark = pytest.mark.server


def artifacts(server: str, key: str) -> list[dict[str, Any]]:
    body = {"artifacts": {"key": {"any_": [key]}}}
    found: list[dict[str, Any]] = httpx.post(f"{server}/artifacts/filter", json=body).json()
    return found


def in_a_task(work: Any) -> None:
    from prefect import flow, task

    @task(name="work", persist_result=False)
    def inner() -> None:
        work()

    @flow(name="progress", persist_result=False)
    def outer() -> None:
        inner()

    outer()


def test_progress_is_one_artifact_that_moves(
    lab: Any, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.progress, "_ARTIFACT_EVERY_S", 0.0)
    seen = []

    def work() -> None:
        with progress_bar("moving", 4) as bar:
            for done in (1, 3):
                bar.steps(done, 4)
                seen.append([a["data"] for a in artifacts(prefect_server, "moving-training")])
            bar.end()

    in_a_task(work)
    assert seen == [[25.0], [75.0]]
    (shown,) = artifacts(prefect_server, "moving-training")
    assert (shown["type"], shown["data"]) == ("progress", 100.0)


def test_steps_in_between_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []

    class Listener:
        def show(self, percent: float) -> None:
            sent.append(percent)

    bar = TrainingProgress(2, None, Listener())  # type: ignore[arg-type]
    bar.steps(1, 4)
    assert sent == []
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2.5)
    bar.steps(2, 4)
    bar.steps(3, 4)
    assert sent == [50.0]


def test_a_server_that_refuses_costs_the_bar_and_is_told_once(
    lab: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import prefect.artifacts

    asked = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise httpx.ConnectError("nobody is there")

    monkeypatch.setattr(prefect.artifacts, "create_progress_artifact", refuse)

    def work() -> None:
        artifact = ProgressArtifact("refused", "what is refused")
        artifact.show(1.0)
        artifact.show(2.0)

    in_a_task(work)
    assert len(asked) == 1
    told = [r.getMessage() for r in caplog.records if "progress of training" in r.getMessage()]
    assert told == ["Prefect does not take the progress of training: nobody is there"]


def test_outside_of_runs_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    import prefect.artifacts

    monkeypatch.setattr(prefect.artifacts, "create_progress_artifact", None)
    ProgressArtifact("nowhere", "not shown").show(50.0)


def test_epochs_are_logged_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "assay"), progress_bar("quiet", 3) as bar:
        epoch = Epoch(
            number=2, train_loss=0.5, validation_loss=0.25, learning_rate=0.1, gradient_norm=1.0
        )
        bar.epoch(epoch, logging.getLogger("assay"))
    assert "Epoch 2 of at most 3: training loss 0.5000, validation loss 0.2500" in caplog.text
