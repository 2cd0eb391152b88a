"""The digits: the published images, split by a fixed rule."""

from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pandera.errors import SchemaError
from pandera.pyarrow import Column, DataFrameSchema
from sklearn.datasets import load_digits

from components.data.digits import SCHEMA, DigitsSource
from components.digest import RowDigest
from components.errors import DataError

DAY = date(2014, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    DigitsSource(folder).prepare()
    return folder


def table_of(folder: Path, split: str, day: date = DAY) -> pa.Table:
    return pa.Table.from_batches(DigitsSource(folder).batches(split, day), schema=SCHEMA)


def digest_of(folder: Path, day: date = DAY) -> str:
    rows = RowDigest()
    for split in ("train", "holdout"):
        rows.mark()
        for batch in table_of(folder, split, day).to_batches():
            rows.update(batch)
    return rows.hexdigest()


def test_the_splits_are_the_published_images_cut_by_the_rule(folder: Path) -> None:
    images, digits = load_digits(return_X_y=True)
    seen = [0] * 10
    expected: dict[str, list[int]] = {"train": [], "holdout": []}
    for row, digit in enumerate(digits):
        seen[digit] += 1
        expected["holdout" if seen[digit] % 5 == 0 else "train"].append(row)
    for split, chosen in expected.items():
        table = table_of(folder, split)
        pixels = np.stack(table.column("image").to_numpy())
        np.testing.assert_array_equal(pixels, images[chosen].astype(np.float32))
        assert table.column("digit").to_pylist() == digits[chosen].tolist()
    assert sum(map(len, expected.values())) == 1797


def test_the_published_images_keep_the_declared_checks(folder: Path) -> None:
    schema = DigitsSource(folder).schema()
    assert schema.arrow is SCHEMA
    (check,) = schema.checks["digit"]
    column = Column(pa.int8(), checks=check)
    for split in ("train", "holdout"):
        DataFrameSchema({"digit": column}).validate(table_of(folder, split))
    with pytest.raises(SchemaError, match="in_range"):
        DataFrameSchema({"digit": column}).validate(pa.table({"digit": pa.array([10], pa.int8())}))


def test_every_digit_is_held_out_in_its_share(folder: Path) -> None:
    counts = np.bincount(table_of(folder, "holdout").column("digit").to_numpy(), minlength=10)
    _, digits = load_digits(return_X_y=True)
    assert counts.tolist() == (np.bincount(digits) // 5).tolist()


def test_the_date_makes_no_difference(folder: Path) -> None:
    source = DigitsSource(folder)
    assert digest_of(folder) == digest_of(folder, date(1999, 9, 9))
    assert source.window(DAY) == source.window(date(1999, 9, 9))
    assert source.excluded(DAY) == {}


def test_preparing_twice_writes_once_and_leaves_nothing_else(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "state" / "digits"
    source = DigitsSource(again)
    source.prepare()
    times = {p.name: p.stat().st_mtime_ns for p in again.iterdir()}
    source.prepare()
    assert {p.name: p.stat().st_mtime_ns for p in again.iterdir()} == times
    assert {p.name for p in again.parent.iterdir()} == {"digits", "locks"}
    assert digest_of(folder) == digest_of(again), "a second preparation gives the same rows"


@pytest.mark.parametrize("damage", ["delete", "truncate", "empty", "other"])
def test_a_damaged_file_is_refused_with_the_next_step(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "digits"
    source = DigitsSource(folder)
    source.prepare()
    path = folder / "train.parquet"
    match damage:
        case "delete":
            path.unlink()
        case "truncate":
            path.write_bytes(path.read_bytes()[:-100])
        case "empty":
            path.write_bytes(b"")
        case "other":
            pq.write_table(pa.table({"something": [1]}), path)
    with pytest.raises(DataError, match=r"train\.parquet.*Delete the folder"):
        list(source.batches("train", DAY))
