"""The loader that travels with a version: rows as pandas has them, to arrays as the graph wants."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.column_model import ROWS, answers, column_model

from components.register import assay_rows
from components.register.provenance import LOADER, LOADERS


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("columns") / "model.onnx"
    path.write_bytes(column_model().SerializeToString())
    return assay_rows._load_pyfunc(str(path))


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({**{name: values.tolist() for name, values in ROWS.items()}, **columns})


def test_a_changed_loader_needs_a_new_name() -> None:
    content = Path(assay_rows.__file__).read_bytes()
    assert LOADERS[LOADER] == hashlib.sha256(content).hexdigest(), (
        "two versions may be loaded into one process: call the changed loader assay_rows_2, and "
        "keep the digest of the old one in LOADERS"
    )


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, ""])
@pytest.mark.parametrize("dtype", ["str", "string", "object", "category"])
def test_text_of_every_type_and_missing_text_are_taken(
    loaded: Any, dtype: str, missing: Any
) -> None:
    carriers = pd.Series(["AA", "UA", missing, "ZZ"], dtype="object").astype(dtype)
    found = loaded.predict(frame(carrier=carriers))
    assert list(found.columns) == ["score", "parts", "label"]
    assert found["score"].tolist() == answers()["score"].tolist()
    assert found["label"].tolist() == answers()["label"].tolist()
    assert found["parts"].tolist() == answers()["parts"].tolist()


@pytest.mark.parametrize("dtype", ["object", "float64", "Float64", "float64[pyarrow]"])
def test_missing_numbers_are_nan(loaded: Any, dtype: str) -> None:
    given = pd.Series([10.0, None, 30.0, -5.0], dtype=dtype)
    found = loaded.predict(frame(distance=given))
    assert found["score"].tolist() == answers()["score"].tolist()


def test_rows_keep_their_index_and_other_columns_are_ignored(loaded: Any) -> None:
    rows = frame(other=["x"] * 4)[["other", "night", "distance", "hour", "carrier"]]
    rows.index = pd.Index([7, 5, 3, 1])
    found = loaded.predict(rows)
    assert found.index.tolist() == [7, 5, 3, 1]
    assert found["score"].tolist() == answers()["score"].tolist()


def test_no_rows_give_no_answers(loaded: Any) -> None:
    assert loaded.predict(frame().iloc[:0]).shape == (0, 3)


def test_arrays_give_arrays(loaded: Any) -> None:
    found = loaded.predict(dict(ROWS))
    for name, wanted in answers().items():
        np.testing.assert_array_equal(found[name], wanted)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"hour": [1, None, 3, 4]}, "'hour' must hold int64 in every row; 1 lack it"),
        ({"night": [True, None, True, False]}, "'night' must hold bool in every row"),
        ({"hour": [1.5, 2, 3, 4]}, "'hour' must hold int64; it holds float64"),
        ({"hour": [2**64, 2, 3, 4]}, "'hour' must hold int64"),
        ({"hour": ["1", "2", "3", "4"]}, "'hour' must hold int64; it holds <U1"),
        ({"distance": ["far", "2", "3", "4"]}, "'distance' must hold float64"),
        ({"night": [0, 1, 1, 0]}, "'night' must hold bool; it holds int64"),
        ({"carrier": ["AA", 1, "", "ZZ"]}, r"'carrier' must hold text; it holds \['int'\]"),
    ],
)
def test_what_cannot_be_taken_is_refused(
    loaded: Any, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loaded.predict(frame(**columns))


def test_a_column_that_is_not_there_is_named(loaded: Any) -> None:
    with pytest.raises(ValueError, match=r"\['hour'\] are not there"):
        loaded.predict(frame().drop(columns="hour"))


def test_a_tensor_is_taken_as_array_rows_or_frame(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "negate",
        [value("x", TensorProto.FLOAT, ["batch", 2])],
        [value("y", TensorProto.FLOAT, ["batch", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    loaded = assay_rows._load_pyfunc(str(tmp_path / "model.onnx"))
    rows = np.array([[1.0, 2.0], [3.0, 4.0]])
    for given in (rows, {"x": rows.astype(np.float32)}):
        np.testing.assert_array_equal(loaded.predict(given)["y"], -rows)
    for given in (pd.DataFrame({"x": rows.tolist()}), pd.DataFrame(rows, columns=["a", "b"])):
        assert loaded.predict(given)["y"].tolist() == (-rows).tolist()
    with pytest.raises(ValueError, match="'x' must have 2 axes"):
        loaded.predict(rows[0])
    with pytest.raises(ValueError, match="'x' must have 2 axes and float32; it has 2 and <U1"):
        loaded.predict(rows.astype(str).astype("U1"))
