"""What workers are told, and what is made of what they leave."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from components.data.snapshot import Snapshot
from components.data.take import take_snapshot
from components.errors import ConfigError, InfrastructureError
from components.pipelines.digits import pipeline
from components.plan import DEFAULT_AS_OF, code_digest, open_source
from components.settings import load_settings
from components.storage import Storage
from components.train.run import run_training
from components.train.together import Assignment, read_result, train_worker

CONFIG = pipeline.config.model_copy(update={"epochs": 2, "device": "cpu"})


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    source = open_source(pipeline, load_settings(home=tmp_path / "home"))
    source.prepare()
    return take_snapshot(source, pipeline.features, DEFAULT_AS_OF, Storage(tmp_path / "snapshots"))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def given(snapshot: Snapshot, folder: Path, **changes: Any) -> Assignment:
    values = {
        "pipeline": "digits",
        "config": CONFIG.model_dump(mode="json"),
        "code_digest": code_digest(pipeline),
        "snapshots": str(folder / "snapshots"),
        "fingerprint": snapshot.fingerprint,
        "checkpoints": str(folder / "checkpoints"),
        "key": "key",
        "every_s": 60.0,
    }
    return Assignment.model_validate(values | changes)


def test_what_a_worker_leaves_is_what_training_gives(
    snapshot: Snapshot, tmp_path: Path, alone: None
) -> None:
    reports: list[dict[str, Any]] = []
    assignment = given(snapshot, tmp_path)
    train_worker(assignment.model_dump_json(), reports.append)
    found = read_result(assignment, "cpu")
    expected, _ = run_training(pipeline, CONFIG, snapshot)
    assert found.history == expected.history
    assert found.best == expected.best
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[name], expected.state[name]) for name in found.state)
    assert [r["epoch"] for r in reports if "epoch" in r] == [
        epoch.model_dump() for epoch in expected.history
    ]
    assert reports[-1]["device"] == "cpu"
    assert reports[-1]["environment"]["torch"] == torch.__version__

    again: list[dict[str, Any]] = []
    train_worker(assignment.model_dump_json(), again.append)
    assert [r["resumed"] for r in again if "resumed" in r] == [
        [epoch.model_dump() for epoch in expected.history]
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"code_digest": "0" * 64}, "every worker must have the job's code"),
        ({"fingerprint": "0" * 64}, "ASSAY_SNAPSHOT_ROOT"),
    ],
)
def test_a_worker_with_other_code_or_no_rows_refuses(
    snapshot: Snapshot, tmp_path: Path, alone: None, changes: dict[str, str], words: str
) -> None:
    assignment = given(snapshot, tmp_path, **changes)
    with pytest.raises(ConfigError, match=words):
        train_worker(assignment.model_dump_json(), lambda report: None)
    assert not (tmp_path / "checkpoints").exists()


def test_without_a_finished_checkpoint_there_is_no_result(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    with pytest.raises(InfrastructureError, match="holds no finished one.*every worker"):
        read_result(given(snapshot, tmp_path), "cpu")
