"""The registry on real SQLite: versions, aliases, and the very bytes that were exported."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from components.adapters.mlflow_registry import (
    CHALLENGER,
    CHAMPION,
    MODEL_FILE,
    Registry,
    Version,
)
from components.adapters.mlflow_tracking import Tracking
from components.contract import ModelMetadata, TensorSpec
from components.errors import ConfigError, InfrastructureError
from components.settings import Settings

METADATA = ModelMetadata(
    inputs=(
        TensorSpec(name="numeric", dtype="float32", shape=("batch", 3)),
        TensorSpec(name="categorical", dtype="int64", shape=("batch", 1)),
    ),
    outputs=(TensorSpec(name="scores", dtype="float32", shape=("batch", 2)),),
    classes=("no", "yes"),
    description="a linear rule",
)
EXAMPLE = {"numeric": np.ones((2, 3), np.float32), "categorical": np.zeros((2, 1), np.int64)}
REQUIREMENTS = ["onnxruntime==1.0", "mlflow==3.0", "numpy==2.0"]
Create = Callable[..., Version]


def write_model(path: Path, factor: float = 1.0) -> Path:
    """A graph from two inputs to ``scores``."""
    weight = np.arange(6, dtype=np.float32).reshape(3, 2) * np.float32(factor)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["numeric", "weight"], ["product"]),
            helper.make_node("Cast", ["categorical"], ["offset"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["product", "offset"], ["scores"]),
        ],
        "linear",
        [
            helper.make_tensor_value_info("numeric", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("categorical", TensorProto.INT64, ["batch", 1]),
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"b": "2", "a": "1"})
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def make(tracking: Tracking, folder: Path, model: str, factor: float, **tags: str) -> Version:
    run_id = tracking.start_run(model, "run", {}, {"epochs": 2})
    return Registry(tracking, model).create(
        run_id,
        write_model(folder / f"exported-{factor}.onnx", factor),
        metadata=METADATA,
        example=EXAMPLE,
        requirements=REQUIREMENTS,
        tags=tags,
    )


@pytest.fixture(scope="session")
def made() -> dict[str, Version]:
    """Versions of the model ``read``, made on first use and only read."""
    return {}


@pytest.fixture
def read(tracking: Tracking, tmp_path: Path, made: dict[str, Version]) -> Registry:
    """A model with two versions that carry tags."""
    if not made:
        made["first"] = make(tracking, tmp_path, "read", 1.0, onnx_sha256="aa", seed="0")
        made["second"] = make(tracking, tmp_path, "read", 2.0, onnx_sha256="bb", seed="0")
    return Registry(tracking, "read")


@pytest.fixture
def aliased(tracking: Tracking, request: pytest.FixtureRequest) -> Registry:
    """A model of the test's own with two versions that have no files."""
    registry = Registry(tracking, request.node.name)
    tracking.client.create_registered_model(registry.model)
    for _ in range(2):
        tracking.client.create_model_version(registry.model, "runs:/none")
    return registry


def test_versions_are_counted(read: Registry, made: dict[str, Version]) -> None:
    assert (made["first"].number, made["second"].number) == (1, 2)
    assert made["first"].tags == {"onnx_sha256": "aa", "seed": "0"}


def test_a_version_is_found_by_all_its_tags(read: Registry, made: dict[str, Version]) -> None:
    assert read.find({"onnx_sha256": "bb"}) == made["second"]
    assert read.find({"onnx_sha256": "aa", "seed": "0"}) == made["first"]
    assert read.find({"onnx_sha256": "aa", "seed": "1"}) is None
    assert read.find({"onnx_sha256": "cc"}) is None
    assert read.find({"onnx_sha": "aa"}) is None


def test_the_oldest_of_several_is_found(read: Registry, made: dict[str, Version]) -> None:
    assert read.find({"seed": "0"}) == made["first"]


def test_versions_of_another_model_are_not_found(read: Registry, tracking: Tracking) -> None:
    assert Registry(tracking, "unheard of").find({"seed": "0"}) is None


def test_the_exported_bytes_come_back(
    read: Registry, made: dict[str, Version], tmp_path: Path
) -> None:
    for version, factor in ((made["first"], 1.0), (made["second"], 2.0)):
        into = tmp_path / f"into-{version.number}"
        into.mkdir()
        path = read.download(version.number, into)
        assert path.name == MODEL_FILE
        assert path.read_bytes() == write_model(tmp_path / "again.onnx", factor).read_bytes()
        onnx.checker.check_model(path)


def test_what_a_consumer_reads_lies_beside_the_model(
    read: Registry, made: dict[str, Version], tmp_path: Path
) -> None:
    from mlflow.models import Model

    folder = read.download(made["first"].number, tmp_path).parent
    assert (folder / "requirements.txt").read_text().split() == REQUIREMENTS
    model = Model.load(folder)
    assert model.flavors["onnx"]["data"] == MODEL_FILE
    inputs = {spec.name: (str(spec.type), spec.shape) for spec in model.signature.inputs}
    assert inputs == {"numeric": ("float32", (-1, 3)), "categorical": ("int64", (-1, 1))}
    outputs = [(spec.name, str(spec.type), spec.shape) for spec in model.signature.outputs]
    assert outputs == [("scores", "float32", (-1, 2))]
    example = json.loads((folder / "input_example.json").read_text())
    assert sorted(example) == sorted(EXAMPLE)


def test_the_files_lie_in_the_store_and_belong_to_the_run(
    read: Registry, made: dict[str, Version], store: Settings, tracking: Tracking
) -> None:
    version = tracking.client.get_model_version("read", str(made["first"].number))
    run = tracking.client.get_run(version.run_id)
    assert run.data.params == {"epochs": "2"}
    logged = tracking.client.get_logged_model(made["first"].source.removeprefix("models:/"))
    assert logged.source_run_id == version.run_id
    assert logged.experiment_id == run.info.experiment_id
    assert logged.artifact_location.startswith((store.root / "mlflow" / "artifacts").as_uri())
    assert version.tags == {"assay.onnx_sha256": "aa", "assay.seed": "0"}


def test_nothing_of_a_version_is_pickled(
    read: Registry, made: dict[str, Version], tmp_path: Path
) -> None:
    folder = read.download(made["first"].number, tmp_path).parent
    names = sorted(path.name for path in folder.rglob("*"))
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    assert "cloudpickle" not in (folder / "requirements.txt").read_text()


def test_a_version_that_is_gone_is_refused(read: Registry, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="refused: "):
        read.download(99, tmp_path)


def test_a_version_without_its_model_is_refused(
    tracking: Tracking, store: Settings, tmp_path: Path
) -> None:
    version = make(tracking, tmp_path, "emptied", 1.0)
    (tmp_path / "into").mkdir()
    for path in (store.root / "mlflow" / "artifacts" / "emptied").rglob(MODEL_FILE):
        path.unlink()
    with pytest.raises(
        InfrastructureError, match=r"emptied/1 must hold model\.onnx; it holds .*MLmodel"
    ):
        Registry(tracking, "emptied").download(version.number, tmp_path / "into")


def test_an_alias_names_one_version_at_a_time(aliased: Registry) -> None:
    assert aliased.by_alias(CHAMPION) is None
    aliased.set_alias(CHAMPION, 1)
    aliased.set_alias(CHALLENGER, 2)
    aliased.set_alias(CHAMPION, 2)
    found = aliased.by_alias(CHAMPION), aliased.by_alias(CHALLENGER)
    assert [version.number for version in found if version] == [2, 2]


def test_an_alias_is_dropped_only_by_the_version_that_carries_it(aliased: Registry) -> None:
    aliased.set_alias(CHALLENGER, 1)
    aliased.drop_alias(CHALLENGER, 2)
    assert aliased.by_alias(CHALLENGER) is not None
    aliased.drop_alias(CHALLENGER, 1)
    assert aliased.by_alias(CHALLENGER) is None
    aliased.drop_alias(CHALLENGER, 1)


def test_a_model_that_does_not_exist_has_no_champion(tracking: Tracking) -> None:
    registry = Registry(tracking, "unheard of")
    assert registry.by_alias(CHAMPION) is None
    registry.drop_alias(CHAMPION, 1)


def test_an_alias_for_no_version_is_refused(aliased: Registry) -> None:
    with pytest.raises(InfrastructureError, match="refused: "):
        aliased.set_alias(CHAMPION, 9)


def test_tags_of_a_version_have_the_prefix(aliased: Registry, tracking: Tracking) -> None:
    aliased.tag(1, {"decision": "promoted"})
    assert (
        tracking.client.get_model_version(aliased.model, "1").tags["assay.decision"] == "promoted"
    )
    found = aliased.find({"decision": "promoted"})
    assert found is not None
    assert found.number == 1
    with pytest.raises(InfrastructureError):
        aliased.tag(9, {"decision": "promoted"})


def test_a_run_that_does_not_exist_gets_no_version(tracking: Tracking, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="refused: "):
        Registry(tracking, "orphan").create(
            "0" * 32,
            write_model(tmp_path / "model.onnx"),
            metadata=METADATA,
            example=EXAMPLE,
            requirements=REQUIREMENTS,
            tags={},
        )
    assert Registry(tracking, "orphan").find({}) is None


@pytest.mark.parametrize("name", ["nobody's", 'a "b"', "100 %", ""])
def test_a_name_with_a_quote_is_looked_for_as_it_is(tracking: Tracking, name: str) -> None:
    assert Registry(tracking, name).versions() == []


def test_a_name_that_no_filter_can_hold_is_refused(tracking: Tracking) -> None:
    with pytest.raises(ConfigError, match="quotes of both kinds"):
        Registry(tracking, "a'b\"c").versions()
