"""Named axes: layers that hold on to a length, lengths of outputs alone, and names that clash."""

from collections.abc import Callable

import onnx
import pytest
from support.exported_architectures import Axes, Wrapped, describe, example_of, rows_of
from torch import Tensor, nn
from torch.nn import functional

from components.errors import GateError
from components.export.onnx_export import export_onnx
from components.export.parity import check_parity

STEPS: dict[str, Axes] = {"steps": ("sequence", 4)}
PAIR: dict[str, Axes] = {"left": ("here", 4), "right": ("there", 4)}


class Net(nn.Module):
    def __init__(self, layer: nn.Module, rule: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.rule = layer, rule

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.rule(self.layer, *inputs)


def model(net: nn.Module, inputs: dict[str, Axes], outputs: dict[str, Axes]) -> Wrapped:
    return Wrapped(net, describe(inputs, outputs), lambda y: (y,)).eval()


def exported(wrapped: Wrapped) -> bytes:
    return export_onnx(wrapped, example_of(wrapped.metadata), metadata={})


def states(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x)[0]
    return result


def halves(layer: nn.Module, x: Tensor) -> Tensor:
    pooled = functional.avg_pool1d(layer(x).transpose(1, 2), 2, ceil_mode=True)
    return pooled.transpose(1, 2)


def added(layer: nn.Module, left: Tensor, right: Tensor) -> Tensor:
    result: Tensor = layer(left + right)
    return result


@pytest.mark.parametrize(
    ("net", "inputs", "outputs"),
    [
        (Net(nn.LSTM(4, 3, 2, batch_first=True), states), STEPS, {"y": ("sequence", 3)}),
        (Net(nn.GRU(4, 3, batch_first=True), states), STEPS, {"y": ("sequence", 3)}),
        (Net(nn.Linear(4, 3), halves), STEPS, {"y": ("frames", 3)}),
        (Net(nn.Linear(4, 3), added), {"a": ("s", 4), "b": ("s", 4)}, {"y": ("s", 3)}),
    ],
    ids=["states of an LSTM", "states of a GRU", "an output's own length", "one shared name"],
)
def test_lengths_stay_free(
    net: nn.Module, inputs: dict[str, Axes], outputs: dict[str, Axes]
) -> None:
    wrapped = model(net, inputs, outputs)
    data = exported(wrapped)
    dims = onnx.ModelProto.FromString(data).graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", *outputs["y"]]
    assert check_parity(wrapped, data, rows_of(wrapped.metadata, 20)).failures == ()


def test_two_names_of_what_must_be_one_length_are_refused() -> None:
    with pytest.raises(GateError, match=r"'there'; got .*To the graph it is 'here': declare one"):
        exported(model(Net(nn.Linear(4, 3), added), PAIR, {"y": ("here", 3)}))


def test_a_layer_that_holds_on_to_the_length_is_refused() -> None:
    recurrent = Net(nn.RNN(4, 3, batch_first=True), states)
    with pytest.raises(GateError, match="captured only with the example's 5"):
        exported(model(recurrent, STEPS, {"y": ("sequence", 3)}))


def test_an_example_of_one_step_or_of_two_lengths_is_refused() -> None:
    wrapped = model(Net(nn.Linear(4, 3), added), {"a": ("s", 4), "b": ("s", 4)}, {"y": ("s", 3)})
    left, right = example_of(wrapped.metadata)
    with pytest.raises(GateError, match="2 steps of 's' or more; got 1"):
        export_onnx(wrapped, [left[:, :1], right[:, :1]], metadata={})
    with pytest.raises(GateError, match=r"example of 'b' must be \('batch', 's', 4\)"):
        export_onnx(wrapped, [left, right[:, :3]], metadata={})
