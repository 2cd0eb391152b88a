"""Checkpoints: whole and this job's, or not used at all."""

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from components.storage import Storage
from components.train.checkpoint import Checkpoints, Epoch, Progress, State

EPOCH = Epoch(
    number=1, train_loss=0.1, validation_loss=1 / 3, learning_rate=1e-3, gradient_norm=0.0
)


@contextlib.contextmanager
def small_disk(most: int) -> Iterator[None]:
    """Let the system refuse files of more bytes than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state(epoch: int = 2, step: int = 3, size: int = 4) -> State:
    progress = Progress(
        epoch=epoch,
        step=step,
        loss=0.1 + 0.2,
        norms=(1 / 3, 7),
        history=[EPOCH],
        best=1,
        scaler={"scale": 65536.0, "growth_interval": 2000},
        python=[3, [1, 2, 2**32 - 1], None],
        numpy=["MT19937", [5, 6], 624, 0, 0.0],
    )
    tensors = {"model/weight": torch.rand(size), "generator/cpu/0": torch.get_rng_state()}
    return State(progress, {**tensors, "model/count": torch.tensor(7), "x": torch.zeros(0, 2)})


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    here = Storage(tmp_path if request.param == "local" else "memory://checkpoint-tests/job")
    here.clear()
    yield here
    here.clear()


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def checkpoints(storage: Storage, warnings: list[str]) -> Checkpoints:
    return Checkpoints(storage, "a" * 64, warnings.append)


def test_what_is_saved_is_loaded(checkpoints: Checkpoints, warnings: list[str]) -> None:
    assert checkpoints.load() is None
    saved = state()
    checkpoints.save(saved)
    found = checkpoints.load()
    assert found is not None
    assert found.progress == saved.progress
    assert found.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(found.tensors[name], saved.tensors[name]) for name in saved.tensors)
    assert type(found.progress.scaler["growth_interval"]) is int, "PyTorch refuses a float"
    assert warnings == []


@pytest.mark.parametrize(
    "places", [[(1, 5), (1, 40), (2, 0)], [(9, 0), (10, 0), (11, 0)], [(9999, 1), (10_000, 0)]]
)
def test_the_latest_of_the_last_two_is_loaded(
    checkpoints: Checkpoints, storage: Storage, places: list[tuple[int, int]]
) -> None:
    for epoch, step in places:
        checkpoints.save(state(epoch, step))
    found = checkpoints.load()
    assert found is not None
    assert (found.progress.epoch, found.progress.step) == places[-1]
    assert len(storage.names()) == 4, "two files each"


def test_what_belongs_to_no_checkpoint_goes(checkpoints: Checkpoints, storage: Storage) -> None:
    storage.write("checkpoint-00000009-0000000000.safetensors", b"its other half never came")
    checkpoints.save(state())
    stem = "checkpoint-00000002-0000000003"
    assert storage.names() == [f"{stem}.json", f"{stem}.safetensors"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("torn tensors", "torn or have been changed"),
        ("no tensors", "safetensors"),
        ("one bit", "torn or have been changed"),
        ("edited", "has been changed"),
        ("resealed", "has been changed"),
        ("no json", "damaged"),
        ("another shape", "damaged"),
        ("foreign", "belongs to the job bbbbbbbbbbbb"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_warning(
    checkpoints: Checkpoints, storage: Storage, warnings: list[str], damage: str, words: str
) -> None:
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    stem = "checkpoint-00000002-0000000003"
    tensors, text = storage.read(f"{stem}.safetensors"), storage.read(f"{stem}.json").decode()
    if damage == "torn tensors":
        storage.write(f"{stem}.safetensors", tensors[:-1])
    elif damage == "no tensors":
        storage.delete(f"{stem}.safetensors")
    elif damage == "one bit":
        storage.write(f"{stem}.safetensors", tensors[:-1] + bytes([tensors[-1] ^ 1]))
    elif damage == "edited":
        storage.write(f"{stem}.json", text.replace('"best":1', '"best":0').encode())
    elif damage == "resealed":
        record = json.loads(text) | {"sha256": "0" * 64}
        storage.write(f"{stem}.json", json.dumps(record).encode())
    elif damage == "no json":
        storage.write(f"{stem}.json", text[:-20].encode())
    elif damage == "another shape":
        storage.write(f"{stem}.json", b'{"key": 1}')
    else:
        Checkpoints(storage, "b" * 64, warnings.append).save(state(2))
    found = checkpoints.load()
    assert found is not None
    assert found.progress.epoch == 1
    (warning,) = warnings
    assert words in warning
    assert stem in warning
    assert "Training goes on from the one before it" in warning


def test_without_a_whole_one_training_starts_anew(
    checkpoints: Checkpoints, storage: Storage, warnings: list[str]
) -> None:
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    for name in storage.names():
        storage.write(name, b"{")
    assert checkpoints.load() is None
    assert len(warnings) == 2


def test_tensors_without_a_record_are_no_checkpoint(
    checkpoints: Checkpoints, storage: Storage, warnings: list[str]
) -> None:
    checkpoints.save(state())
    storage.delete("checkpoint-00000002-0000000003.json")
    assert checkpoints.load() is None
    assert warnings == []


def test_a_full_disk_leaves_the_earlier_ones_and_later_nothing_of_the_failed(
    tmp_path: Path,
) -> None:
    storage, warnings = Storage(tmp_path), list[str]()
    checkpoints = Checkpoints(storage, "a" * 64, warnings.append)
    checkpoints.save(state(1))
    before = {name: storage.read(name) for name in storage.names()}
    with small_disk(10_000), pytest.raises(OSError, match="File too large"):
        checkpoints.save(state(2, size=10_000))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    found = checkpoints.load()
    assert found is not None
    assert found.progress.epoch == 1
    checkpoints.save(state(3))
    assert {name[:19] for name in storage.names()} == {"checkpoint-00000001", "checkpoint-00000003"}


def test_what_a_failed_save_left_makes_room_before_the_next(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors came, their record did not: they may be what fills the disk."""
    checkpoints = Checkpoints(storage, "a" * 64, list[str]().append)
    checkpoints.save(state(1))
    storage.write("checkpoint-00000002-0000000000.safetensors", b"as large as all that is left")
    present: list[list[str]] = []
    write = Storage.write

    def watched(self: Storage, name: str, content: bytes) -> None:
        present.append(self.names())
        write(self, name, content)

    monkeypatch.setattr(Storage, "write", watched)
    checkpoints.save(state(3))
    assert "checkpoint-00000002-0000000000.safetensors" not in present[0]
    assert len(present[0]) == 2
