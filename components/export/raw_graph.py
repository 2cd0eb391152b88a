"""The registered graph: rows in front of the network, the class label behind it.

Vocabularies become ``LabelEncoder`` nodes of ai.onnx.ml, numbers are cast to float32, and the
network follows unchanged, its imputation and normalisation inside. So a consumer needs no
preprocessing code, and training and serving cannot drift apart.

Every column is unfolded to (B, 1) before columns are joined: joined along the batch they would mix
rows when a consumer sends columns of different lengths; along the columns the runtime refuses that.

Source: https://onnx.ai/onnx/operators/onnx_aionnxml_LabelEncoder.html; in version 2 it maps text
and whole numbers, and every engine that has ai.onnx.ml has it.

Legend: B = batch, C = categorical columns, F = numeric columns, K = classes.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from components.contract import Arrays, Dtype, ModelMetadata, TensorSpec
from components.data.encoding import Categorical, Encoding
from components.errors import GateError
from components.export.onnx_file import COLUMNS_KEY, METADATA_KEY
from components.export.raw_columns import RawColumns

Array = npt.NDArray[np.generic]

LABEL = "label"
"""Name of the output that holds the class as text."""

ML_OPSET = 3
_NETWORK, _FRONT = "network/", "rows/"
_TYPES: Mapping[Dtype, int] = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "float64": TensorProto.DOUBLE,
    "string": TensorProto.STRING,
    "bool": TensorProto.BOOL,
}
_NO_CODE = float(-(2**63))  # as int64 the least one, which is no category
_LARGEST_CODE = float(2**62)


@dataclass
class _Part:
    """Nodes and constants of a graph under construction, with names that nothing else has."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        domain = "ai.onnx.ml" if kind == "LabelEncoder" else ""
        name = f"{output}/{kind}"
        made = helper.make_node(kind, inputs, [output], name=name, domain=domain, **attributes)
        self.nodes.append(made)
        return output

    def constant(self, name: str, value: Array) -> str:
        name = f"{_FRONT}{name}"
        self.constants.setdefault(name, numpy_helper.from_array(value, name))
        return name


def registered_metadata(described: ModelMetadata, columns: RawColumns) -> ModelMetadata:
    """What the registered graph takes and gives: the model's, with columns as inputs and a label.

    Raises:
        GateError: A column, an output and the label cannot be told apart by name.
    """
    folded = {item.column for item in columns.folded}
    as_declared = {spec.name: spec for spec in described.inputs if spec.name in folded}
    inputs = tuple(as_declared.get(spec.name, spec) for spec in columns.specs())
    outputs = described.outputs
    if label_source(described) is not None:
        spec = TensorSpec(name=LABEL, dtype="string", shape=_label_shape(described))
        outputs = (*outputs, spec)
    names = [spec.name for spec in (*inputs, *outputs)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise GateError(
            "export",
            [
                f"columns and outputs of the registered file must have names of their own; "
                f"{', '.join(twice)} stands for two. Rename the column in the data source, or the "
                "output in the model's metadata"
            ],
        )
    return described.model_copy(update={"inputs": inputs, "outputs": outputs})


def compose_graph(
    network: bytes,
    described: ModelMetadata,
    *,
    encoding: Encoding,
    columns: RawColumns,
    threshold: float,
) -> bytes:
    """Put the columns of rows in front of a network and the label behind it.

    Args:
        network: An exported file, with its properties; these travel on.
        described: The network's metadata.
        encoding: How columns become the network's inputs.
        columns: The columns, with their types.
        threshold: Where an output with one number a row turns to the second class.

    Returns:
        A file whose bytes follow from the arguments alone.

    Raises:
        GateError: As :func:`registered_metadata`.
    """
    metadata = registered_metadata(described, columns)
    model = onnx.ModelProto.FromString(network)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    part = _Part()
    _read_rows(part, encoding, columns)
    model = compose.add_prefix(model, _NETWORK, rename_outputs=False)
    label = _Part()
    source = label_source(described)
    if source is not None:
        _write_label(label, described, source, threshold)
    graph = model.graph
    nodes = [*part.nodes, *graph.node, *label.nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*part.constants.values(), *label.constants.values()])
    del graph.input[:]
    graph.input.extend(_value(spec) for spec in metadata.inputs)
    del graph.output[len(described.outputs) :]
    graph.output.extend(_value(spec) for spec in metadata.outputs[len(described.outputs) :])
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", opset)])
    if any(node.domain == "ai.onnx.ml" for node in graph.node):
        model.opset_import.append(helper.make_opsetid("ai.onnx.ml", ML_OPSET))
    _set_properties(model, metadata, columns)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def label_of(described: ModelMetadata, outputs: Arrays, threshold: float) -> npt.NDArray[np.str_]:
    """The class of each row as the registered graph names it.

    Args:
        described: Metadata of the network, or of the registered graph.
        outputs: The network's outputs by name.
        threshold: As :func:`compose_graph` was given it.
    """
    source = label_source(described)
    assert source is not None, "asked only where there is a label"
    numbers = outputs[source.name].astype(np.float64)
    if source.shape[-1] == len(described.classes):
        places = numbers.argmax(axis=-1)
    else:
        places = (numbers.reshape(numbers.shape[0]) > threshold).astype(np.int64)
    names: npt.NDArray[np.str_] = np.asarray(described.classes, dtype=np.str_)[places]
    return names


def _set_properties(model: onnx.ModelProto, metadata: ModelMetadata, columns: RawColumns) -> None:
    held = {entry.key: entry.value for entry in model.metadata_props}
    held[METADATA_KEY] = metadata.model_dump_json()
    held[COLUMNS_KEY] = columns.model_dump_json()
    del model.metadata_props[:]
    for key, value in sorted(held.items()):
        model.metadata_props.add(key=key, value=value)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], list(spec.shape))


def _read_rows(part: _Part, encoding: Encoding, columns: RawColumns) -> None:
    """Columns (B,) to the network's inputs: codes (B, C), numbers (B, F), folded as they are."""
    dtypes = {column.name: column.dtype for column in columns.columns}
    one = part.constant("one", np.array([1], np.int64))
    if encoding.categorical:
        codes = [
            part.add("Unsqueeze", [_code(part, column, dtypes[column.column]), one], name)
            for column in encoding.categorical
            for name in [f"{_FRONT}code_B1/{column.column}"]
        ]
        part.add("Concat", codes, f"{_NETWORK}categorical", axis=1)
    if encoding.numeric:
        _read_numbers(part, [column.column for column in encoding.numeric], dtypes, one)
    for item in columns.folded:
        part.add("Identity", [item.column], f"{_NETWORK}{item.column}")


def _read_numbers(part: _Part, names: Sequence[str], dtypes: Mapping[str, Dtype], one: str) -> None:
    """Neighbours of one type are joined before they are cast: a node for all of them, not each."""
    groups: list[str] = []
    for dtype, run in itertools.groupby(names, key=lambda name: dtypes[name]):
        assert dtype != "string", "a numeric column holds numbers, or it could not be trained on"
        columns = [part.add("Unsqueeze", [name, one], f"{_FRONT}number_B1/{name}") for name in run]
        base = f"{_FRONT}numbers_{len(groups)}"
        joined = part.add("Concat", columns, f"{base}/{dtype}", axis=1)
        groups.append(part.add("Cast", [joined], base, to=TensorProto.FLOAT))
    part.add("Concat", groups, f"{_NETWORK}numeric", axis=1)


def _code(part: _Part, column: Categorical, dtype: Dtype) -> str:
    """The place of a value in the vocabulary, from 1 on; 0 where it is not there."""
    places = range(1, len(column.vocabulary) + 1)
    name, source = f"{_FRONT}code/{column.column}", column.column
    if dtype == "string":
        # An encoder without keys is not allowed, and no category is empty text then.
        known = dict(zip(column.vocabulary, places, strict=True)) or {"": 0}
        keys: dict[str, list[str] | list[int]] = {"keys_strings": [*known]}
    else:
        whole = (
            _whole(part, source)
            if dtype == "float64"
            else part.add("Cast", [source], f"{_FRONT}whole/{source}", to=TensorProto.INT64)
        )
        source = whole
        known = dict(zip(column.vocabulary, places, strict=True)) or {str(int(_NO_CODE)): 0}
        keys = {"keys_int64s": [_whole_number(value) for value in known]}
    values = list(known.values())
    return part.add("LabelEncoder", [source], name, **keys, values_int64s=values, default_int64=0)


def _whole(part: _Part, source: str) -> str:
    """Whole numbers of a float64 column; what is missing or not whole becomes no code."""
    small = part.constant("largest_code", np.array(_LARGEST_CODE))
    none = part.constant("no_code", np.array(_NO_CODE))
    base = f"{_FRONT}whole/{source}"
    floor = part.add("Floor", [source], f"{base}/floor")
    same = part.add("Equal", [source, floor], f"{base}/same")  # false for NaN
    size = part.add("Abs", [source], f"{base}/size")
    fits = part.add("Less", [size, small], f"{base}/fits")
    good = part.add("And", [same, fits], f"{base}/good")
    code = part.add("Where", [good, source, none], f"{base}/code")
    return part.add("Cast", [code], base, to=TensorProto.INT64)


def _whole_number(text: str) -> int:
    """A category of a column of whole numbers or truth values, as the vocabulary spells it."""
    return {"false": 0, "true": 1}[text] if text in ("false", "true") else int(text)


def label_source(described: ModelMetadata) -> TensorSpec | None:
    """The output that tells the class: K numbers a row, or one where there are two classes."""
    count = len(described.classes)
    floats = [spec for spec in described.outputs if spec.dtype == "float32"]
    own = any(spec.name == LABEL and spec.dtype != "string" for spec in described.outputs)
    if count < 2 or own:
        return None
    wide = (spec for spec in floats if len(spec.shape) > 1 and spec.shape[-1] == count)
    single = (s for s in floats if count == 2 and s.shape in (("batch",), ("batch", 1)))
    return next(wide, None) or next(single, None)


def _label_shape(described: ModelMetadata) -> tuple[str | int, ...]:
    source = label_source(described)
    assert source is not None, "asked only where there is one"
    return source.shape[:-1] if len(source.shape) > 1 else source.shape


def _write_label(
    part: _Part, described: ModelMetadata, source: TensorSpec, threshold: float
) -> None:
    index = f"{_FRONT}class"
    if source.shape[-1] == len(described.classes):
        part.add("ArgMax", [source.name], index, axis=-1, keepdims=0)
    else:
        row = source.name
        if len(source.shape) > 1:
            axis = part.constant("last_axis", np.array([1], np.int64))
            row = part.add("Squeeze", [row, axis], f"{_FRONT}row")
        bound = part.constant("threshold", np.array(threshold, np.float32))
        above = part.add("Greater", [row, bound], f"{_FRONT}above")
        part.add("Cast", [above], index, to=TensorProto.INT64)
    part.add(
        "LabelEncoder",
        [index],
        LABEL,
        keys_int64s=list(range(len(described.classes))),
        values_strings=list(described.classes),
        default_string="",
    )
