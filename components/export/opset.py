"""A graph of operator set 18 in an older set, where the older operators can say the same.

The exporter speaks 18 and later, and where its own conversion fails it silently keeps 18. So a
graph is rewritten here, node by node; what an older set cannot express is named, never kept.
Parity then proves that the rewritten graph is still the same function.

Source: https://github.com/onnx/onnx/blob/main/docs/Changelog.md
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper

OLDEST_NATIVE = 18
"""The exporter writes this set and later ones without a conversion."""


def lower(proto: onnx.ModelProto, opset: int) -> list[str]:
    """Rewrite a graph in place for an older operator set, and say which operators cannot be.

    ``LayerNormalization`` is spelled out, axes and sizes move between inputs and attributes, and
    attributes that hold their default are dropped.
    """
    failures = sorted({*_lower_graph(proto.graph, opset)})
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    return failures


def _lower_graph(graph: onnx.GraphProto, opset: int) -> Iterator[str]:
    constants = _constants(graph)
    nodes: list[onnx.NodeProto] = []
    inner = list(_subgraphs(graph))
    for subgraph in inner:
        yield from _lower_graph(subgraph, opset)
    for node in graph.node:
        missing = _older_schema(node, opset) is None and node.op_type == "LayerNormalization"
        for part in _spelled_out(node) if missing else [node]:
            yield from _fit(part, constants, opset)
            nodes.append(onnx.NodeProto.FromString(part.SerializeToString()))
    del graph.node[:]
    graph.node.extend(nodes)
    if not inner:  # a subgraph may use the constants of its parent
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.g] if attribute.HasField("g") else []
            yield from attribute.graphs


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            held[node.output[0]] = node.attribute[0].t
    return held


def _older_schema(node: onnx.NodeProto, opset: int) -> defs.OpSchema | None:
    try:
        return defs.get_schema(node.op_type, opset, node.domain)
    except defs.SchemaError:
        return None


def _fit(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], opset: int) -> Iterator[str]:
    """Make a node one of the older set, or say why it cannot be."""
    if node.domain not in ("", "ai.onnx"):
        return
    newer, older = defs.get_schema(node.op_type, OLDEST_NATIVE), _older_schema(node, opset)
    if older is None:
        first = newer.since_version
        yield f"{node.op_type} (node {node.name!r}) exists from opset {first} on"
        return
    if newer.since_version == older.since_version:
        return
    _move_axes(node, older, constants)
    kept = [a for a in node.attribute if a.name in older.attributes or not _is_default(a, newer)]
    del node.attribute[:]
    node.attribute.extend(kept)
    unknown = sorted(a.name for a in kept if a.name not in older.attributes)
    if unknown or len(node.input) > older.max_input:
        detail = f"the attributes {unknown}" if unknown else f"{len(node.input)} inputs"
        yield f"{node.op_type} (node {node.name!r}) has no {detail} before opset {OLDEST_NATIVE}"


def _move_axes(
    node: onnx.NodeProto, older: defs.OpSchema, constants: dict[str, onnx.TensorProto]
) -> None:
    """Reductions, ``Squeeze`` and ``Unsqueeze`` once had their axes as an attribute."""
    axes = constants.get(node.input[1]) if len(node.input) == 2 else None
    if axes is not None and older.max_input == 1 and "axes" in older.attributes:
        values = [int(axis) for axis in numpy_helper.to_array(axes).ravel()]
        node.attribute.append(helper.make_attribute("axes", values))
        del node.input[1:]


def _is_default(attribute: onnx.AttributeProto, newer: defs.OpSchema) -> bool:
    # Without sizes, the older Split cuts into equal parts, one for each of its outputs.
    if (newer.name, attribute.name) == ("Split", "num_outputs"):
        return True
    default = newer.attributes[attribute.name].default_value
    return bool(default.name) and (
        helper.get_attribute_value(default) == helper.get_attribute_value(attribute)
    )


def _spelled_out(node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
    """``LayerNormalization`` in operators of set 13, as its specification defines it."""
    held = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    axis, epsilon = held.get("axis", -1), held.get("epsilon", 1e-5)
    if axis >= 0 or len(node.output) > 1:  # its last axes would depend on the rank
        return [node]
    x, scale, *bias = node.input
    stem = node.output[0]
    made: list[onnx.NodeProto] = []

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        name = output if output == stem else f"{stem}_{output}"
        label = node.name if output == stem else f"{node.name}_{output}"
        made.append(helper.make_node(kind, inputs, [name], name=label, **attributes))
        return name

    axes = list(range(axis, 0))
    tensor = numpy_helper.from_array(np.array(epsilon, np.float32))
    least = add("Constant", [], "epsilon", value=tensor)
    centred = add("Sub", [x, add("ReduceMean", [x], "mean", axes=axes, keepdims=1)], "centred")
    square = add("Mul", [centred, centred], "square")
    variance = add("ReduceMean", [square], "variance", axes=axes, keepdims=1)
    deviation = add("Sqrt", [add("Add", [variance, least], "shifted")], "deviation")
    normal = add("Div", [centred, deviation], "normal")
    scaled = add("Mul", [normal, scale], "scaled" if bias else stem)
    if bias:
        add("Add", [scaled, bias[0]], stem)
    return made
