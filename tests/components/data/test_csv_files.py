"""CSV files: what is read from where, and faults by file, row and column."""

import gzip
from datetime import date
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from components.contract import Split
from components.data.csv_files import CsvSource
from components.data.schema import RowSchema
from components.data.windows import Fraction, Months, Window
from components.errors import ConfigError, ContractError, DataError

NEW_YEAR = date(2014, 1, 1)
SCHEMA = RowSchema(
    pa.schema(
        [
            pa.field("day", pa.date32(), nullable=False),
            pa.field("size", pa.float32()),
            pa.field("word", pa.string()),
            pa.field("label", pa.int8(), nullable=False),
        ]
    )
)
HEADER = "label,day,extra,size,word\n"
NOVEMBER = HEADER + '1,2013-11-05,x,0.1,"a, b"\n0,2013-11-06,y,,\n'
DECEMBER = HEADER + '1,2013-12-01,z,-3,""\n0,2013-12-31,z,nan,c\n0,2014-01-01,z,1,d\n'


def source(path: object, window: Window | None = None, **options: Any) -> CsvSource:
    return CsvSource(str(path), SCHEMA, window or Months("day"), **options)


def rows(made: CsvSource, split: Split = "train", as_of: date = NEW_YEAR) -> list[dict[str, Any]]:
    batches = list(made.batches(split, as_of))
    assert all(batch.schema.equals(SCHEMA.arrow) for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two months, whose names are not in the order in which they are made."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "2.csv").write_text(DECEMBER)
    (tmp_path / "rows" / "1.csv").write_text(NOVEMBER)
    return tmp_path / "rows"


def test_declared_columns_are_read_typed_and_by_window(folder: Path) -> None:
    made = source(folder)
    made.prepare()
    assert made.schema() is SCHEMA
    assert made.window(NEW_YEAR) == "train before 2013-12, hold out 2013-12"
    assert made.excluded(NEW_YEAR) == {}
    assert rows(made) == [
        {"day": date(2013, 11, 5), "size": pytest.approx(0.1), "word": "a, b", "label": 1},
        {"day": date(2013, 11, 6), "size": None, "word": None, "label": 0},
    ]
    held = rows(made, "holdout")
    assert [(row["day"].day, row["word"]) for row in held] == [(1, ""), (31, "c")]
    assert held[1]["size"] != held[1]["size"], "nan is a number, not a missing one"


def test_files_are_read_in_the_order_of_their_names(folder: Path) -> None:
    (folder / "0.csv").write_text(HEADER + "0,2013-11-30,,7,first\n")
    (folder / "nested").mkdir()
    (folder / "nested" / "3.csv").write_text(HEADER + "0,2013-11-30,,7,last\n")
    words = [row["word"] for row in rows(source(folder))]
    assert words == ["first", "a, b", None, "last"]


def test_hidden_unfinished_and_other_files_of_a_folder_do_not_count(folder: Path) -> None:
    for name in (".3.csv", "_4.csv", "notes.txt", "1.csv.crc"):
        (folder / name).write_text("not rows")
    assert len(rows(source(folder))) == 2


def test_one_file_a_glob_and_compression(folder: Path) -> None:
    (folder / "3.csv.gz").write_bytes(gzip.compress(NOVEMBER.encode()))
    assert len(rows(source(folder / "1.csv"))) == 2
    assert len(rows(source(folder / "[13].csv*"))) == 4
    assert len(rows(source(folder / "3.csv.gz"))) == 2
    assert len(rows(source(folder))) == 4


def test_an_object_store_is_read_as_a_folder_is(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/csv-bucket/rows/{path.name}", path.read_bytes())
    splits: tuple[Split, ...] = ("train", "holdout")
    for url in ("memory://csv-bucket/rows", "memory://csv-bucket/rows/*.csv"):
        for split in splits:
            np.testing.assert_equal(rows(source(url), split), rows(source(folder), split))
    memory.rm("/csv-bucket", recursive=True)


def test_rows_by_number_run_on_from_file_to_file(folder: Path) -> None:
    made = source(folder, Fraction(0.5))
    assert [row["word"] for row in rows(made)] == ["a, b", "", "d"]
    assert [row["word"] for row in rows(made, "holdout")] == [None, "c"]


def test_null_values_and_delimiter_are_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("label;day;size;word\n1;2013-11-05;NA;NA\n0;2013-11-05;1;-\n")
    found = rows(source(path, delimiter=";", null_values=["NA", "-"]))
    assert [(row["size"], row["word"]) for row in found] == [(None, None), (1.0, None)]


def test_a_quoted_value_may_hold_a_line_break_and_a_mark_may_lead(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\ufeff" + HEADER + '1,2013-11-05,x,1,"a\nb"\n0,2013-11-05,x,1,c\n')
    assert [row["word"] for row in rows(source(path))] == ["a\nb", "c"]


def test_only_as_much_is_read_as_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    line = "0,2013-11-05,x,1,word\n"
    path.write_text(HEADER + line * 400_000 + "spoilt\n")
    batches = source(path).batches("train", NEW_YEAR)
    assert next(batches).num_rows < 400_000
    with pytest.raises(DataError, match="Row #400002"):
        list(batches)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("0,2013-11-06", "300,2013-11-06", r"'label' must be int8: Row #3:.*'300'"),
        ("2013-11-06", "6.11.2013", r"'day' must be date32\[day\]: Row #3:.*'6.11.2013'"),
        ("0.1", "low", r"'size' must be float: Row #2:.*'low'"),
        (",y,,\n", ",y,\n", r"Row #3: Expected 5 columns, got 4"),
        (",y,,\n", ',y,"",\n', r"'size' must be float: Row #3:.*''"),
        ("size", "weight", r"must name every declared column once; 'size' is there 0 times"),
        ("extra", "size", r"'size' is there 2 times"),
        (NOVEMBER, "", r"'day' is there 0 times, 'size' is there 0 times"),
    ],
)
def test_a_fault_names_file_row_and_column(folder: Path, old: str, new: str, words: str) -> None:
    path = folder / "1.csv"
    assert old in NOVEMBER
    path.write_text(NOVEMBER.replace(old, new, 1))
    with pytest.raises(DataError, match=words) as caught:
        rows(source(folder))
    assert f"{path}: " in str(caught.value)
    assert "Mend the file" in str(caught.value)


def test_text_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "1.csv").write_bytes(NOVEMBER.encode().replace(b'"a, b"', b"\xff\xfe"))
    with pytest.raises(DataError, match=r"1\.csv: column 'word' must be string: Row #2: .*UTF8"):
        rows(source(folder))


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    whole = gzip.compress((HEADER + "0,2013-11-05,x,1,word\n" * 50_000).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.csv\.gz"):
        rows(source(path))


def test_a_path_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent.csv", f"{tmp_path}/*.csv", "memory://no"):
        with pytest.raises(DataError, match="there are none at"):
            rows(source(path))


def test_an_empty_split_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"the train split must have rows; .*rows \(train before"):
        rows(source(folder), as_of=date(2013, 12, 1))


def test_a_file_that_goes_away_is_named(folder: Path) -> None:
    batches = source(folder, Fraction(0.1)).batches("train", NEW_YEAR)
    next(batches)
    (folder / "2.csv").unlink()
    with pytest.raises(DataError, match=r"2\.csv is gone"):
        list(batches)


def test_a_protocol_that_nothing_opens_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere://a"):
        source("nowhere://a")


def test_nested_columns_and_an_undeclared_time_are_refused(tmp_path: Path) -> None:
    nested = RowSchema(pa.schema([pa.field("image", pa.list_(pa.float32(), 2))]))
    with pytest.raises(ContractError, match="nested columns image"):
        CsvSource(tmp_path, nested, Fraction())
    with pytest.raises(ContractError, match="'time'"):
        source(tmp_path, Months("time"))


def test_credentials_of_an_address_are_not_shown() -> None:
    from components.data.files import DataFiles

    files = DataFiles("memory://someone:hunter2@host/nothing", (".csv",))
    with pytest.raises(DataError, match="there are none at memory://") as caught:
        files.found()
    assert "hunter2" not in str(caught.value)
