"""The real flights: counts, windows, joins, and every way in which the files can be damaged."""

import json
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pandera.errors import SchemaError
from pandera.pyarrow import Column, DataFrameSchema

from components.data.flights import (
    SCHEMA,
    WEATHER,
    FlightsSource,
    Month,
    last_complete_month,
)
from components.errors import DataError

NEW_YEAR = date(2014, 1, 1)
Edit = Callable[[Path, bytes, bytes], None]


def rows_of(source: FlightsSource, as_of: date = NEW_YEAR) -> pa.Table:
    """Both splits, in order."""
    batches = [b for split in ("train", "holdout") for b in source.batches(split, as_of)]
    return pa.Table.from_batches(batches, schema=source.schema().arrow)


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of change and its bytes."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())}


def test_the_year_has_its_known_counts(whole_year: Path) -> None:
    status: Counter[str] = Counter()
    for month in json.loads((whole_year / "manifest.json").read_text())["months"].values():
        status.update(month["status"])
    assert status == {"flown": 327_346, "cancelled": 8_255, "diverted": 1_175}
    source = FlightsSource(whole_year)
    assert rows_of(source).num_rows == 327_346
    assert source.excluded(NEW_YEAR) == {"cancelled": 8_255, "diverted": 1_175}


def test_the_december_window_has_its_known_counts(whole_year: Path) -> None:
    source = FlightsSource(whole_year)
    counts = {
        split: sum(batch.num_rows for batch in source.batches(split, NEW_YEAR))
        for split in ("train", "holdout")
    }
    assert counts == {"train": 300_326, "holdout": 27_020}
    assert source.window(NEW_YEAR) == "train 2013-01 to 2013-11, hold out 2013-12"


def test_excluded_counts_only_the_window(whole_year: Path) -> None:
    source = FlightsSource(whole_year)
    assert source.excluded(date(2013, 3, 1)) == {"cancelled": 521 + 1261, "diverted": 85 + 79}


def test_no_column_tells_what_is_known_only_after_departure() -> None:
    leaks = {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "hour", "minute"}
    assert not leaks & set(SCHEMA.names)


def test_rows_have_the_declared_schema_and_no_forbidden_null(sampled: Path) -> None:
    rows = rows_of(FlightsSource(sampled))
    assert rows.schema.equals(SCHEMA)
    nulls = {f.name: rows.column(f.name).null_count for f in SCHEMA if not f.nullable}
    assert not any(nulls.values()), nulls


def test_the_year_keeps_the_declared_checks(whole_year: Path) -> None:
    source = FlightsSource(whole_year)
    rows, schema = rows_of(source), source.schema()
    assert set(SCHEMA.names) - set(schema.checks) == {
        "date",
        "plane_type",
        "manufacturer",
        "engine",
    }
    columns = {
        name: Column(SCHEMA.field(name).type, checks=list(checks), nullable=True)
        for name, checks in schema.checks.items()
    }
    DataFrameSchema(columns).validate(rows)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", -1),
        ("origin", "ERW"),
        ("carrier", "UAL"),
        ("sched_arr_minute", 1441),
        ("distance", 0.0),
        ("humid", 100.5),
        ("seats", 0.0),
        ("wind_gust", -1.0),
        ("late", 2),
    ],
)
def test_a_value_outside_of_the_checks_is_seen(tmp_path: Path, name: str, value: object) -> None:
    schema = FlightsSource(tmp_path).schema()
    kind = SCHEMA.field(name).type
    columns = {name: Column(kind, checks=list(schema.checks[name]))}
    with pytest.raises(SchemaError, match="Check .* failed"):
        DataFrameSchema(columns).validate(pa.table({name: pa.array([value], kind)}))


def test_the_key_numbers_all_flights_by_date(whole_year: Path) -> None:
    source = FlightsSource(whole_year)
    assert source.schema().key == ("id",)
    ids = rows_of(source).column("id").to_numpy()
    assert (np.diff(ids) > 0).all()
    assert ids[0] == 0
    assert len(ids) < ids[-1] < 336_776, "cancelled flights have a place, too"


@pytest.mark.parametrize(
    ("as_of", "held", "last_trained"),
    [
        (date(2013, 3, 1), "2013-02", "2013-01"),
        (date(2013, 7, 1), "2013-06", "2013-05"),
        (date(2013, 8, 15), "2013-07", "2013-06"),
        (date(2013, 8, 31), "2013-07", "2013-06"),
        (date(2014, 1, 1), "2013-12", "2013-11"),
        (date(2014, 1, 31), "2013-12", "2013-11"),
    ],
)
def test_the_last_complete_month_is_held_out(
    sampled: Path, as_of: date, held: str, last_trained: str
) -> None:
    source = FlightsSource(sampled)
    assert source.window(as_of) == f"train 2013-01 to {last_trained}, hold out {held}"
    parts = {
        split: pa.Table.from_batches(source.batches(split, as_of)).column("date")
        for split in ("train", "holdout")
    }
    months = {split: pc.strftime(dates, format="%Y-%m") for split, dates in parts.items()}
    assert pc.unique(months["holdout"]).to_pylist() == [held]
    assert pc.unique(months["train"]).to_pylist()[-1] == last_trained
    assert pc.max(parts["train"]).as_py() < pc.min(parts["holdout"]).as_py() < as_of


@pytest.mark.parametrize("as_of", [date(2013, 2, 28), date(2012, 5, 1), date(2014, 2, 1)])
def test_a_date_without_data_is_refused_and_the_range_named(sampled: Path, as_of: date) -> None:
    source = FlightsSource(sampled)
    calls: tuple[Callable[[], object], ...] = (
        lambda: source.window(as_of),
        lambda: list(source.batches("train", as_of)),
        lambda: source.excluded(as_of),
    )
    for call in calls:
        with pytest.raises(DataError, match=str(as_of)) as caught:
            call()
        assert "between 2013-03-01 and 2014-01-31" in str(caught.value)


def test_the_named_range_is_exactly_what_is_accepted(sampled: Path) -> None:
    source, day = FlightsSource(sampled), timedelta(days=1)
    first, last = date(2013, 3, 1), date(2014, 1, 31)
    for good in (first, last):
        source.window(good)
    for bad in (first - day, last + day):
        with pytest.raises(DataError):
            source.window(bad)


def test_months_step_over_the_new_year() -> None:
    assert last_complete_month(date(2014, 1, 1)) == Month(2013, 12)
    assert str(last_complete_month(date(2013, 3, 31))) == "2013-02"


def test_preparing_twice_writes_once_and_leaves_nothing_else(origin: Path, tmp_path: Path) -> None:
    folder = tmp_path / "state" / "flights"
    source = FlightsSource(folder, origin)
    source.prepare()
    before = files_of(folder)
    for path in origin.iterdir():
        path.unlink()  # a second reading would fail
    source.prepare()
    assert files_of(folder) == before
    assert {p.name for p in folder.parent.iterdir()} == {"flights", "locks"}
    assert sorted(before) == sorted(
        [*(f"2013-{m:02d}.parquet" for m in range(1, 13)), "manifest.json"]
    )


def test_preparing_mends_a_folder_without_manifest(origin: Path, prepared: Path) -> None:
    (prepared / "manifest.json").unlink()
    (prepared / "2013-05.parquet").unlink()
    (prepared / "stray").write_text("left by someone")
    FlightsSource(prepared, origin).prepare()
    assert rows_of(FlightsSource(prepared)).num_rows
    assert not (prepared / "stray").exists()


def test_without_preparation_the_next_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json.*Delete the folder"):
        FlightsSource(tmp_path / "nothing").window(NEW_YEAR)


def reference(origin: Path) -> pd.DataFrame:
    """Flown flights by month, joined by pandas."""
    kept = {"keep_default_na": False, "na_values": ["", "NA"]}
    table = pd.read_csv(origin / "flights.csv.zip", **kept)
    weather = pd.read_csv(origin / "weather.csv", **kept).drop_duplicates(["origin", "time_hour"])
    planes = pd.read_csv(origin / "planes.csv", **kept).drop_duplicates("tailnum")
    airports = pd.read_csv(origin / "airports.csv", **kept).drop_duplicates("faa")
    table = table[table["dep_time"].notna() & table["arr_delay"].notna()]
    table = table.sort_values("month", kind="stable").reset_index(drop=True)
    table = table.merge(weather[["origin", "time_hour", *WEATHER]], "left", ["origin", "time_hour"])
    planes = planes.rename(columns={"year": "built", "type": "plane_type"})
    planes = planes[
        ["tailnum", "built", "plane_type", "manufacturer", "engine", "engines", "seats"]
    ]
    table = table.merge(planes, "left", "tailnum")
    places = airports.rename(columns={"faa": "dest", "lat": "dest_lat", "lon": "dest_lon"})
    return table.merge(places[["dest", "dest_lat", "dest_lon"]], "left", "dest")


def test_the_joins_agree_with_pandas(sampled: Path, sampled_origin: Path) -> None:
    rows, slow = rows_of(FlightsSource(sampled)), reference(sampled_origin)
    assert rows.num_rows == len(slow) > 3000
    numbers = (*WEATHER, "seats", "engines", "dest_lat", "dest_lon", "distance")
    for name in numbers:
        ours = rows.column(name).to_numpy()
        np.testing.assert_array_equal(ours, slow[name].to_numpy(np.float32), err_msg=name)
    assert np.isfinite(rows.column("temp").to_numpy()).mean() > 0.9, "the join must find most hours"
    age = (slow["year"] - slow["built"]).to_numpy(np.float32)
    np.testing.assert_array_equal(rows.column("plane_age").to_numpy(), age)
    for name in ("carrier", "origin", "dest", "plane_type", "manufacturer", "engine"):
        words = [None if pd.isna(word) else word for word in slow[name]]
        assert rows.column(name).to_pylist() == words, name


def test_dates_and_times_agree_with_pandas(sampled: Path, sampled_origin: Path) -> None:
    rows, slow = rows_of(FlightsSource(sampled)), reference(sampled_origin)
    days = pd.to_datetime(slow[["year", "month", "day"]])
    assert rows.column("date").to_pylist() == [day.date() for day in days]
    assert rows.column("weekday").to_pylist() == [day.strftime("%a") for day in days]
    for ours, theirs in (
        ("sched_dep_minute", "sched_dep_time"),
        ("sched_arr_minute", "sched_arr_time"),
    ):
        minutes = [int(clock) // 100 * 60 + int(clock) % 100 for clock in slow[theirs]]
        assert rows.column(ours).to_pylist() == minutes


def test_a_flight_is_late_after_fifteen_minutes(sampled: Path, sampled_origin: Path) -> None:
    rows, slow = rows_of(FlightsSource(sampled)), reference(sampled_origin)
    assert rows.column("late").to_pylist() == [int(delay > 15) for delay in slow["arr_delay"]]
    assert {15.0, 16.0} <= set(slow["arr_delay"]), "the sample must hold both sides of the bound"
