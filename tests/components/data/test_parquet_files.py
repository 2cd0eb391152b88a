"""Parquet files: what is read, what is not even opened, and faults by file and column."""

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.contract import Split
from components.data.parquet_files import ParquetSource
from components.data.schema import RowSchema
from components.data.windows import Days, Fraction, Months, Window
from components.errors import ContractError, DataError

NEW_YEAR = date(2014, 1, 1)
SCHEMA = RowSchema(
    pa.schema(
        [
            pa.field("id", pa.int32(), nullable=False),
            pa.field("day", pa.date32(), nullable=False),
            pa.field("word", pa.string()),
            pa.field("size", pa.float32()),
        ]
    )
)
YEAR = [date(2013, 1, 1) + timedelta(days=i) for i in range(365)]
MONTHLY = {"month": "%Y-%m"}


def table(days: list[date]) -> pa.Table:
    """One row per day; the id is the day of the year."""
    ids = [day.timetuple().tm_yday for day in days]
    words = [None if i % 7 == 0 else f"w{i % 5}" for i in ids]
    return pa.table([ids, days, words, [i / 3 for i in ids]], schema=SCHEMA.arrow)


def source(
    path: object, window: Window | None = None, schema: RowSchema = SCHEMA, **options: Any
) -> ParquetSource:
    return ParquetSource(str(path), schema, window or Months("day"), **options)


def read(made: ParquetSource, split: Split = "train", as_of: date = NEW_YEAR) -> pa.Table:
    return pa.Table.from_batches(made.batches(split, as_of), schema=made.schema().arrow)


@pytest.fixture
def months(tmp_path: Path) -> Path:
    """A year in twelve hive partitions."""
    for number in range(1, 13):
        folder = tmp_path / "rows" / f"month=2013-{number:02d}"
        folder.mkdir(parents=True)
        pq.write_table(table([day for day in YEAR if day.month == number]), folder / "a.parquet")
    return tmp_path / "rows"


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """A year in one file, with a row group for every ten days."""
    pq.write_table(table(YEAR), tmp_path / "year.parquet", row_group_size=10)
    return tmp_path / "year.parquet"


def damage(path: Path) -> None:
    path.write_bytes(b"spoilt")


def test_the_window_is_cut_from_all_files(months: Path) -> None:
    made = source(months)
    made.prepare()
    assert made.schema() is SCHEMA
    assert made.excluded(NEW_YEAR) == {}
    assert made.window(NEW_YEAR) == "train before 2013-12, hold out 2013-12"
    assert read(made).equals(table(YEAR[:334]))
    assert read(made, "holdout").equals(table(YEAR[334:]))
    partitioned = source(months, partitioned_by=MONTHLY)
    for split in ("train", "holdout"):
        assert read(partitioned, split).equals(read(made, split))


def test_partitions_outside_of_the_window_are_not_opened(months: Path) -> None:
    made = source(months, Months("day", holdout=2, train=3), partitioned_by=MONTHLY)
    as_of = date(2013, 8, 15)
    expected = {split: read(made, split, as_of) for split in ("train", "holdout")}
    inside = {"train": (3, 4, 5), "holdout": (6, 7)}
    for number in set(range(1, 13)) - {3, 4, 5, 6, 7}:
        damage(months / f"month=2013-{number:02d}" / "a.parquet")
    for split, numbers in inside.items():
        assert read(made, split, as_of).equals(expected[split])
        assert {day.month for day in expected[split]["day"].to_pylist()} == set(numbers)
    damage(months / "month=2013-04" / "a.parquet")
    with pytest.raises(DataError, match=r"month=2013-04/a\.parquet is not"):
        read(made, "train", as_of)


@pytest.mark.parametrize(
    ("folders", "formats"),
    [
        ("year={d:%Y}/month={d.month}", {"year": "%Y", "month": "%m"}),
        ("day={d:%Y-%m-%d}", {"day_of_row": "%Y-%m-%d"}),
        ("year={d:%Y}", {"year": "%Y"}),
    ],
)
def test_partitions_may_be_of_any_size(
    tmp_path: Path, folders: str, formats: dict[str, str]
) -> None:
    folders = folders.replace("day=", "day_of_row=")
    for day in YEAR[::9]:
        folder = tmp_path / folders.format(d=day)
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([day]), folder / f"{day}.parquet")
    made = source(tmp_path, Months("day", train=2), partitioned_by=formats)
    unpartitioned = source(tmp_path, Months("day", train=2))
    for split in ("train", "holdout"):
        assert read(made, split).num_rows >= 3
        assert read(made, split).equals(read(unpartitioned, split))


def test_row_groups_outside_of_the_window_are_not_read(one_file: Path) -> None:
    metadata = pq.read_metadata(one_file)
    content = bytearray(one_file.read_bytes())
    june = range(16, 18)  # 10 June to 29 June
    for number in set(range(metadata.num_row_groups)) - set(june):
        for place in range(metadata.num_columns):
            column = metadata.row_group(number).column(place)
            start = column.dictionary_page_offset or column.data_page_offset
            content[start : start + column.total_compressed_size] = (
                b"\xff" * column.total_compressed_size
            )
    one_file.write_bytes(bytes(content))
    made = source(one_file, Days("day", holdout=10, train=10))
    assert read(made, "train", date(2013, 6, 30)).equals(table(YEAR[160:170]))
    assert read(made, "holdout", date(2013, 6, 30)).equals(table(YEAR[170:180]))
    with pytest.raises(DataError, match=r"year\.parquet is not"):
        read(made, "holdout", date(2013, 7, 30))


def test_an_object_store_is_read_as_a_folder_is(months: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in months.rglob("*.parquet"):
        name = path.relative_to(months)
        memory.pipe_file(f"/parquet-bucket/{name}", path.read_bytes())
    made = source("memory://parquet-bucket", partitioned_by=MONTHLY)
    for split in ("train", "holdout"):
        assert read(made, split).equals(read(source(months), split))
    memory.rm("/parquet-bucket", recursive=True)


def test_rows_by_number_run_on_from_file_to_file(months: Path) -> None:
    made = source(months, Fraction(0.1))
    assert read(made, "holdout").column("id").to_pylist() == list(range(10, 366, 10))
    assert read(made).num_rows == 365 - 36


def test_a_partition_may_be_a_column_of_the_rows(tmp_path: Path) -> None:
    fields = [*SCHEMA.arrow, pa.field("region", pa.string()), pa.field("shop", pa.int16())]
    schema = RowSchema(pa.schema(fields))
    for region, shop in (("a%2Fb", 3), ("__HIVE_DEFAULT_PARTITION__", 4)):
        folder = tmp_path / f"region={region}" / f"shop={shop}"
        folder.mkdir(parents=True)
        pq.write_table(table(YEAR[330:340]), folder / "a.parquet")
    found = read(source(tmp_path, schema=schema), "holdout")
    assert found.schema.equals(schema.arrow)
    assert found.column("region").to_pylist() == [None] * 6 + ["a/b"] * 6
    assert found.column("shop").to_pylist() == [4] * 6 + [3] * 6


def test_a_partition_may_be_named_in_another_zone_than_the_column_has(tmp_path: Path) -> None:
    kind = pa.timestamp("us", "America/New_York")
    schema = RowSchema(pa.schema([pa.field("at", kind, nullable=False)]))
    # These are November in UTC, December in UTC but November in New York, and December in both.
    instants = pa.array(["2013-11-30T12:00Z", "2013-12-01T03:00Z", "2013-12-01T06:00Z"])
    for place, month in enumerate(("2013-11", "2013-12", "2013-12")):
        folder = tmp_path / f"month={month}"
        folder.mkdir(exist_ok=True)
        rows = pa.table([instants.slice(place, 1).cast(kind)], schema=schema.arrow)
        pq.write_table(rows, folder / f"{place}.parquet")
    made = source(tmp_path, Months("at"), schema, partitioned_by=MONTHLY)
    assert (read(made).num_rows, read(made, "holdout").num_rows) == (2, 1)


def test_the_time_column_may_be_a_partition(tmp_path: Path) -> None:
    for day in YEAR[:60]:
        folder = tmp_path / f"day={day}"
        folder.mkdir()
        pq.write_table(table([day]).drop_columns(["day"]), folder / "a.parquet")
    made = source(tmp_path, partitioned_by={"day": "%Y-%m-%d"})
    damage(tmp_path / "day=2013-01-10" / "a.parquet")
    assert read(made, "holdout", date(2013, 3, 1)).equals(table(YEAR[31:59]))
    with pytest.raises(DataError, match="day=2013-01-10"):
        read(made, "train", date(2013, 3, 1))


def test_timestamps_are_divided_at_midnight(tmp_path: Path) -> None:
    schema = RowSchema(pa.schema([pa.field("at", pa.timestamp("us"), nullable=False)]))
    column = pa.array(["2013-11-30T23:59:59.999999", "2013-12-01"]).cast(pa.timestamp("us"))
    pq.write_table(pa.table([column], schema=schema.arrow), tmp_path / "a.parquet")
    for place, split in enumerate(("train", "holdout")):
        found = read(source(tmp_path, Months("at"), schema), split)
        assert found.column("at").to_pylist() == [column[place].as_py()]


@pytest.mark.parametrize(
    ("place", "column"),
    [
        (0, lambda ids: ids.cast(pa.int8(), safe=False)),
        (2, lambda words: words.dictionary_encode()),
        (2, lambda words: words.cast(pa.large_string())),
        (3, lambda sizes: sizes.cast(pa.float16(), safe=False)),
    ],
)
def test_a_file_of_a_narrower_type_is_cast(months: Path, place: int, column: Any) -> None:
    path = months / "month=2013-01" / "a.parquet"
    rows = table(YEAR[:31])
    rows = rows.set_column(place, SCHEMA.names[place], column(rows.column(place)))
    pq.write_table(rows, path)
    found = read(source(months)).slice(0, 31)
    assert found.schema.equals(SCHEMA.arrow)
    expected = rows.column(place).to_pylist()
    assert found.column(place).to_pylist() == expected


@pytest.mark.parametrize(
    ("place", "column", "words"),
    [
        (0, pa.array(range(31), pa.int64()), "'id' must be int32; found int64"),
        (0, pa.array([str(i) for i in range(31)]), "'id' must be int32; found string"),
        (1, pa.array([str(d) for d in YEAR[:31]]), r"'day' must be date32\[day\]; found string"),
        (2, pa.array(range(31)), "'word' must be string; found int64"),
        (3, pa.array([0.1] * 31), "'size' must be float; found double"),
    ],
)
def test_a_type_that_changed_midway_is_told_by_file_and_column(
    months: Path, place: int, column: pa.Array, words: str
) -> None:
    rows = table([day for day in YEAR if day.month == 5])
    rows = rows.set_column(place, SCHEMA.names[place], [column])
    pq.write_table(rows, months / "month=2013-05" / "b.parquet")
    batches = source(months).batches("train", NEW_YEAR)
    assert next(batches).num_rows == 31, "the files before are good"
    with pytest.raises(DataError, match=words) as caught:
        list(batches)
    assert "month=2013-05/b.parquet" in str(caught.value)


def test_a_missing_column_is_told_by_file(months: Path) -> None:
    pq.write_table(
        table(YEAR[31:40]).drop_columns(["size"]), months / "month=2013-02" / "a.parquet"
    )
    with pytest.raises(DataError, match=r"month=2013-02/a\.parquet: 'size' is there 0 times"):
        read(source(months))


def test_a_damaged_file_is_refused(months: Path) -> None:
    path = months / "month=2013-02" / "a.parquet"
    for content in (b"", b"spoilt", path.read_bytes()[:-10]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"month=2013-02/a\.parquet is not.*Write the file"):
            read(source(months))


def test_a_page_that_changed_is_refused_where_it_has_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        table(YEAR), path, write_page_checksum=True, compression="none", use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(3)
    content[column.data_page_offset + column.total_compressed_size - 50] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a\.parquet is not.*(CRC|checksum)"):
        read(source(path))


@pytest.mark.parametrize("name", ["month=July", "week=27", "month=__HIVE_DEFAULT_PARTITION__"])
def test_a_file_in_no_partition_is_refused(months: Path, name: str) -> None:
    (months / name).mkdir()
    pq.write_table(table(YEAR[:1]), months / name / "a.parquet")
    with pytest.raises(DataError, match=rf"named month=%Y-%m; .*{name}/a\.parquet does not"):
        read(source(months, partitioned_by=MONTHLY))


def test_rows_in_the_wrong_partition_are_refused(months: Path) -> None:
    pq.write_table(table(YEAR[:1]), months / "month=2013-02" / "b.parquet")
    with pytest.raises(DataError, match=r"times that its name says; .*month=2013-02/b\.parquet"):
        read(source(months, partitioned_by=MONTHLY))


@pytest.mark.parametrize("formats", [{"month": "%m"}, {"week": "%Y-%W"}, {"hour": "%H"}])
def test_formats_that_do_not_name_a_time_are_refused(formats: dict[str, str]) -> None:
    with pytest.raises(ContractError, match="strftime"):
        source("rows", partitioned_by=formats)


def test_partitions_need_a_window_in_time() -> None:
    with pytest.raises(ContractError, match="window by row number"):
        source("rows", Fraction(), partitioned_by=MONTHLY)


def test_no_files_and_an_empty_split_are_refused(months: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are none at"):
        read(source(tmp_path / "nothing"))
    with pytest.raises(DataError, match="the holdout split must have rows"):
        read(source(months), "holdout", date(2015, 1, 1))
    with pytest.raises(DataError, match="the train split must have rows"):
        read(source(months, partitioned_by=MONTHLY), "train", date(2013, 2, 1))
