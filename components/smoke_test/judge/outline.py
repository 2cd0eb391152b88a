"""The outline of an ONNX file, read from its bytes before onnxruntime sees them.

External data and foreign operators must be refused before anything follows them. This stands in the
child, although the parent has a library for it: a file that nobody vouches for may make any parser
use up memory or time, and here both are limited. Whatever this reader is unsure about it refuses.

Source: https://protobuf.dev/programming-guides/encoding/ and onnx.proto of the ONNX project.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
"""Operator sets that every engine knows; another one could name native code."""

MAX_DEPTH = 100
"""Messages within messages, as many as protobuf's own parsers follow."""

FIELDS = {
    "ModelProto": {
        7: "GraphProto",
        8: "OperatorSetIdProto",
        20: "TrainingInfoProto",
        25: "FunctionProto",
    },
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "FunctionProto": {7: "NodeProto", 9: "OperatorSetIdProto", 11: "AttributeProto"},
}
"""By message: the fields, by number, below which a tensor or the name of an operator can stand."""

_DOMAIN = {"OperatorSetIdProto": 1, "NodeProto": 7, "FunctionProto": 10}
_OPERATOR = 4
_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14

_OTHER_FORMATS = (
    (0, b"PK\x03\x04", "a zip archive, as torch.save writes it"),
    (0, b"\x80", "a pickle"),
    (4, b"ORTM", "onnxruntime's own format"),
)


@dataclass
class Outline:
    """Names of tensors whose data lies elsewhere, operators and their domains, and graphs."""

    external: list[str] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)
    domains: set[str] = field(default_factory=set)
    graphs: int = 0

    def faults(self) -> list[str]:
        """Say why the file must not be loaded; nothing that it names is opened."""
        faults = []
        if self.external:
            faults.append(
                f"all data must be inside the file; external: {', '.join(self.external)[:200]}. "
                "Save the model with save_as_external_data=False"
            )
        if foreign := sorted(self.domains - DOMAINS):
            faults.append(
                f"operators must come from the domains {sorted(DOMAINS)}; got "
                f"{str(foreign)[:200]}. Express the model without custom operators"
            )
        return faults


def read_outline(data: bytes) -> Outline:
    """Walk all messages of a file.

    Raises:
        ValueError: The bytes are no ONNX protobuf, or nest too deep.
    """
    for offset, magic, what in _OTHER_FORMATS:
        if data[offset:].startswith(magic):
            raise ValueError(f"the file must be an ONNX protobuf; it is {what}")
    outline = Outline()
    stack = [("ModelProto", memoryview(data), 1)]
    while stack:
        kind, message, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"messages must nest at most {MAX_DEPTH} deep; the file goes deeper")
        entries = list(_fields(message))
        _note(outline, kind, entries)
        below = FIELDS.get(kind, {})
        stack += [
            (below[number], value, depth + 1)
            for number, value in entries
            if number in below and isinstance(value, memoryview)
        ]
    if not outline.graphs:
        raise ValueError(f"the file must be an ONNX protobuf; its {len(data)} bytes hold no graph")
    return outline


def _note(outline: Outline, kind: str, entries: list[tuple[int, int | memoryview]]) -> None:
    outline.graphs += kind == "GraphProto"
    if kind in _DOMAIN:
        outline.domains.update(_text(value) for number, value in entries if number == _DOMAIN[kind])
    if kind == "NodeProto":
        outline.operators.update(_text(value) for number, value in entries if number == _OPERATOR)
    if kind == "TensorProto" and any(
        number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)
        for number, value in entries
    ):
        names = [_text(value) for number, value in entries if number == _NAME]
        outline.external.append("".join(names[-1:]) or "a tensor without a name")


def _text(value: int | memoryview) -> str:
    return value.tobytes().decode(errors="replace") if isinstance(value, memoryview) else str(value)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field; numbers of fixed width have no meaning here."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        value: int | memoryview = 0
        if wire == 0:
            value, at = _varint(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _varint(message, at)
            value = message[at : at + size]
            at += size
        if wire not in (0, 1, 2, 5) or not 0 < number < 1 << 29:
            raise ValueError(
                f"the file must be an ONNX protobuf; it has a field {number} of wire type {wire}"
            )
        if at > len(message):
            raise ValueError("the file must be an ONNX protobuf; it ends in the middle of a field")
        yield number, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Read a number of up to 64 bits, 7 of them in each byte; give it and where it ends."""
    result = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise ValueError("the file must be an ONNX protobuf; a number in it has no end")
