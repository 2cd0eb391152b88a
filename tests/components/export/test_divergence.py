"""The first diverging node is the one at fault, and where none can be named that is said."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.exported_architectures import describe, rows_of
from torch import Tensor, nn

from components.contract import Arrays, Model, ModelMetadata
from components.errors import ContractError
from components.export import divergence, parity
from components.export.divergence import Divergence, first_divergence
from components.export.onnx_export import export_onnx
from components.export.parity import check_parity

Array = np.ndarray


class Layers(Model):
    """Four linear layers; ``between`` is applied after the second, outside of any submodule."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 3)
        self.between = between

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        for number, layer in enumerate(self.layers):
            x = layer(x).tanh()
            x = self.between(x) if number == 1 else x
        return self.head(x) * 3.0

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self(*inputs),)

    def get_model_metadata(self) -> ModelMetadata:
        return describe({"numbers": (6,)}, {"logits": (3,)})


@pytest.fixture
def numbers() -> Arrays:
    return rows_of(describe({"numbers": (6,)}, {"logits": (3,)}), 40)


def exported_layers(model: Layers, opset: int = 20) -> bytes:
    return export_onnx(model.eval(), [torch.zeros(2, 6)], opset=opset, metadata={})


def changed(data: bytes, name: str, change: Callable[[Array], Array]) -> bytes:
    proto = onnx.ModelProto.FromString(data)
    (tensor,) = [t for t in proto.graph.initializer if t.name.endswith(name)]
    array = change(numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto.SerializeToString()


def found(model: Model, data: bytes, rows: Arrays) -> Divergence:
    report = check_parity(model, data, rows)
    assert report.divergence is not None
    assert report.failures[0] == report.divergence.sentence
    return report.divergence


@pytest.mark.parametrize(("layer", "opset"), [(0, 20), (1, 20), (2, 15)])
def test_stale_weights_are_found_in_their_layer(numbers: Arrays, layer: int, opset: int) -> None:
    model = Layers()
    data = exported_layers(model, opset)
    with torch.no_grad():
        model.get_submodule(f"layers.{layer}").get_parameter("weight").add_(0.01)
    place = found(model, data, numbers)
    assert (place.operator, place.module) == ("Gemm", f"layers.{layer}")
    assert place.culprit == f"layers.{layer}"
    assert f"layers.{layer}.weight are not the module's" in place.sentence


def test_two_stale_layers_are_both_named(numbers: Arrays) -> None:
    model = Layers()
    data = exported_layers(model)
    with torch.no_grad():
        for layer in (0, 2):
            model.get_submodule(f"layers.{layer}").get_parameter("bias").add_(0.5)
    place = found(model, data, numbers)
    assert place.module == "layers.0"  # what comes after it differs anyhow


def test_a_stale_table_is_found_beside_branches_that_agree(
    tabular: Model, exported: bytes, rows: Arrays
) -> None:
    with torch.no_grad():
        tabular.get_submodule("tables.0").get_parameter("weight").mul_(1.01)
        tabular.get_submodule("tables.2").get_parameter("weight").mul_(1.01)
    place = found(tabular, exported, rows)
    assert (place.operator, place.module) == ("Gather", "tables.0")
    assert "So do 1 others" in place.sentence


def test_a_perturbed_convolution_is_found(
    conv: Model, exported_conv: bytes, images: Arrays
) -> None:
    names = [t.name for t in onnx.ModelProto.FromString(exported_conv).graph.initializer]
    weight = next(name for name in names if "body.0.weight" in name)
    place = found(conv, changed(exported_conv, weight, lambda w: w * 1.01), images)
    assert place.operator == "Conv"
    assert place.module in ("body.0", "body.1")  # batch norm is folded into it


def test_a_wrong_constant_is_found(numbers: Arrays) -> None:
    model = Layers()
    data = exported_layers(model)
    proto = onnx.ModelProto.FromString(data)
    node = proto.graph.node[-1]
    assert node.op_type == "Mul"
    scalar = next(name for name in node.input if not name.startswith("linear"))
    place = found(model, changed(data, scalar, lambda w: w + 0.5), numbers)
    assert (place.node, place.operator) == (node.name, "Mul")
    assert f"{scalar} are not the module's" in place.sentence


def test_another_operator_is_found(numbers: Arrays) -> None:
    model = Layers()
    proto = onnx.ModelProto.FromString(exported_layers(model))
    node = next(node for node in proto.graph.node if node.op_type == "Relu")
    node.op_type = "Softplus"
    place = found(model, proto.SerializeToString(), numbers)
    assert (place.node, place.operator) == (node.name, "Softplus")


def test_a_choice_that_the_export_fixed_is_found_by_the_modules(numbers: Arrays) -> None:
    model = Layers(lambda x: x * 2 if x.shape[0] == 1 else x * 3)
    place = found(model, exported_layers(model), numbers)
    assert place.module == "layers.2"
    assert "agrees up to Gemm 'node_linear_1' of module 'layers.1'" in place.sentence
    assert "parts in submodule 'layers.2'" in place.sentence


def test_the_runtimes_optimisation_is_named_where_it_is_at_fault(
    numbers: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = parity.run_session

    def spoilt(session: object, rows: Arrays) -> list[Array]:
        outputs = plain(session, rows)  # type: ignore[arg-type]
        level = session.get_session_options().graph_optimization_level.name  # type: ignore[attr-defined]
        return [output + (level == "ORT_ENABLE_ALL") for output in outputs]

    monkeypatch.setattr(parity, "run_session", spoilt)
    model = Layers()
    place = found(model, exported_layers(model), numbers)
    assert "onnxruntime's optimisation is at fault" in place.sentence
    assert place.culprit is None


def test_what_cannot_be_found_is_said(numbers: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ContractError("no graph today.")

    model = Layers()
    data = exported_layers(model)
    monkeypatch.setattr(divergence, "capture", refuse)
    place = first_divergence(model, changed(data, "head.bias", lambda b: b + 1), numbers)
    assert place.sentence == (
        "the first diverging node could not be found; looking for it failed with ContractError: "
        "no graph today"
    )
    assert place.culprit is None


def test_a_graph_that_passes_is_not_looked_into(
    numbers: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "first_divergence", pytest.fail)
    model = Layers()
    report = check_parity(model, exported_layers(model), numbers)
    assert (report.passed, report.divergence) == (True, None)
