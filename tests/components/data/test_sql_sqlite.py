"""SQLite as a source of rows: its types, its refusals, its locks."""

import contextlib
import sqlite3
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import SecretStr

from components.data.schema import RowSchema
from components.data.sql import SqlSource
from components.data.windows import Fraction, Months
from components.errors import DataError, InfrastructureError

MAY = date(2013, 5, 1)
NUMBERS = RowSchema(pa.schema([pa.field("n", pa.int32(), nullable=False)]), key=("n",))


MIXED = RowSchema(
    pa.schema(
        [
            pa.field("n", pa.int64(), nullable=False),
            pa.field("at", pa.timestamp("us"), nullable=False),
            pa.field("flag", pa.bool_()),
            pa.field("size", pa.float32()),
        ]
    ),
    key=("n",),
)
GOOD = (2**40, "2013-04-01 00:00:00", 1, 0.1)


def sqlite_of(path: Path, *rows: tuple[Any, ...]) -> SqlSource:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table t (n, at, flag, size)")
        connection.executemany("insert into t values (?, ?, ?, ?)", rows)
    return SqlSource(SecretStr(f"sqlite:///{path}"), MIXED, Months("at"), table="t")


def test_sqlite_gives_times_booleans_and_missing_values(tmp_path: Path) -> None:
    rows = [(2, "2013-04-30T23:59:59.250", None, None), (1, "2013-05-01 00:00:00", 1, 1), GOOD]
    made = sqlite_of(tmp_path / "rows.db", *rows)
    (batch,) = made.batches("holdout", MAY)
    assert batch.column("n").to_pylist() == [2, 2**40]
    assert str(batch.column("at")[0]) == "2013-04-30 23:59:59.250000"
    assert batch.column("flag").to_pylist() == [None, True]
    assert batch.column("size").to_pylist() == [None, pa.scalar(0.1, pa.float32()).as_py()]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((1, "2013-04-31", 1, 1), "'at' must be timestamp"),
        ((1, "2013-04-02", 2, 1), "'flag' must be bool.*only 0 and 1"),
        ((1, "2013-04-02", 1, "big"), "'size' must be float: found str such as 'big'"),
        ((1.5, "2013-04-02", 1, 1), "'n' must be int64"),
    ],
)
def test_sqlite_rows_of_another_type_are_told(
    tmp_path: Path, row: tuple[Any, ...], words: str
) -> None:
    made = sqlite_of(tmp_path / "rows.db", row)
    with pytest.raises(DataError, match=words) as caught:
        list(made.batches("holdout", MAY))
    assert "rows 1 to 1 of table t" in str(caught.value)


def test_sqlite_without_file_table_column_or_sense_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a b#.db"

    def complaint(**options: Any) -> str:
        url = SecretStr(f"sqlite:///{path}")
        made = SqlSource(url, NUMBERS, Fraction(), **{"table": "t", **options})
        with pytest.raises(DataError) as caught:
            list(made.batches("train", MAY))
        return str(caught.value)

    assert "there is none at" in complaint()
    assert not path.exists(), "reading makes no file"
    path.write_bytes(b"spoilt" * 1000)
    assert "file is not a database" in complaint()
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table t (m)")
    assert "no such column: t.n" in complaint()
    assert "no such table: absent" in complaint(table="absent")
    assert "syntax error" in complaint(table="", query="select from")


def test_a_locked_sqlite_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, connect = tmp_path / "rows.db", sqlite3.connect
    made = sqlite_of(path, GOOD)
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, timeout=0.05))
    with contextlib.closing(connect(path, isolation_level=None)) as connection:
        connection.execute("begin exclusive")
        with pytest.raises(InfrastructureError, match="locked.*Wait for the process"):
            list(made.batches("holdout", MAY))
    assert len(list(made.batches("holdout", MAY))) == 1
