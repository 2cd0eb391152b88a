"""Train as a stage: how its MLflow run ends when training does not."""

from datetime import date
from typing import Any

import pytest

from components.errors import ConfigError, GateError
from tasks.plan import plan
from tasks.resume import find_record
from tasks.train import train

AS_OF = date(2014, 1, 1)


def test_loss_that_is_not_finite_is_a_gates_no(bench: Any) -> None:
    job = plan("exploding", AS_OF, 0, ["learning_rate=1e30"], False)
    with pytest.raises(GateError, match="loss must stay finite"):
        train.fn(job)
    (run,) = bench.runs("exploding")
    assert run.info.status == "FAILED"
    assert run.data.tags["assay.decision"] == "rejected"
    assert bench.versions("exploding") == {}


def test_interrupted_training_is_killed_in_mlflow(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tasks.training

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks.training, "run_training", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.fn(plan("interrupted", AS_OF, 0, [], False))
    (run,) = bench.runs("interrupted")
    assert run.info.status == "KILLED"
    assert list((bench.home / "work").glob("train-*")) == []


def test_run_of_a_dead_process_is_closed_by_the_next_plan(bench: Any) -> None:
    import subprocess
    import sys

    from components.adapters.mlflow_tracking import connect
    from components.settings import load_settings

    tracking = connect(load_settings())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lost = tracking.start_run("orphaned", "lost", {}, {})
    tracking.tag(lost, {"pid": str(dead.pid)})
    alive = tracking.start_run("orphaned", "alive", {}, {})
    plan("orphaned", AS_OF, 0, [], False)
    assert bench.client.get_run(lost).info.status == "KILLED"
    assert bench.client.get_run(alive).info.status == "RUNNING"
    tracking.finish(alive, "FINISHED")


def test_record_of_a_stage_is_found_again(bench: Any) -> None:
    from components.records import TrainedModel

    trained = train.fn(plan("recorded", AS_OF, 0, [], False))
    assert find_record(TrainedModel, "train", trained.run_id) == trained
    for run_id, stage in ((trained.run_id, "validate"), ("0" * 32, "train"), ("", "train")):
        with pytest.raises(ConfigError, match="run_id must be an MLflow run"):
            find_record(TrainedModel, stage, run_id)
