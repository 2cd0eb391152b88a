"""Golden rows come back as they were, from equal bytes, or not at all."""

import hashlib
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from components.contract import Arrays
from components.errors import DataError, InfrastructureError
from components.export.golden import read_golden, write_golden

INPUTS: Arrays = {
    "numeric": np.array([[1.5, np.nan], [-0.0, np.inf]], np.float32),
    "categorical": np.arange(4).reshape(2, 2),
}
OUTPUTS: Arrays = {"logits": np.array([[0.25], [1e-30]], np.float32)}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "golden.npz"
    write_golden(path, INPUTS, OUTPUTS)
    return path


def test_arrays_come_back_bit_for_bit(golden: Path) -> None:
    inputs, outputs = read_golden(golden)
    assert sorted(inputs) == ["categorical", "numeric"]
    assert list(outputs) == ["logits"]
    for name, array in inputs.items():
        assert array.dtype == INPUTS[name].dtype
        assert array.tobytes() == INPUTS[name].tobytes()
    assert outputs["logits"].tobytes() == OUTPUTS["logits"].tobytes()


def test_numpy_reads_the_keys(golden: Path) -> None:
    with np.load(golden, allow_pickle=False) as archive:
        assert sorted(archive.files) == ["input/categorical", "input/numeric", "output/logits"]


def test_scalars_and_empty_arrays_keep_their_shape(tmp_path: Path) -> None:
    path = tmp_path / "g.npz"
    write_golden(path, {"x": np.float32(2.0).reshape(())}, {"y": np.zeros((0, 3), np.float32)})
    inputs, outputs = read_golden(path)
    assert inputs["x"].shape == ()
    assert outputs["y"].shape == (0, 3)


def test_bytes_depend_on_values_alone(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    other = tmp_path / "other.npz"
    turned = {name: np.asfortranarray(a) for name, a in reversed(INPUTS.items())}
    write_golden(other, turned, {k: v.astype(">f4") for k, v in OUTPUTS.items()})
    assert digest(other) == digest(golden)
    write_golden(other, INPUTS, {"logits": OUTPUTS["logits"] + 1})
    assert digest(other) != digest(golden)


def test_nothing_else_is_left_in_the_folder(golden: Path) -> None:
    write_golden(golden, INPUTS, OUTPUTS)
    assert [path.name for path in golden.parent.iterdir()] == ["golden.npz"]


def test_a_failed_write_keeps_the_old_file(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(golden)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("components.export.golden.os.fsync", fail)
    with pytest.raises(InfrastructureError, match="No space left"):
        write_golden(golden, {}, {})
    assert digest(golden) == before
    assert [path.name for path in golden.parent.iterdir()] == ["golden.npz"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="writable at"):
        write_golden(tmp_path / "none" / "g.npz", INPUTS, OUTPUTS)


def test_objects_are_refused_on_writing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="input/x hold Python objects"):
        write_golden(tmp_path / "g.npz", {"x": np.array([{}])}, {})
    assert not list(tmp_path.iterdir())


def test_pickled_objects_are_refused_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "g.npz"
    np.savez(path, **{"input/x": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(DataError, match="archive written by assay"):
        read_golden(path)


@pytest.mark.parametrize("key", ["x", "other/x", "input/", "/x"])
def test_other_keys_are_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "g.npz"
    np.savez(path, **{key: np.zeros(1)})
    with pytest.raises(DataError, match="is not input/<name> or output/<name>"):
        read_golden(path)


def test_a_key_that_comes_twice_is_refused(golden: Path) -> None:
    with zipfile.ZipFile(golden) as archive:
        stored = archive.read("output/logits.npy")
    with zipfile.ZipFile(golden, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("output/logits.npy", stored)
    with pytest.raises(DataError, match="once each"):
        read_golden(golden)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="FileNotFoundError"):
        read_golden(tmp_path / "g.npz")


def test_damage_anywhere_is_refused_or_harmless(golden: Path) -> None:
    whole = golden.read_bytes()
    refused = 0
    for at in range(len(whole)):
        golden.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            inputs, outputs = read_golden(golden)
        except DataError:
            refused += 1
            continue
        read = {**inputs, **outputs}
        wanted = {**INPUTS, **OUTPUTS}
        assert [read[k].tobytes() for k in read] == [wanted[k].tobytes() for k in read]
    assert refused > len(whole) // 3
    for size in range(0, len(whole), 7):
        golden.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_golden(golden)
