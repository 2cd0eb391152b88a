"""What an ONNX file is, read from its bytes alone.

Nothing is executed and no other file is opened: external data is refused before anything could
follow it. Known abuses are path traversal in external data and operators of foreign domains.

Source: https://github.com/onnx/onnx/blob/main/docs/IR.md and docs/ExternalData.md.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import chain

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from components.contract import ModelMetadata, TensorSpec

METADATA_KEY = "assay.metadata"
"""Property of the file that holds the :class:`ModelMetadata` as JSON."""

ENCODING_KEY = "assay.encoding"
"""Property of the file that holds the :class:`~components.data.encoding.Encoding` as JSON."""

COLUMNS_KEY = "assay.columns"
"""Property of a file that takes rows as they are: the columns, as JSON."""

BATCH = "batch"
"""Name of the first axis, which is always dynamic."""

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
"""Operator sets that every engine knows; another one could name native code."""

_DTYPES = {
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "INT64": "int64",
    "BOOL": "bool",
    "STRING": "string",
}
_OF_VALUES = re.compile(r"\bu\d+\b")  # the exporter's symbols for lengths known only when run
_TEXT = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def graph_failures(data: bytes, metadata: ModelMetadata, *, opset: int | None = None) -> list[str]:
    """Say how an ONNX file differs from the metadata, in the order in which to mend it.

    Safety of the file comes first, then names, dynamic axes, and dtypes with shapes.
    """
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        return [f"the file must be an ONNX protobuf; got {len(data)} other bytes ({error})"]
    failures = _unsafe_parts(proto)
    if not failures:  # the checker would open external data
        failures += _checker_failures(proto)
    if opset is not None:
        failures += _opset_failures(proto, opset)
    graph = proto.graph
    sides = (("input", graph.input, metadata.inputs), ("output", graph.output, metadata.outputs))
    unnamed = list(chain.from_iterable(_name_failures(*side) for side in sides))
    if unnamed:  # axes and dtypes cannot be matched without names
        return failures + unnamed
    failures += chain.from_iterable(_axis_failures(*side) for side in sides)
    failures += chain.from_iterable(_type_failures(*side) for side in sides)
    return failures


def properties(proto: onnx.ModelProto) -> dict[str, str]:
    """Read the key-value pairs of a file."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def walk(message: Message) -> Iterator[Message]:
    """Yield a message and all below it: subgraphs, functions and attributes included."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from walk(part)


def texts(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield every string of a file; weights are not text."""
    for message in walk(proto):
        for field, value in message.ListFields():
            if field.type in _TEXT and field.name != "raw_data":
                for item in [value] if isinstance(value, (str, bytes)) else value:
                    yield item.decode(errors="replace") if isinstance(item, bytes) else item


def _unsafe_parts(proto: onnx.ModelProto) -> list[str]:
    failures = []
    outside = [
        m.name
        for m in walk(proto)
        if isinstance(m, onnx.TensorProto)
        and (m.data_location == onnx.TensorProto.EXTERNAL or m.external_data)
    ]
    if outside:
        failures.append(
            f"all data must be inside the file; external: {', '.join(outside)}. "
            "Save the model with save_as_external_data=False"
        )
    domains = {m.domain for m in walk(proto) if isinstance(m, (onnx.NodeProto, onnx.FunctionProto))}
    foreign = sorted((domains | {entry.domain for entry in proto.opset_import}) - DOMAINS)
    if foreign:
        failures.append(
            f"operators must come from the domains {sorted(DOMAINS)}; got {foreign}. "
            "Express the model without custom operators"
        )
    return failures


def _checker_failures(proto: onnx.ModelProto) -> list[str]:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:400]
        return [f"the file must pass onnx.checker; it said: {reason}. Export the model again"]
    return []


def _opset_failures(proto: onnx.ModelProto, opset: int) -> list[str]:
    found = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if found == [opset]:
        return []
    return [
        (
            f"the file must declare opset {opset}; got {found}. The exporter keeps another version "
            "where it cannot convert: ask for 18 or later, as far as this torch knows it"
        )
    ]


def _name_failures(
    kind: str, values: Sequence[onnx.ValueInfoProto], specs: Sequence[TensorSpec]
) -> list[str]:
    found, wanted = [value.name for value in values], [spec.name for spec in specs]
    if found == wanted:
        return []
    return [f"{kind}s must be {wanted}, in this order; got {found}. Mend the model's metadata"]


def _axis_failures(
    kind: str, values: Sequence[onnx.ValueInfoProto], specs: Sequence[TensorSpec]
) -> Iterator[str]:
    for value, spec in zip(values, specs, strict=True):
        shape = _shape(value)
        for place, axis in spec.axes:
            found = shape[place] if place < len(shape) else "nothing"
            if found != axis:
                yield (
                    f"axis {place} of {kind} {value.name!r} must be the dynamic axis {axis!r}; got "
                    f"{shape}. {_axis_hint(axis, found)}"
                )


def _axis_hint(axis: str, found: int | str) -> str:
    if isinstance(found, str) and _OF_VALUES.search(found):
        return f"Its length ({found}) depends on values: mask rows instead of choosing them"
    if axis == BATCH:
        return "Find what fixes the batch size in predict"
    if isinstance(found, int):
        return f"Find what fixes its length in predict, or declare {found}"
    return f"To the graph it is {found!r}: declare one name for what must be of one length"


def _type_failures(
    kind: str, values: Sequence[onnx.ValueInfoProto], specs: Sequence[TensorSpec]
) -> Iterator[str]:
    for value, spec in zip(values, specs, strict=True):
        code = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        dtype = _DTYPES.get(code, code.lower())
        shape = _shape(value)
        axes = zip(spec.shape, shape, strict=False)
        fits = len(shape) == len(spec.shape) and all(isinstance(w, str) or w == n for w, n in axes)
        if dtype != spec.dtype or not fits:
            yield (
                f"{kind} {value.name!r} must be {spec.shape} {spec.dtype}; got {shape} {dtype}. "
                "Mend predict or the model's metadata"
            )


def name_axes(graph: onnx.GraphProto, metadata: ModelMetadata) -> None:
    """Give the axes that outputs alone have their declared names, in place of expressions.

    The exporter calls half a sequence ``(sequence//2)``. A length that depends on values keeps the
    exporter's name, and so do two different lengths of one declared name.
    """
    known = {axis for spec in metadata.inputs for _, axis in spec.axes}
    renamed: dict[str, str] = {}
    for value, spec in zip(graph.output, metadata.outputs, strict=False):
        dims = value.type.tensor_type.shape.dim
        for place, axis in spec.axes:
            found = dims[place].dim_param if place < len(dims) else ""
            usable = found and axis not in known and found not in known
            if usable and not _OF_VALUES.search(found) and renamed.setdefault(axis, found) == found:
                dims[place].dim_param = axis


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)
