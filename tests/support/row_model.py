"""A small hand-made graph that takes rows as they are, with its golden file.

Legend: B = rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from components.export.golden import write_golden

ROWS_B = 64
CARRIERS = ("AA", "B6", "zürich ✈")
CLASSES = ("on time", "late")
INPUTS = {
    "carrier": TensorProto.STRING,
    "distance": TensorProto.DOUBLE,
    "seats": TensorProto.INT64,
    "weekend": TensorProto.BOOL,
}
OUTPUTS = {"probability": TensorProto.FLOAT, "label": TensorProto.STRING}


def rows() -> dict[str, Any]:
    """Rows with every kind of value: known, unknown and missing text, NaN, integers, booleans."""
    generator = np.random.default_rng(0)
    distance_B = generator.normal(500, 100, ROWS_B)
    distance_B[[1, 9]] = np.nan
    return {
        "carrier": generator.choice(np.array([*CARRIERS, "", "never seen"]), ROWS_B),
        "distance": distance_B,
        "seats": generator.integers(0, 300, ROWS_B),
        "weekend": generator.random(ROWS_B) < 0.5,
    }


def row_model(unknown_operator: bool = False) -> ModelProto:
    """Look up the text, impute, weigh, and name the class."""
    node = helper.make_node
    lookup = {"keys_strings": CARRIERS, "values_int64s": [1, 2, 3], "default_int64": 0}
    naming = {"keys_int64s": [0, 1], "values_strings": CLASSES, "default_string": ""}
    nodes: list[NodeProto] = [
        node("LabelEncoder", ["carrier"], ["code"], domain="ai.onnx.ml", **lookup),
        node("Gather", ["table", "code"], ["embedded"], axis=0),
        node("IsNaN", ["distance"], ["missing"]),
        node("Where", ["missing", "mean", "distance"], ["known"]),
    ]
    for source in ("known", "seats", "weekend"):
        nodes += [
            node("Cast", [source], [f"{source}_f"], to=TensorProto.FLOAT),
            node("Unsqueeze", [f"{source}_f", "axis"], [f"{source}_B1"]),
        ]
    last = "NoSuchOperator" if unknown_operator else "Sigmoid"
    nodes += [
        node("Concat", ["embedded", "known_B1", "seats_B1", "weekend_B1"], ["x"], axis=1),
        node("MatMul", ["x", "weights"], ["logit_B1"]),
        node("Squeeze", ["logit_B1", "axis"], ["logit"]),
        node(last, ["logit"], ["probability"]),
        node("GreaterOrEqual", ["probability", "half"], ["is_late"]),
        node("Cast", ["is_late"], ["index"], to=TensorProto.INT64),
        node("LabelEncoder", ["index"], ["label"], domain="ai.onnx.ml", **naming),
    ]
    constants = {
        "table": np.array([[0, 0], [1, -1], [0.5, 2], [-1, -1.5]], np.float32),
        "mean": np.array(500.0),
        "axis": np.array([1]),
        "weights": np.array([[1], [1], [0.002], [-0.008], [0.3]], np.float32),
        "half": np.array(0.5, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info(name, kind, ["batch"]) for name, kind in INPUTS.items()],
        [helper.make_tensor_value_info(name, kind, ["batch"]) for name, kind in OUTPUTS.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def answers(model: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """The outputs of onnxruntime for Python; text comes as NumPy's unicode."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feed = {k: v.astype(object) if v.dtype.kind == "U" else v for k, v in inputs.items()}
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))
    return {k: v.astype(np.str_) if v.dtype.kind == "O" else v for k, v in found.items()}


def write_version(folder: Path) -> Path:
    """A folder like a version's: the model and its golden file."""
    folder.mkdir()
    model = row_model()
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    write_golden(folder / "golden.npz", rows(), answers(folder / "model.onnx", rows()))
    return folder


def write_tensors(folder: Path) -> Path:
    """The network alone, beside the model: what an engine without strings is tried on."""
    node = helper.make_node
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Softmax", ["y"], ["p"], axis=1)]
    weights = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "tensors",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, folder / "tensor.onnx")
    x = np.random.default_rng(2).normal(size=(ROWS_B, 3)).astype(np.float32)
    write_golden(folder / "tensor_golden.npz", {"x": x}, answers(folder / "tensor.onnx", {"x": x}))
    return folder
