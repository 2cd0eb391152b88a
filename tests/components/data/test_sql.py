"""Databases: the same rows as files give, lost connections, and refusals without secrets."""

import re
import time
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest
import sqlalchemy
from pydantic import SecretStr
from support.flight_forms import Form, write_forms
from support.postgres import Postgres

from components.contract import DataSource, Split
from components.data import sql_engine
from components.data.flights import FlightsSource
from components.data.schema import RowSchema
from components.data.sql import SqlSource
from components.data.windows import Fraction, Months, Window
from components.digest import RowDigest
from components.errors import AssayError, ConfigError, ContractError, DataError, InfrastructureError

MAY = date(2013, 5, 1)
HIDDEN = "hunter2"
NUMBERS = RowSchema(pa.schema([pa.field("n", pa.int32(), nullable=False)]), key=("n",))
ROWS = 50_000


def digest(source: DataSource, as_of: date = MAY) -> str:
    rows = RowDigest()
    splits: tuple[Split, ...] = ("train", "holdout")
    for split in splits:
        rows.mark()
        for batch in source.batches(split, as_of):
            assert batch.schema.equals(source.schema().arrow)
            rows.update(batch)
    return rows.hexdigest()


@pytest.fixture(scope="module")
def flights(sampled: Path) -> pa.Table:
    """Flights of five months."""
    source = FlightsSource(sampled)
    june = date(2013, 6, 1)
    batches = [b for split in ("train", "holdout") for b in source.batches(split, june)]
    return pa.Table.from_batches(batches)


@pytest.fixture(scope="module")
def forms(
    flights: pa.Table, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Form]:
    """The same flights in four places."""
    return write_forms(flights, postgres, tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def numbers(postgres: Postgres) -> Postgres:
    """A server with a table of numbers, a view for which a stranger has no permission."""
    with postgres.connect() as connection:
        connection.execute(
            f"create table numbers as select n from generate_series(1, {ROWS}) as t(n)".encode()
        )
        connection.execute(f"create role stranger login password '{HIDDEN}'".encode())
    return postgres


def of_numbers(postgres: Postgres, window: Window | None = None, **options: Any) -> SqlSource:
    options = {"table": "numbers", "backoff_s": 0.01, **options}
    url = options.pop("url", postgres.url())
    return SqlSource(url, options.pop("schema", NUMBERS), window or Fraction(0.2), **options)


def ids(batches: Iterator[pa.RecordBatch]) -> list[int]:
    return [n for batch in batches for n in batch.column("n").to_pylist()]


def kill(postgres: Postgres) -> int:
    """End every connection of the source; returns how many there were."""
    with postgres.connect() as connection:
        found = connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where application_name = 'assay'"
        )
        return len(found.fetchall())


def test_four_forms_of_the_same_flights_have_one_digest(
    forms: Mapping[str, Form], sampled: Path
) -> None:
    windows: tuple[Window, ...] = (Months("date"), Months("date", 2, 1), Fraction(0.25))
    for window in windows:
        digests = {name: digest(form(window)) for name, form in forms.items()}
        assert len(set(digests.values())) == 1, digests
    assert digest(forms["PostgreSQL"](Months("date"))) == digest(FlightsSource(sampled))


def test_a_source_says_what_it_is(forms: Mapping[str, Form]) -> None:
    source = forms["PostgreSQL"](Months("date"))
    source.prepare()
    assert source.schema().key == ("id",)
    assert source.window(MAY) == "train before 2013-04, hold out 2013-04"
    assert source.excluded(MAY) == {}


def test_the_first_rows_come_before_the_last_are_made(postgres: Postgres) -> None:
    query = "select n from generate_series(1, 5000000) as t(n)"
    batches = of_numbers(postgres, table="", query=query).batches("train", MAY)
    began = time.monotonic()
    first = next(batches)
    taken = time.monotonic() - began
    assert first.column("n").to_pylist()[:5] == [1, 2, 3, 4, 6]
    assert first.num_rows <= 16_384
    assert taken < 20
    began = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 1, "the rest is not read"


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_lost_connection_is_made_anew_after_the_last_key(
    numbers: Postgres, taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ids(of_numbers(numbers).batches("train", MAY))
    batches = of_numbers(numbers).batches("train", MAY)
    found = [next(batches) for _ in range(taken + 1)]
    assert kill(numbers) == 1
    assert ids(iter(found)) + ids(batches) == expected
    assert f"the last with the key n={16_384 * (taken + 1)}; trying again (1 of 5)" in caplog.text


def test_a_composite_key_goes_on_where_it_stopped(numbers: Postgres) -> None:
    schema = RowSchema(
        pa.schema(
            [
                pa.field("day", pa.date32(), nullable=False),
                pa.field("word", pa.string(), nullable=False),
                pa.field("n", pa.int32(), nullable=False),
            ]
        ),
        key=("day", "word", "n"),
    )
    query = (
        "select n, date '2013-01-01' + n / 9000 as day, "
        "case when n % 3 = 0 then 'ä' when n % 3 = 1 then 'Z' else 'a:b %s' end as word "
        "from numbers -- :no_parameter\n;"
    )
    made = of_numbers(
        numbers, table="", query=query.replace("-- :no_parameter\n", ""), schema=schema
    )
    expected = [row for batch in made.batches("train", MAY) for row in batch.to_pylist()]
    keys = [(row["day"], row["word"].encode(), row["n"]) for row in expected]
    assert keys == sorted(keys), "in the order of bytes"
    batches = made.batches("train", MAY)
    found = next(batches).to_pylist()
    assert kill(numbers) == 1
    assert found + [row for batch in batches for row in batch.to_pylist()] == expected


def test_the_rows_are_those_of_one_moment(numbers: Postgres) -> None:
    batches = of_numbers(numbers).batches("holdout", MAY)
    first = next(batches)
    with numbers.connect() as connection:
        connection.execute(f"insert into numbers values ({ROWS + 5})".encode())
        try:
            found = ids(iter([first])) + ids(batches)
        finally:
            connection.execute(f"delete from numbers where n > {ROWS}".encode())
    assert found == list(range(5, ROWS + 1, 5))


def test_nothing_can_be_written(numbers: Postgres) -> None:
    query = "with gone as (delete from numbers returning n) select n from gone"
    for text in (query, "select n from numbers for update"):
        with pytest.raises(AssayError, match="numbers|source"):
            ids(of_numbers(numbers, table="", query=text).batches("train", MAY))
    with numbers.connect() as connection:
        (count,) = connection.execute("select count(*) from numbers").fetchone() or (0,)
    assert count == ROWS


def test_a_row_that_vanished_while_reading_is_told(numbers: Postgres) -> None:
    batches = of_numbers(numbers).batches("train", MAY)
    next(batches)
    with numbers.connect() as connection:
        connection.execute(b"delete from numbers where n = 16384")
        try:
            kill(numbers)
            with pytest.raises(DataError, match="the key 16384 was gone from table numbers"):
                list(batches)
        finally:
            connection.execute(b"insert into numbers values (16384)")


def test_a_server_that_stays_away_is_told_within_bounded_time(numbers: Postgres) -> None:
    batches = of_numbers(numbers, retries=3, backoff_s=0.05).batches("train", MAY)
    next(batches)
    numbers.stop()
    try:
        began = time.monotonic()
        with pytest.raises(InfrastructureError) as caught:
            list(batches)
        assert time.monotonic() - began < 10
    finally:
        numbers.start()
    message = str(caught.value)
    assert "after 16,384 rows, the last with the key n=16384" in message
    assert "Check that the server runs" in message
    assert_hidden(caught.value, numbers.password)
    assert len(ids(of_numbers(numbers).batches("train", MAY))) == ROWS * 4 // 5


def assert_hidden(error: BaseException, secret: str) -> None:
    """The password is in no message, whatever is shown of the error."""
    seen: BaseException | None = error
    while seen is not None:
        assert secret not in f"{seen} {seen!r} {getattr(seen, 'params', '')}"
        seen = seen.__cause__
    assert error.__suppress_context__


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"password": HIDDEN}, InfrastructureError, "password authentication failed.*Mend user"),
        ({"user": "nobody"}, InfrastructureError, "authentication failed.*Mend user"),
        ({"database": "nowhere"}, InfrastructureError, 'database "nowhere" does not exist'),
    ],
)
def test_a_server_that_refuses_is_told_without_the_password(
    numbers: Postgres, change: dict[str, str], kind: type[AssayError], words: str
) -> None:
    made = of_numbers(numbers, url=numbers.url(**change))
    with pytest.raises(kind, match=words) as caught:
        list(made.batches("train", MAY))
    assert_hidden(caught.value, change.get("password", numbers.password))
    assert "***@127.0.0.1" in str(caught.value)


def test_a_user_without_permission_is_told(numbers: Postgres) -> None:
    made = of_numbers(numbers, url=numbers.url(user="stranger", password=HIDDEN))
    with pytest.raises(
        DataError, match="permission denied for table numbers.*Grant SELECT"
    ) as caught:
        list(made.batches("train", MAY))
    assert_hidden(caught.value, HIDDEN)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "nowhere.invalid"])
def test_a_server_that_is_not_there_is_told(host: str) -> None:
    url = SecretStr(f"postgresql://u:{HIDDEN}@{host}/d?password={HIDDEN}")
    made = SqlSource(url, NUMBERS, Fraction(), table="t", retries=1, backoff_s=0.01)
    with pytest.raises(InfrastructureError, match="before the first row.*Check that") as caught:
        list(made.batches("train", MAY))
    assert_hidden(caught.value, HIDDEN)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"table": "absent"}, 'relation "absent" does not exist. Create it'),
        ({"table": "nowhere.numbers"}, 'relation "nowhere.numbers" does not exist'),
        ({"query": "select 1 as m"}, "source_rows.n does not exist. Add it"),
        ({"query": "selec 1 as n"}, "syntax error.*by hand"),
        ({"query": "select 'a' as n"}, "rows 1 to 1 of the query.*'n' must be int32: found str"),
        ({"query": "select 3000000000 as n"}, "found int such as 3000000000"),
        ({"query": "select 1 / 0 as n"}, "division by zero"),
        ({"query": "select 1 as n where false"}, "the train split must have rows"),
    ],
)
def test_a_wrong_table_or_column_is_told(
    numbers: Postgres, options: dict[str, str], words: str
) -> None:
    made = of_numbers(numbers, **{"table": "", **options})
    with pytest.raises(AssayError) as caught:
        list(made.batches("train", MAY))
    assert re.search(words, str(caught.value)), str(caught.value)
    assert_hidden(caught.value, numbers.password) if caught.value.__suppress_context__ else None


def test_the_window_is_selected_by_the_server(numbers: Postgres) -> None:
    schema = RowSchema(
        pa.schema([*NUMBERS.arrow, pa.field("at", pa.timestamp("us", "UTC"), nullable=False)]),
        key=("n",),
    )
    query = (
        "select n, timestamptz '2013-01-01 00:00Z' + n * interval '1 day' as at, "
        "case when n > 200 then 1 / (n - n) end as trap from numbers"
    )
    made = of_numbers(numbers, Months("at"), table="", query=query, schema=schema)
    assert ids(made.batches("holdout", MAY)) == list(range(90, 120))
    assert ids(made.batches("train", MAY)) == list(range(1, 90))


def test_a_missing_time_is_passed_on_to_be_refused(numbers: Postgres) -> None:
    schema = RowSchema(
        pa.schema([*NUMBERS.arrow, pa.field("at", pa.date32(), nullable=False)]), key=("n",)
    )
    query = "select n, case when n > 1 then date '2013-04-02' end as at from numbers where n < 4"
    made = of_numbers(numbers, Months("at"), table="", query=query, schema=schema)
    assert ids(made.batches("holdout", MAY)) == [1, 2, 3]


def test_an_empty_url_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="ASSAY_DATABASE_URL is empty. Set it"):
        SqlSource(SecretStr(""), NUMBERS, Fraction(), table="t")


@pytest.mark.parametrize(
    "url",
    [
        HIDDEN,
        f"postgresql://u:{HIDDEN}@host:{HIDDEN}/d",
        f"mysql://u:{HIDDEN}@host/d",
        f"oracle+driver://u:{HIDDEN}@host/d",
        f"postgresql://u:first@{HIDDEN}@host/d",
        "sqlite://",
    ],
)
def test_another_url_is_refused_unseen(url: str) -> None:
    with pytest.raises(ConfigError, match="ASSAY_DATABASE_URL must") as caught:
        SqlSource(SecretStr(url), NUMBERS, Fraction(), table="t")
    assert HIDDEN not in str(caught.value)


def test_an_absent_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setattr(sqlalchemy, "create_engine", absent)
    made = SqlSource(SecretStr("postgresql://h/d"), NUMBERS, Fraction(), table="t")
    with pytest.raises(ConfigError, match=r'pip install "assay\[postgres\]"'):
        list(made.batches("train", MAY))


def test_one_of_table_and_query_and_a_key_are_needed() -> None:
    url = SecretStr("sqlite:///rows.db")
    for options in ({}, {"table": "t", "query": "select 1"}):
        with pytest.raises(ContractError, match="a table or a query, one of them"):
            SqlSource(url, NUMBERS, Fraction(), **options)
    with pytest.raises(ContractError, match="needs the schema's key"):
        SqlSource(url, RowSchema(NUMBERS.arrow), Fraction(), table="t")
    zoned = pa.field("at", pa.timestamp("us", "UTC"), nullable=False)
    with pytest.raises(ContractError, match="SQLite cannot compare"):
        schema = RowSchema(pa.schema([*NUMBERS.arrow, zoned]), key=("n",))
        SqlSource(url, schema, Months("at"), table="t")


def test_psycopg_is_what_postgresql_means() -> None:
    assert sql_engine.parse_url(SecretStr("postgresql://h/d")).drivername == "postgresql+psycopg"
    assert psycopg.__version__ >= "3.2"
