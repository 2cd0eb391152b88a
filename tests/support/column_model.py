"""A small ONNX model that takes rows as they are: a column of each type, a vocabulary inside."""

import numpy as np
from onnx import ModelProto, TensorProto, helper

from components.contract import ModelMetadata, TensorSpec
from components.data.encoding import Encoding

VOCABULARY = ("AA", "UA")
METADATA = ModelMetadata(
    inputs=(
        TensorSpec(name="carrier", dtype="string", shape=("batch",)),
        TensorSpec(name="hour", dtype="int64", shape=("batch",)),
        TensorSpec(name="distance", dtype="float64", shape=("batch",), unit="miles"),
        TensorSpec(name="night", dtype="bool", shape=("batch",)),
    ),
    outputs=(
        TensorSpec(name="score", dtype="float32", shape=("batch",)),
        TensorSpec(name="parts", dtype="float32", shape=("batch", 2)),
        TensorSpec(name="label", dtype="string", shape=("batch",)),
    ),
    classes=("on time", "late"),
    description="a rule with columns",
)
ROWS = {
    "carrier": np.array(["AA", "UA", "", "ZZ"]),
    "hour": np.array([1, 2, 3, 4]),
    "distance": np.array([10.0, np.nan, 30.0, -5.0]),
    "night": np.array([False, True, True, False]),
}
"""The second lacks its distance, the third its carrier, and the last has an unknown one."""


def column_model(factor: float = 1.0) -> ModelProto:
    """``score`` = factor * (code of the carrier + hour + distance or 0 + night)."""
    kinds = {"string": TensorProto.STRING, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    kinds |= {"float64": TensorProto.DOUBLE, "float32": TensorProto.FLOAT}

    def values(specs: tuple[TensorSpec, ...]) -> list[object]:
        return [helper.make_tensor_value_info(s.name, kinds[s.dtype], s.shape) for s in specs]

    def constant(name: str, kind: int, content: list[object], *shape: int) -> object:
        return helper.make_tensor(name, kind, shape, content)

    single = {"to": TensorProto.FLOAT}
    nodes = [
        helper.make_node(
            "LabelEncoder",
            ["carrier"],
            ["code"],
            domain="ai.onnx.ml",
            keys_strings=VOCABULARY,
            values_int64s=range(1, 1 + len(VOCABULARY)),
            default_int64=0,
        ),
        helper.make_node("Add", ["code", "hour"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["whole_f"], **single),
        helper.make_node("Cast", ["distance"], ["far"], **single),
        helper.make_node("IsNaN", ["far"], ["gone"]),
        helper.make_node("Where", ["gone", "zero", "far"], ["known"]),
        helper.make_node("Cast", ["night"], ["night_f"], **single),
        helper.make_node("Sum", ["whole_f", "known", "night_f"], ["sum"]),
        helper.make_node("Mul", ["sum", "factor"], ["score"]),
        helper.make_node("Unsqueeze", ["score", "last"], ["one"]),
        helper.make_node("Concat", ["one", "one"], ["parts"], axis=1),
        helper.make_node("Greater", ["score", "bound"], ["high"]),
        helper.make_node("Cast", ["high"], ["class"], to=TensorProto.INT64),
        helper.make_node(
            "LabelEncoder",
            ["class"],
            ["label"],
            domain="ai.onnx.ml",
            keys_int64s=[0, 1],
            values_strings=METADATA.classes,
            default_string="",
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "columns",
        values(METADATA.inputs),
        values(METADATA.outputs),
        [
            constant("zero", TensorProto.FLOAT, [0.0]),
            constant("factor", TensorProto.FLOAT, [factor]),
            constant("bound", TensorProto.FLOAT, [10.0]),
            constant("last", TensorProto.INT64, [1], 1),
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    helper.set_model_props(
        model,
        {
            "assay.metadata": METADATA.model_dump_json(),
            "assay.encoding": Encoding().model_dump_json(),
        },
    )
    return model


def answers(factor: float = 1.0) -> dict[str, np.ndarray]:
    """What the model gives for :data:`ROWS`."""
    score = np.float32(factor) * np.array([12.0, 5.0, 34.0, -1.0], np.float32)
    label = np.array(["late" if value > 10 else "on time" for value in score])
    return {"score": score, "parts": np.stack([score, score], axis=1), "label": label}
