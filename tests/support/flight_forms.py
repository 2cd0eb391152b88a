"""The same flights as Parquet, as CSV, in SQLite and in PostgreSQL."""

import contextlib
import sqlite3
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from psycopg import sql
from pydantic import SecretStr
from support.postgres import Postgres

from components.contract import DataSource
from components.data.csv_files import CsvSource
from components.data.flights import FlightsSource
from components.data.parquet_files import ParquetSource
from components.data.sql import SqlSource
from components.data.windows import Window

Form = Callable[[Window], DataSource]
TYPES = {"int8": "smallint", "int32": "integer", "float": "real", "string": "text"}


def columns(schema: pa.Schema) -> str:
    """Column definitions that both databases take."""
    kinds = ((f.name, TYPES.get(str(f.type), "date"), f.nullable) for f in schema)
    return ", ".join(f"{name} {kind} {'' if free else 'not null'}" for name, kind, free in kinds)


def copy(postgres: Postgres, table: str, rows: pa.Table) -> None:
    """Load rows, the last one first: the order of a table is nobody's promise."""
    with postgres.connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"drop table if exists {table}".encode())
        cursor.execute(f"create table {table} ({columns(rows.schema)})".encode())
        names = sql.SQL(",").join(map(sql.Identifier, rows.schema.names))
        with cursor.copy(sql.SQL("copy {} ({}) from stdin").format(sql.SQL(table), names)) as out:
            for row in reversed(rows.to_pylist()):
                out.write_row(list(row.values()))


def insert(path: Path, table: str, rows: pa.Table) -> None:
    """Load rows into SQLite, which keeps dates as text."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"create table {table} ({columns(rows.schema)})")
        marks = ",".join("?" * rows.num_columns)
        for row in reversed(rows.to_pylist()):
            values = [str(v) if isinstance(v, date) else v for v in row.values()]
            connection.execute(f"insert into {table} values ({marks})", values)


def write_forms(flights: pa.Table, postgres: Postgres, folder: Path) -> Mapping[str, Form]:
    """Store flights in four places; gives a source for each."""
    pq.write_table(flights, folder / "flights.parquet", row_group_size=5_000)
    pacsv.write_csv(flights, folder / "flights.csv")
    insert(folder / "flights.db", "flights", flights)
    copy(postgres, "flights", flights)
    sqlite = SecretStr(f"sqlite:///{folder}/flights.db")
    schema = FlightsSource(folder).schema()
    return {
        "Parquet": lambda window: ParquetSource(folder / "flights.parquet", schema, window),
        "CSV": lambda window: CsvSource(folder / "flights.csv", schema, window),
        "SQLite": lambda window: SqlSource(sqlite, schema, window, table="flights"),
        "PostgreSQL": lambda window: SqlSource(postgres.url(), schema, window, table="flights"),
    }
