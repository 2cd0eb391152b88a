"""The files of a page, and what its form asks for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.row_model import CARRIERS, CLASSES, row_model, rows

from components.contract import ModelMetadata, TensorSpec
from components.data.encoding import Categorical, Encoding, Folded, Numeric
from components.errors import ConfigError, DataError
from components.export.golden import write_golden
from components.export.raw_columns import RawColumn, RawColumns
from components.smoke_test.engines.child import ORT_WEB_FILES
from components.web_page import ASSETS, EXAMPLES, build_page

COLUMNS = RawColumns(
    columns=(
        RawColumn(name="carrier", dtype="string", missing=True),
        RawColumn(name="distance", dtype="float64", missing=True),
        RawColumn(name="seats", dtype="int64", missing=False),
        RawColumn(name="weekend", dtype="bool", missing=False),
    )
)
ENCODING = Encoding(
    categorical=(Categorical(column="carrier", vocabulary=CARRIERS),),
    numeric=(
        Numeric(column="distance", mean=500, std=100, quantiles=(100, 450, 900)),
        Numeric(column="seats", mean=150, std=50, quantiles=(2, 300)),
        Numeric(column="weekend", mean=0.3, std=0.4, quantiles=(0, 1)),
    ),
)
METADATA = ModelMetadata(
    inputs=COLUMNS.specs(),
    outputs=(
        TensorSpec(name="probability", dtype="float32", shape=("batch",)),
        TensorSpec(name="label", dtype="string", shape=("batch",)),
    ),
    classes=CLASSES,
    description="whether a trip is late",
)


def save(path: Path, **properties: str) -> Path:
    model = row_model()
    for key, value in properties.items():
        model.metadata_props.add(key=f"assay.{key}", value=value)
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(
        tmp_path / "model.onnx",
        metadata=METADATA.model_dump_json(),
        encoding=ENCODING.model_dump_json(),
        columns=COLUMNS.model_dump_json(),
    )


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Any]:
    """Assets and packages that are there by name."""
    assets, web = tmp_path / "web", tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    for folder, names in ((assets, ASSETS), (web, ORT_WEB_FILES)):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(name)
    return {
        "name": "trips",
        "version": 7,
        "assets": assets,
        "node_modules": tmp_path / "node_modules",
        "folder": tmp_path / "out" / "page",
    }


def built(places: dict[str, Any]) -> Any:
    return json.loads((places["folder"] / "schema.json").read_text(encoding="utf-8"))


def test_the_folder_holds_all_that_the_page_needs(model: Path, places: dict[str, Any]) -> None:
    for _ in range(2):  # again over itself
        sizes = build_page(model, None, **places)
    folder = places["folder"]
    found = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert found == sizes
    named = {"model.onnx", "schema.json", *ASSETS, *(f"ort/{name}" for name in ORT_WEB_FILES)}
    assert set(found) == named
    assert (folder / "model.onnx").read_bytes() == model.read_bytes()


def test_the_form_follows_from_the_metadata(model: Path, places: dict[str, Any]) -> None:
    build_page(model, None, **places)
    schema = built(places)
    assert (schema["name"], schema["version"], schema["classes"]) == ("trips", 7, [*CLASSES])
    assert schema["title"] == "whether a trip is late"
    assert schema["outputs"] == ["probability"]
    assert schema["groups"] == [
        {"title": "Columns", "columns": ["carrier", "distance", "seats", "weekend"]}
    ]
    assert schema["columns"]["carrier"]["values"] == [*CARRIERS]
    distance = {"dtype": "float64", "title": "Distance", "unit": "", "kind": "number"}
    assert schema["columns"]["distance"] == {**distance, "low": 100, "typical": 450, "high": 900}
    kinds = {name: column["kind"] for name, column in schema["columns"].items()}
    assert kinds == {
        "carrier": "choice", "distance": "number", "seats": "number", "weekend": "flag"
    }  # fmt: skip
    assert schema["examples"] == []


def test_golden_rows_are_examples_without_numbers_that_json_has_not(
    model: Path, places: dict[str, Any], tmp_path: Path
) -> None:
    golden = tmp_path / "golden.npz"
    write_golden(golden, rows(), {"probability": np.zeros(64)})
    build_page(model, golden, **places)
    examples = built(places)["examples"]
    assert len(examples) == EXAMPLES
    assert examples[1]["distance"] is None
    assert examples[0]["seats"] == int(rows()["seats"][0])
    assert [e["carrier"] for e in examples] == rows()["carrier"][:EXAMPLES].tolist()


def test_a_pipeline_has_its_own_words(model: Path, places: dict[str, Any]) -> None:
    group = {"seats": {"title": "Seats sold", "unit": "people"}, "gone": {}}
    words = {"title": "Late?", "groups": {"Plane": group, "Empty": {"gone too": {}}}}
    (places["assets"] / "trips.json").write_text(json.dumps(words))
    build_page(model, None, **places)
    schema = built(places)
    assert schema["title"] == "Late?"
    assert schema["groups"] == [
        {"title": "Plane", "columns": ["seats"]},
        {"title": "Other", "columns": ["carrier", "distance", "weekend"]},
    ]
    assert schema["columns"]["seats"]["unit"] == "people"
    (places["assets"] / "trips.json").write_text('{"heading": "Late?"}')
    with pytest.raises(ConfigError, match="must hold words for a page; it has 1 faults"):
        build_page(model, None, **places)


def test_a_model_without_columns_has_no_page(places: dict[str, Any], tmp_path: Path) -> None:
    images = RawColumns(columns=(), folded=(Folded(column="image", shape=(8, 8)),))
    path = save(tmp_path / "images.onnx", columns=images.model_dump_json())
    with pytest.raises(ConfigError, match="this one takes image. Use it from code instead"):
        build_page(path, None, **places)
    with pytest.raises(ConfigError, match="this one takes none"):
        build_page(save(tmp_path / "foreign.onnx"), None, **places)
    path.write_bytes(b"\x08\x09 no protobuf")
    with pytest.raises(DataError, match=r"images.onnx must be an ONNX model; got DecodeError"):
        build_page(path, None, **places)
    assert not places["folder"].exists()


def test_missing_files_are_named(model: Path, places: dict[str, Any]) -> None:
    missing = places["node_modules"] / "onnxruntime-web" / "dist" / ORT_WEB_FILES[2]
    missing.unlink()
    with pytest.raises(ConfigError) as refused:
        build_page(model, None, **places)
    assert f"a page needs {missing}, which is not there. Run 'make engines'" in str(refused.value)


def test_the_words_of_flights_name_its_columns(checkout: Path) -> None:
    from components.pipelines.flights import pipeline

    words = json.loads((checkout / "deploy" / "web" / "flights.json").read_text(encoding="utf-8"))
    named = [column for group in words["groups"].values() for column in group]
    features = pipeline.features
    assert sorted(named) == sorted([*features.categorical, *features.numeric])
