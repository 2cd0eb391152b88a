"""Windows: which days and which rows they choose, against slow answers."""

from datetime import date, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from components.contract import Split
from components.data.windows import (
    Days,
    Fraction,
    Interval,
    Months,
    Numbered,
    Window,
    check_window,
    choose,
    require_rows,
)
from components.errors import ContractError, DataError

NEW_YEAR = date(2014, 1, 1)
DAYS = [date(2013, 1, 1) + timedelta(days=i) for i in range(400)]


def chosen(window: Window, split: Split, as_of: date, kind: pa.DataType) -> list[date]:
    """The days that a window takes of all, in batches of 37."""
    rows = pa.table({"day": pa.array(DAYS, pa.date32()).cast(kind)})
    found = choose(rows.to_batches(max_chunksize=37), window.select(split, as_of))
    days = [value for batch in found for value in batch.column("day").to_pylist()]
    return [day.date() if isinstance(day, datetime) else day for day in days]


@pytest.mark.parametrize("kind", [pa.date32(), pa.timestamp("us"), pa.timestamp("s")], ids=str)
@pytest.mark.parametrize(
    ("window", "as_of", "train", "holdout"),
    [
        (Months("day"), NEW_YEAR, ("2013-01-01", "2013-11-30"), ("2013-12-01", "2013-12-31")),
        (
            Months("day", 2, 3),
            date(2013, 8, 31),
            ("2013-03-01", "2013-05-31"),
            ("2013-06-01", "2013-07-31"),
        ),
        (Days("day"), NEW_YEAR, ("2013-01-01", "2013-12-30"), ("2013-12-31", "2013-12-31")),
        (
            Days("day", 7, 14),
            date(2013, 3, 1),
            ("2013-02-08", "2013-02-21"),
            ("2013-02-22", "2013-02-28"),
        ),
    ],
)
def test_the_last_complete_units_are_held_out(
    window: Window,
    as_of: date,
    train: tuple[str, str],
    holdout: tuple[str, str],
    kind: pa.DataType,
) -> None:
    splits: dict[Split, tuple[str, str]] = {"train": train, "holdout": holdout}
    for split, ends in splits.items():
        first, last = (date.fromisoformat(end) for end in ends)
        assert chosen(window, split, as_of, kind) == [d for d in DAYS if first <= d <= last]


def test_months_step_over_the_new_year() -> None:
    window = Months("day", holdout=3, train=12)
    assert window.select("holdout", date(2014, 2, 1)) == Interval(
        "day", date(2013, 11, 1), date(2014, 2, 1)
    )
    assert window.select("train", date(2014, 2, 1)) == Interval(
        "day", date(2012, 11, 1), date(2013, 11, 1)
    )


@pytest.mark.parametrize(
    ("window", "words"),
    [
        (Months("day"), "train before 2013-12, hold out 2013-12"),
        (Months("day", 2, 3), "train 2013-08 to 2013-10, hold out 2013-11 to 2013-12"),
        (Days("day"), "train before 2013-12-31, hold out 2013-12-31"),
        (Days("day", 2, 1), "train 2013-12-29, hold out 2013-12-30 to 2013-12-31"),
        (Fraction(), "hold out 1 of every 5 rows, train on the others"),
        (Fraction(0.3), "hold out 3 of every 10 rows, train on the others"),
    ],
)
def test_a_window_says_what_it_takes(window: Window, words: str) -> None:
    assert window.words(NEW_YEAR) == words


def test_a_day_begins_at_midnight_of_the_columns_zone() -> None:
    kind = pa.timestamp("us", "America/New_York")
    interval = Interval("day", date(2013, 7, 1), date(2013, 7, 2))
    instants = ["2013-07-01T03:59:59Z", "2013-07-01T04:00:00Z", "2013-07-02T03:59:59Z"]
    times = pa.array([*instants, "2013-07-02T04:00:00Z"]).cast(pa.timestamp("us", "UTC"))
    (batch,) = choose([pa.record_batch({"day": times.cast(kind)})], interval)
    assert batch.column("day").cast(pa.timestamp("us", "UTC")).equals(times[1:3])


def test_a_row_without_a_time_is_not_dropped_silently() -> None:
    batch = pa.record_batch({"day": pa.array([None, date(2013, 7, 1)], pa.date32())})
    (found,) = choose([batch], Interval("day", None, date(2013, 1, 1)))
    assert found.column("day").to_pylist() == [None]


@pytest.mark.parametrize(("share", "of", "every"), [(0.2, 1, 5), (0.3, 3, 10), (0.001, 1, 1000)])
def test_a_fraction_is_spread_evenly_whatever_the_batches(
    share: float, of: int, every: int
) -> None:
    rows = pa.table({"n": pa.array(range(10 * every))})
    window, found = Fraction(share), {}
    splits: tuple[Split, ...] = ("train", "holdout")
    for split in splits:
        parts = [
            [n for b in choose(rows.to_batches(max_chunksize=size), window.select(split, NEW_YEAR))
             for n in b.column("n").to_pylist()]
            for size in (7, 1000, 10 * every)
        ]  # fmt: skip
        assert parts[0] == parts[1] == parts[2]
        found[split] = set(parts[0])
    assert found["train"] | found["holdout"] == set(range(10 * every))
    assert not found["train"] & found["holdout"]
    for start in range(0, 10 * every, every):
        assert len(found["holdout"] & set(range(start, start + every))) == of


def test_every_nth_row_is_the_last_of_its_group() -> None:
    mask = Numbered(held=True, of=1, every=5).mask(3, 8)
    assert mask.to_pylist() == [(n % 5) == 4 for n in range(3, 11)]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 0.0001, float("nan")])
def test_a_share_that_empties_a_split_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between"):
        Fraction(share)


@pytest.mark.parametrize("kind", [Months, Days])
@pytest.mark.parametrize("counts", [(0, None), (1, 0), (-1, 3)])
def test_a_window_without_time_is_refused(kind: type, counts: tuple[int, int | None]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        kind("day", *counts)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (pa.field("other", pa.date32(), nullable=False), "must be declared in the source's schema"),
        (pa.field("day", pa.string(), nullable=False), "got 'day': string"),
        (pa.field("day", pa.date32()), "date32.*, nullable"),
    ],
)
def test_a_time_column_that_cannot_divide_rows_is_refused(field: pa.Field, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        check_window(Months("day"), pa.schema([field]))


def test_an_interval_overlaps_what_shares_a_day_with_it() -> None:
    interval = Interval("day", date(2013, 3, 1), date(2013, 4, 1))
    open_ended = Interval("day", None, date(2013, 4, 1))
    for first, after, inside in (
        (date(2013, 2, 1), date(2013, 3, 1), False),
        (date(2013, 2, 1), date(2013, 3, 2), True),
        (date(2013, 3, 31), date(2013, 4, 1), True),
        (date(2013, 4, 1), date(2013, 5, 1), False),
    ):
        assert interval.overlaps(first, after) is inside
        assert open_ended.overlaps(first, after) is (first < date(2013, 4, 1))


def test_a_split_without_rows_is_refused() -> None:
    empty = pa.record_batch({"n": pa.array([], pa.int8())})
    with pytest.raises(DataError, match="the train split must have rows; there are none in here"):
        list(require_rows([empty], "train", "here"))
    one = pa.record_batch({"n": pa.array([1], pa.int8())})
    assert pc.sum(next(iter(require_rows([one], "train", "here"))).column("n")).as_py() == 1
