"""Smaller forms of a graph, in operators of plain ai.onnx: half precision, and dynamic int8.

Both work on the protobuf alone: no file is written, nothing is logged, equal graphs give equal
bytes. What an operator may compute in half precision is read from its ONNX schema.

- fp16: weights and arithmetic in float16. Inputs and outputs keep their dtypes, and what only
  prepares inputs (imputing, normalising) stays in float32: a raw column may exceed 65504. On a CPU
  onnxruntime widens it to float32 again, so there it saves space and no time.
- int8: the weights of MatMul, Gemm and Conv as int8 with a scale per output channel; activations
  are quantised at run time, by the range that they have in the batch. So the answer to a row
  depends, within the tolerance, on the rows beside it.

Source of the int8 form: https://onnxruntime.ai/docs/performance/model-optimizations/quantization
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from components.errors import ContractError
from components.export.config import VariantKind

VARIANT_KEY = "assay.variant"
"""Property of the file that holds the kind of the variant."""

WEIGHT_STEPS = 64
"""Largest quantised weight. Kernels without VNNI add two products in 16 bits, and 127 would
saturate there (2 * 255 * 127 > 32767): the answers would depend on the processor."""

_HALF_MAX = float(np.finfo(np.float16).max)
_WEIGHTED = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN"})


def make_variant(kind: VariantKind, tensor_onnx: bytes) -> bytes:
    """Make a smaller form of a graph of tensors; its properties are kept, its kind is added.

    Raises:
        ContractError: The graph has nested graphs or functions, or nothing to quantise, or a weight
            does not fit into half precision.
    """
    proto = onnx.ModelProto.FromString(tensor_onnx)
    nested = [node.op_type for node in proto.graph.node if _has_graph(node)]
    if nested or proto.functions:
        raise ContractError(
            f"a variant can be made of a graph without nested graphs and functions; got "
            f"{nested or [function.name for function in proto.functions]}. Leave the variant out, "
            "or choose between values with torch.where."
        )
    made = _Half(proto).convert() if kind == "fp16" else _Int8(proto).convert()
    made.metadata_props.add(key=VARIANT_KEY, value=kind)
    data: bytes = made.SerializeToString(deterministic=True)
    return data


def _has_graph(node: NodeProto) -> bool:
    return any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute)


@dataclass
class _Rewriter:
    """Nodes and weights of the graph that is being written, and what it is made from."""

    proto: onnx.ModelProto
    nodes: list[NodeProto] = field(default_factory=list)
    added: dict[str, TensorProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.proto.graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.names = {name for node in graph.node for name in (*node.input, *node.output)}
        self.names |= {value.name for value in (*graph.input, *graph.output)} | {*self.weights}

    def fresh(self, base: str) -> str:
        """A name that no value has."""
        name, number = base, 1
        while name in self.names:
            name, number = f"{base}_{number}", number + 1
        self.names.add(name)
        return name

    def add(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        """Append a node with one output."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def weight(self, base: str, values: npt.NDArray[np.generic]) -> str:
        """Add a constant."""
        name = self.fresh(base)
        self.added[name] = numpy_helper.from_array(values, name)
        return name

    def finish(self) -> onnx.ModelProto:
        """The graph with the new nodes, and the weights that these read."""
        graph = self.proto.graph
        read = {name for node in self.nodes for name in node.input}
        read |= {value.name for value in graph.output}
        kept = [t for t in (*self.weights.values(), *self.added.values()) if t.name in read]
        for name in ("node", "initializer", "value_info"):
            graph.ClearField(name)
        graph.node.extend(self.nodes)
        graph.initializer.extend(kept)
        return self.proto


class _Half(_Rewriter):
    """Rewrites to float16."""

    def convert(self) -> onnx.ModelProto:
        self.floats, self.opset = _float_values(self.proto), _opset(self.proto)
        self.half: dict[str, str] = {}  # a value, and the name of its float16 form
        self.full: dict[str, str] = {}
        self.only_half: set[str] = set()
        raw = {value.name for value in self.proto.graph.input}
        for node in self.proto.graph.node:
            read = [name for name in node.input if name and name not in self.weights]
            table = node.op_type == "Gather" and node.input[0] in self.weights
            if read and {*read} <= raw and node.op_type not in _WEIGHTED and not table:
                raw |= {*node.output}
                self._keep(node)
            else:
                self._narrow(node)
        for value in self.proto.graph.output:
            if value.name in self.only_half:
                self.add("Cast", [self.half[value.name]], value.name, to=TensorProto.FLOAT)
        return self.finish()

    def _keep(self, node: NodeProto) -> None:
        kept = NodeProto.FromString(node.SerializeToString())
        kept.input[:] = [self._full(name) for name in node.input]
        self.nodes.append(kept)

    def _narrow(self, node: NodeProto) -> None:
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        able = {c.type_param_str for c in schema.type_constraints if _allows_half(c)}
        kinds = [*_kinds(schema.inputs, len(node.input))]
        narrowed = {
            kind
            for name, kind in zip(node.input, kinds, strict=True)
            if name in self.floats and kind in able
        }
        if not narrowed:
            self._keep(node)
            return
        made = NodeProto.FromString(node.SerializeToString())
        made.input[:] = [
            self._half(name) if name in self.floats and kind in narrowed else self._full(name)
            for name, kind in zip(node.input, kinds, strict=True)
        ]
        outputs = [*_kinds(schema.outputs, len(node.output))]
        for place, (name, kind) in enumerate(zip(node.output, outputs, strict=True)):
            if name in self.floats and kind in narrowed:
                self.half[name] = made.output[place] = self.fresh(f"{name}_half")
                self.only_half.add(name)
        self.nodes.append(made)

    def _half(self, name: str) -> str:
        if name not in self.half:
            if name in self.weights:
                values = numpy_helper.to_array(self.weights[name])
                self._require_range(name, values)
                with np.errstate(under="ignore"):
                    self.half[name] = self.weight(f"{name}_half", values.astype(np.float16))
            else:
                target = self.fresh(f"{name}_half")
                self.half[name] = self.add("Cast", [name], target, to=TensorProto.FLOAT16)
        return self.half[name]

    def _full(self, name: str) -> str:
        if name not in self.only_half:
            return name
        if name not in self.full:
            target = self.fresh(f"{name}_full")
            self.full[name] = self.add("Cast", [self.half[name]], target, to=TensorProto.FLOAT)
        return self.full[name]

    def _require_range(self, name: str, values: npt.NDArray[np.generic]) -> None:
        finite = np.abs(values[np.isfinite(values)])
        if finite.size and finite.max() > _HALF_MAX:
            raise ContractError(
                f"weights must fit into half precision, up to {_HALF_MAX:g}; {name!r} reaches "
                f"{finite.max():g}. Scale it, or leave the variant fp16 out."
            )


class _Int8(_Rewriter):
    """Rewrites products with constant weights to integers."""

    def convert(self) -> onnx.ModelProto:
        self.quantised: dict[str, tuple[str, str, str]] = {}
        floats, found = _float_values(self.proto), 0
        for node in self.proto.graph.node:
            if _can_quantise(node, self.weights) and node.output[0] in floats:
                found += 1
                (self._conv if node.op_type == "Conv" else self._product)(node)
            else:
                self.nodes.append(node)
        if not found:
            raise ContractError(
                "int8 needs a MatMul, Gemm or Conv with constant weights; the graph has none. "
                "Leave the variant int8 out."
            )
        return self.finish()

    def _product(self, node: NodeProto) -> None:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = numpy_helper.to_array(self.weights[node.input[1]])
        weight = weight.T if attributes.get("transB") else weight
        integers, scale = _quantise(weight, axis=1)
        self._scaled(node, "MatMulInteger", integers, scale, {})

    def _conv(self, node: NodeProto) -> None:
        weight = numpy_helper.to_array(self.weights[node.input[1]])
        flat, scale = _quantise(weight.reshape(weight.shape[0], -1), axis=0)
        # onnxruntime's ConvInteger takes unsigned weights; 128 is their zero.
        unsigned = (flat.reshape(weight.shape).astype(np.int16) + 128).astype(np.uint8)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        wide = [-1, *[1] * (weight.ndim - 2)]
        self._scaled(node, "ConvInteger", unsigned, scale.reshape(wide), attributes)

    def _scaled(
        self,
        node: NodeProto,
        op: str,
        weight: npt.NDArray[np.generic],
        scale: npt.NDArray[np.float32],
        attributes: dict[str, Any],
    ) -> None:
        data, given, zero = self._quantise_input(node.input[0])
        inputs = [data, self.weight(f"{node.input[1]}_int8", weight), zero]
        if weight.dtype == np.uint8:
            inputs.append(self.weight(f"{node.input[1]}_zero", np.array(128, np.uint8)))
        name, last = node.output[0], len(node.input) > 2 and bool(node.input[2])
        whole = self.add(op, inputs, self.fresh(f"{name}_int32"), **attributes)
        number = self.add("Cast", [whole], self.fresh(f"{name}_number"), to=TensorProto.FLOAT)
        factor = self.weight(f"{node.input[1]}_scale", scale)
        scales = self.add("Mul", [given, factor], self.fresh(f"{name}_scale"))
        target = self.fresh(f"{name}_scaled") if last else name
        self.add("Mul", [number, scales], target)
        if last:
            bias = node.input[2]
            if scale.ndim > 1:
                column = numpy_helper.to_array(self.weights[bias]).reshape(scale.shape)
                bias = self.weight(f"{bias}_column", column)
            self.add("Add", [target, bias], name)

    def _quantise_input(self, name: str) -> tuple[str, str, str]:
        """Names of a value as uint8, of its scale and of its zero point."""
        if name not in self.quantised:
            parts = tuple(self.fresh(f"{name}_{part}") for part in ("uint8", "scale", "zero"))
            self.nodes.append(
                helper.make_node("DynamicQuantizeLinear", [name], list(parts), name=parts[0])
            )
            self.quantised[name] = (parts[0], parts[1], parts[2])
        return self.quantised[name]


def _can_quantise(node: NodeProto, weights: dict[str, TensorProto]) -> bool:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type not in ("MatMul", "Gemm", "Conv") or node.input[0] in weights:
        return False
    weight = weights.get(node.input[1])
    if weight is None or weight.data_type != TensorProto.FLOAT:
        return False
    if node.op_type == "Conv":
        return len(node.input) < 3 or not node.input[2] or node.input[2] in weights
    plain = (attributes.get(key, 1.0) == 1.0 for key in ("alpha", "beta"))
    return len(weight.dims) == 2 and all(plain) and not attributes.get("transA")


def _quantise(
    weight: npt.NDArray[np.generic], axis: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Integers within :data:`WEIGHT_STEPS`, and what one of them is worth along ``axis``."""
    wide = weight.astype(np.float64)
    largest = np.abs(wide).max(axis=1 - axis, initial=0.0)
    scale = np.where(largest > 0, largest / WEIGHT_STEPS, 1.0)
    integers = np.rint(wide / np.expand_dims(scale, 1 - axis)).astype(np.int8)
    return np.ascontiguousarray(integers), scale.astype(np.float32)


def _float_values(proto: onnx.ModelProto) -> set[str]:
    """Every value and weight whose dtype is float32."""
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _opset(proto: onnx.ModelProto) -> int:
    return next(e.version for e in proto.opset_import if e.domain in ("", "ai.onnx"))


def _allows_half(constraint: onnx.defs.OpSchema.TypeConstraintParam) -> bool:
    return "tensor(float16)" in constraint.allowed_type_strs


def _kinds(formal: Iterable[onnx.defs.OpSchema.FormalParameter], count: int) -> Iterator[str]:
    """Type variable of each of ``count`` arguments; the last formal one may stand for several."""
    kinds = [parameter.type_str for parameter in formal]
    for place in range(count):
        yield kinds[min(place, len(kinds) - 1)]
