"""A small model that takes raw rows, sound or broken in one place, and what it must answer."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

CARRIERS = ("AA", "B6", "UA")
INPUTS = {
    "carrier": TensorProto.STRING,
    "hour": TensorProto.INT64,
    "wind": TensorProto.DOUBLE,
    "wet": TensorProto.BOOL,
}
CONSTANTS: dict[str, npt.NDArray[Any]] = {
    "mean": np.array(0.5),
    "low": np.array(-4, np.float32),
    "high": np.array(24, np.float32),
    "scale": np.array(0.125, np.float32),
    "half": np.array(0.5, np.float32),
    "one": np.array(1, np.float32),
    "least": np.array([1]),
    "names": np.array(["on time", "late"], dtype=object),
}


def node(op: str, given: str, made: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, given.split(), made.split(), **attributes)


def lookup(**default: Any) -> onnx.NodeProto:
    values = {"values_floats": [1.0, 2.0, 3.0], "default_float": 0.0} | default
    return node(
        "LabelEncoder", "carrier", "code", domain="ai.onnx.ml", keys_strings=CARRIERS, **values
    )


SOUND = {
    "carrier": [lookup()],
    "wind": [
        node("IsNaN", "wind", "gone"),
        node("Where", "gone mean wind", "known"),
        node("Cast", "known", "wind_f", to=TensorProto.FLOAT),
        node("Clip", "wind_f low high", "wind_c"),
    ],
    "hour": [
        node("Cast", "hour", "hour_f", to=TensorProto.FLOAT),
        node("Clip", "hour_f low high", "hour_c"),
    ],
    "wet": [node("Cast", "wet", "wet_f", to=TensorProto.FLOAT)],
    "head": [
        node("Sum", "code wind_c hour_c wet_f", "sum"),
        node("Mul", "sum scale", "small"),
        node("Sub", "small one", "score"),
        node("Sigmoid", "score", "probability"),
    ],
    "label": [
        node("Greater", "probability half", "is_late"),
        node("Cast", "is_late", "index", to=TensorProto.INT64),
        node("Gather", "names index", "label"),
    ],
}

BROKEN = {
    "no imputation": {
        "wind": [
            node("Cast", "wind", "wind_f", to=TensorProto.FLOAT),
            node("Clip", "wind_f low high", "wind_c"),
        ]
    },
    "no code for the unknown": {"carrier": [lookup(default_float=float("nan"))]},
    "no clamp": {
        "wind": [
            *SOUND["wind"][:-1],
            node("Mul", "wind_f wind_f", "square"),
            node("Add", "square one", "more"),
            node("Div", "square more", "wind_c"),
        ]
    },
    "no clamp of integers": {
        "hour": [
            node("Cast", "hour", "hour_f", to=TensorProto.FLOAT),
            node("Mul", "hour_f hour_f", "square_h"),
            node("Mul", "square_h square_h", "fourth"),
            node("Add", "fourth one", "more_h"),
            node("Div", "fourth more_h", "hour_c"),
        ]
    },
    "a row for none": {
        "wet": [
            node("Shape", "wet", "count"),
            node("Max", "count least", "at_least_one"),
            node("ConstantOfShape", "at_least_one", "probability"),
            node("Cast", "wet", "wet_f", to=TensorProto.FLOAT),
        ],
        "head": [*SOUND["head"][:-1], node("Sigmoid", "score", "unused")],
    },
    "codes that are looked up": {
        "hour": [node("Gather", "hours hour", "hour_c")],
    },
}
"""Parts in place of the sound ones, by what they break."""


def raw_model(broken: str = "", *, columns: bool = True) -> bytes:
    """Bytes of the model; the last of :data:`BROKEN` refuses integers out of range, soundly."""
    parts = SOUND | BROKEN.get(broken, {})
    constants = CONSTANTS | {"hours": np.arange(24, dtype=np.float32)}
    graph = helper.make_graph(
        [each for part in parts.values() for each in part],
        "raw",
        [helper.make_tensor_value_info(name, kind, ["batch"]) for name, kind in INPUTS.items()],
        [
            helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info("label", TensorProto.STRING, ["batch"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 2)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if columns:
        helper.set_model_props(model, {"assay.columns": "[]"})
    return model.SerializeToString(deterministic=True)


def raw_rows() -> dict[str, npt.NDArray[Any]]:
    """Nine rows; no wind is missing, and one carrier is unknown."""
    rng = np.random.default_rng(0)
    return {
        "input/carrier": np.array([*CARRIERS, *CARRIERS, "ZZ", "AA", "UA"]),
        "input/hour": np.arange(9),
        "input/wind": rng.normal(size=9),
        "input/wet": np.arange(9) % 2 == 0,
    }


def raw_recorded(broken: str = "") -> dict[str, npt.NDArray[Any]]:
    """Rows with their answers, worked out by numpy for the sound model and each broken one."""
    rows = raw_rows()
    codes = np.array([(*CARRIERS, "ZZ").index(name) + 1 for name in rows["input/carrier"]])
    wind, hour = rows["input/wind"], rows["input/hour"].astype(float)
    if broken == "no code for the unknown":  # and so none is recorded
        rows["input/carrier"][6], codes[6] = "AA", 1
    if broken == "no clamp":
        wind = wind**2 / (1 + wind**2)
    if broken == "no clamp of integers":
        hour = hour**4 / (1 + hour**4)
    score = (codes % 4 + wind + hour + rows["input/wet"]) * 0.125 - 1
    probability = 1 / (1 + np.exp(-score)) if broken != "a row for none" else np.zeros(9)
    label = np.array(["on time", "late"])[(probability > 0.5).astype(int)]
    return rows | {"output/probability": probability.astype(np.float32), "output/label": label}
