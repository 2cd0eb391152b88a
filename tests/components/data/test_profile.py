"""The profile of a run's data: figures that agree with the rows, and a picture of any columns."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from matplotlib.image import imread
from support.listed_rows import DAY, Listed

from components.data.encoding import Features
from components.data.flights import FlightsSource
from components.data.profile import TOP_VALUES, draw_profile, profile_json
from components.data.schema import RowSchema
from components.data.snapshot import Snapshot
from components.data.take import take_snapshot
from components.storage import Storage


@pytest.fixture
def flights(sampled: Path, tmp_path: Path) -> Snapshot:
    features = Features(label="late", classes=2)
    return take_snapshot(FlightsSource(sampled), features, DAY, Storage(tmp_path))


def test_the_figures_are_those_of_the_rows(flights: Snapshot) -> None:
    profile = json.loads(profile_json(flights))
    assert profile["fingerprint"] == flights.fingerprint
    for split in ("train", "holdout"):
        rows = flights.table(split)
        found = profile["splits"][split]
        assert found["rows"] == len(rows)
        assert list(found["columns"]) == rows.column_names
        dest = found["columns"]["dest"]
        counts = {v["values"]: v["counts"] for v in rows.column("dest").value_counts().to_pylist()}
        assert dest["distinct"] == len(counts)
        assert [count for _, count in dest["top"]] == sorted(counts.values())[
            : -TOP_VALUES - 1 : -1
        ]
        assert all(counts[value] == count for value, count in dest["top"])
        temp = found["columns"]["temp"]
        assert temp["missing"] == rows.column("temp").null_count
        assert temp["numbers"]["minimum"] == rows.column("temp").drop_null().to_numpy().min()
        assert len(temp["numbers"]["quantiles"]) > 2


def test_the_picture_shows_every_column_of_flights(flights: Snapshot) -> None:
    picture = imread(io.BytesIO(draw_profile(flights)))
    assert picture.shape[0] > 800
    assert picture.shape[1] > 1000
    assert picture.std() > 0.05, "it is not blank"


def test_columns_of_any_kind_can_be_drawn(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            pa.field("image", pa.list_(pa.float32(), 2), nullable=False),
            pa.field("nothing", pa.float32()),
            pa.field("constant", pa.float32()),
            pa.field("no word", pa.string()),
            pa.field("$strange_{name}", pa.string()),
            pa.field("at", pa.timestamp("us")),
            pa.field("day", pa.date32()),
            pa.field("label", pa.int8(), nullable=False),
        ]
    )
    values = [[[1.0, 2.0]] * 4, [None] * 4, [5.0] * 4, [None] * 4, ["$x_{", "é" * 90, "", None]]
    values += [[0, 1, None, 3], [None, 5, 5, 6], [0, 1, 0, 1]]
    rows = pa.table(
        [pa.array(v, f.type) for v, f in zip(values, schema, strict=True)], schema=schema
    )
    source = Listed(rows, rows.slice(1, 2), schema=RowSchema(schema))
    snapshot = take_snapshot(source, Features(label="label", classes=2), DAY, Storage(tmp_path))
    assert draw_profile(snapshot).startswith(b"\x89PNG\r\n")
    assert draw_profile(snapshot) == draw_profile(snapshot)
    assert json.loads(profile_json(snapshot))["splits"]["train"]["columns"]["nothing"]["count"] == 0
