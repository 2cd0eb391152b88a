"""The reader of a file's outline, held against the onnx package's own idea of the format."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from support.smoke_models import raw_model

from components.export.onnx_file import DOMAINS as EXPORTED_DOMAINS
from components.smoke_test.judge import outline
from components.smoke_test.judge.outline import FIELDS, read_outline

NAMED = {"OperatorSetIdProto": "domain", "NodeProto": "domain", "FunctionProto": "domain"}


def unsafe_parts(data: bytes) -> list[str]:
    return read_outline(data).faults()


def tables(root: Descriptor) -> dict[str, dict[int, str]]:
    """By message, the fields below which an operator's domain or a tensor can stand."""
    messages: dict[str, Descriptor] = {}
    open_ends = [root]
    while open_ends:
        message = open_ends.pop()
        if message.name not in messages:
            messages[message.name] = message
            open_ends += [f.message_type for f in message.fields if f.message_type]
    wanted = {"TensorProto", *NAMED}
    while True:
        found = {
            name: {
                f.number: f.message_type.name
                for f in message.fields
                if f.message_type and f.message_type.name in wanted
            }
            for name, message in messages.items()
        }
        found = {name: fields for name, fields in found.items() if fields}
        if wanted >= found.keys():
            return found
        wanted |= found.keys()


def test_the_table_is_the_format() -> None:
    assert tables(onnx.ModelProto.DESCRIPTOR) == FIELDS
    for name, number in outline._DOMAIN.items():
        assert getattr(onnx, name).DESCRIPTOR.fields_by_number[number].name == NAMED[name]
    assert onnx.NodeProto.DESCRIPTOR.fields_by_number[outline._OPERATOR].name == "op_type"
    numbers = onnx.TensorProto.DESCRIPTOR.fields_by_number
    names = ("name", "external_data", "data_location")
    assert tuple(numbers[n].name for n in (8, 13, 14)) == names
    assert (outline._NAME, outline._EXTERNAL_DATA, outline._DATA_LOCATION) == (8, 13, 14)
    assert onnx.TensorProto.DEFAULT == 0


def test_domains_are_those_of_the_export() -> None:
    assert outline.DOMAINS == EXPORTED_DOMAINS


def test_a_sound_file_has_no_unsafe_part() -> None:
    assert unsafe_parts(raw_model()) == []
    found = read_outline(raw_model())
    assert found.domains == {"", "ai.onnx.ml"}
    assert {"LabelEncoder", "Where", "Sigmoid"} < found.operators
    assert found.operators == {
        node.op_type for node in onnx.load_from_string(raw_model()).graph.node
    }


def outside(name: str = "secret") -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def in_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(outside())


def by_location_alone(model: onnx.ModelProto) -> None:
    tensor = outside()
    tensor.ClearField("external_data")
    model.graph.initializer.append(tensor)


def by_entries_alone(model: onnx.ModelProto) -> None:
    tensor = outside()
    tensor.ClearField("data_location")
    model.graph.initializer.append(tensor)


def in_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=outside()))


def in_list_of_tensors(model: onnx.ModelProto) -> None:
    attribute = AttributeProto(name="values", type=AttributeProto.TENSORS)
    attribute.tensors.append(outside())
    model.graph.node[0].attribute.append(attribute)


def in_sparse_tensor(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().indices.CopyFrom(outside())


def in_branch(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([], "branch", [], [], [outside()])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=branch))


def in_function(model: onnx.ModelProto) -> None:
    constant = helper.make_node("Constant", [], ["y"], value=outside())
    model.functions.append(helper.make_function("", "f", [], ["y"], [constant], []))


def in_training(model: onnx.ModelProto) -> None:
    model.training_info.add().algorithm.initializer.append(outside())


@pytest.mark.parametrize(
    "hide",
    [
        in_initializer,
        by_location_alone,
        by_entries_alone,
        in_constant,
        in_list_of_tensors,
        in_sparse_tensor,
        in_branch,
        in_function,
        in_training,
    ],
)
def test_external_data_is_found_wherever_it_is(hide: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load_from_string(raw_model())
    hide(model)
    (failure,) = unsafe_parts(model.SerializeToString())
    assert "all data must be inside the file; external: secret." in failure


@pytest.mark.parametrize("where", ["node", "opset", "branch", "function", "function's opset"])
def test_foreign_domain_is_found_wherever_it_is(where: str) -> None:
    model = onnx.load_from_string(raw_model())
    node = helper.make_node("Run", [], ["y"], domain="evil")
    opset = helper.make_opsetid("evil", 1)
    if where == "node":
        model.graph.node.append(node)
    elif where == "opset":
        model.opset_import.append(opset)
    elif where == "branch":
        branch = helper.make_graph([node], "branch", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=branch))
    elif where == "function":
        model.functions.append(helper.make_function("evil", "f", [], [], [], []))
    else:
        model.functions.append(helper.make_function("", "f", [], [], [], [opset]))
    (failure,) = unsafe_parts(model.SerializeToString())
    assert "operators must come from the domains ['', 'ai.onnx', 'ai.onnx.ml']; got" in failure
    assert "evil" in failure


def test_both_come_together() -> None:
    model = onnx.load_from_string(raw_model())
    in_branch(model)
    model.graph.node[0].domain = "evil"
    assert len(unsafe_parts(model.SerializeToString())) == 2


def message(number: int, content: bytes) -> bytes:
    """A field of a protobuf message that holds bytes."""
    size, length = b"", len(content)
    while length >= 0x80:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def nested(levels: int) -> bytes:
    """Graphs within attributes within nodes, so many levels of them."""
    graph = b""
    for _ in range(levels):
        graph = message(1, message(5, message(6, graph)))
    return message(7, graph)


def test_depth_has_an_end() -> None:
    assert unsafe_parts(nested(30)) == []
    with pytest.raises(ValueError, match="must nest at most 100 deep"):
        unsafe_parts(nested(3000))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "its 0 bytes hold no graph"),
        (b"PK\x03\x04 and so on", "it is a zip archive, as torch.save writes it"),
        (b"\x80\x04 and so on", "it is a pickle"),
        (b"\x24\x00\x00\x00ORTM and so on", "it is onnxruntime's own format"),
        (b"\x0a", "a number in it has no end"),
        (b"\x3a\x05abc", "ends in the middle of a field"),
        (b"\x09abc", "ends in the middle of a field"),
        (b"\x3b\x3c", "a field 7 of wire type 3"),
        (b"\x02\x00", "a field 0 of wire type 2"),
        (b"\xff" * 20, "a number in it has no end"),
        (b"\x3a" + b"\xff" * 9 + b"\x01", "ends in the middle of a field"),
    ],
)
def test_other_bytes_are_no_model(data: bytes, expected: str) -> None:
    with pytest.raises(ValueError, match="the file must be an ONNX protobuf") as caught:
        unsafe_parts(data)
    assert expected in str(caught.value)


def test_any_cut_is_noticed_or_harmless() -> None:
    whole = raw_model()
    for end in range(0, len(whole), 7):
        try:
            assert unsafe_parts(whole[:end]) == []
        except ValueError:
            continue


def test_numbers_of_every_width_are_passed_over(tmp_path: Path) -> None:
    model = onnx.load_from_string(raw_model())
    tensor = model.graph.initializer.add(name="wide", dims=[1 << 62, -1])
    tensor.float_data.extend([1.0, 2.0])
    tensor.double_data.extend([1.0])
    node = model.graph.node[0]
    node.attribute.add(name="f", f=1.5, type=AttributeProto.FLOAT)
    assert unsafe_parts(model.SerializeToString()) == []
