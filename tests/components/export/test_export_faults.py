"""Every way for an export to be wrong is refused for its own reason, and its sound twin passes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, external_data_helper
from support.exported_architectures import describe, rows_of
from torch import Tensor, nn
from torch.nn import functional

from components.contract import Model, ModelMetadata
from components.errors import GateError
from components.export import onnx_export
from components.export.onnx_export import export_onnx
from components.export.onnx_file import graph_failures
from components.export.parity import check_parity

Rule = Callable[["Net", Tensor], tuple[Tensor, ...]]
TABLE = describe({"numbers": (5,)}, {"logits": (3,)})
BOTH = describe({"numbers": (5,)}, {"logits": (3,), "chances": (3,)})
STEPS = describe({"steps": ("sequence", 5)}, {"logits": ("sequence", 3)})


class Net(Model):
    """One linear layer over the last axis; ``rule`` makes the outputs from its logits."""

    def __init__(self, rule: Rule, metadata: ModelMetadata) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3)
        self.metadata, self.rule = metadata, rule
        self.cached = self.linear.weight.detach().clone()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.linear(inputs[0])

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.rule(self, self(*inputs))

    def get_model_metadata(self) -> ModelMetadata:
        return self.metadata


def one(net: Net, logits: Tensor) -> tuple[Tensor, ...]:
    return (logits,)


def two(net: Net, logits: Tensor) -> tuple[Tensor, ...]:
    return logits, logits.softmax(-1)


def of(change: Callable[[Tensor], Tensor]) -> Rule:
    return lambda net, logits: (change(logits),)


def change_weights(net: Net) -> None:
    with torch.no_grad():
        net.linear.weight.mul_(2)


@dataclass(frozen=True)
class Fault:
    """What is wrong, and the words of the refusal that no other fault has."""

    name: str
    words: str
    rule: Rule = one
    twin: Rule = one
    metadata: ModelMetadata = TABLE
    before: Callable[[Net], object] = lambda net: None
    after: Callable[[Net], object] = lambda net: None  # between export and parity
    tamper: Callable[[onnx.ModelProto], object] = lambda proto: None
    rows: int = 2
    opset: int = 20
    declared: ModelMetadata | None = None  # by the sound twin, if it is not the same
    properties: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None


def swap_outputs(proto: onnx.ModelProto) -> None:
    first, second = list(proto.graph.output)
    del proto.graph.output[:]
    proto.graph.output.extend([second, first])


def rename_input(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        names = ["x" if name == "numbers" else name for name in node.input]
        del node.input[:]
        node.input.extend(names)
    proto.graph.input[0].name = "x"


def fix_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def retype_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def point_outside(proto: onnx.ModelProto) -> None:
    external_data_helper.set_external_data(proto.graph.initializer[0], "../weights.bin")


def foreign(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "com.example"


def older(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 18


def keep_positive(logits: Tensor) -> Tensor:
    return logits[logits[:, 0] > 0]


def drop(logits: Tensor) -> Tensor:
    return functional.dropout(logits, 0.5, training=True)


FAULTS = (
    Fault("train mode", "must be in eval mode", before=lambda net: net.train()),
    Fault("example of one row", "must have 2 rows or more; got 1", rows=1),
    Fault("oversize weights", "must fit into one file of at most 10 bytes", limit=10),
    Fault(
        "another model's metadata",
        "'assay.metadata' must equal the model's own",
        properties={"assay.metadata": "{}"},
    ),
    Fault(
        "path of the source",
        "must not tell where it was made",
        properties={"note": f"made by {Path(__file__).resolve()}"},
    ),
    Fault("constant output", r"got \(2, 3\). Find what fixes", of(lambda y: torch.ones(2, 3))),
    Fault(
        "fixed batch", "capturable with a batch of any size", of(lambda y: y + torch.ones(2, 1))
    ),
    Fault(
        "branch on values",
        "DataDependent|data-dependent",
        of(lambda y: y * 2 if y.sum() > 0 else y),
        of(lambda y: torch.where(y.sum() > 0, y * 2, y)),
    ),
    Fault(
        "branch on the batch size",
        "lacks what predict does afterwards",
        of(lambda y: y * 2 if y.shape[0] == 1 else y),
    ),
    Fault(
        "choice of rows by value", r"Its length \(u0\) depends on values", of(keep_positive)
    ),
    Fault("missing output", "outputs must be .*got", one, two, BOTH),
    Fault("output of whole numbers", "float32; got .* int64", of(lambda y: y.long())),
    Fault("output of float64", "float32; got .* float64", of(lambda y: y.double())),
    Fault(
        "declared float64",
        "a dtype that every engine runs",
        of(lambda y: y.double()),
        metadata=TABLE.model_copy(
            update={"outputs": (TABLE.outputs[0].model_copy(update={"dtype": "float64"}),)}
        ),
        declared=TABLE,
    ),
    Fault(
        "operator of a later set",
        r"BitwiseAnd .* exists from opset 18 on",
        of(lambda y: y + ((y > 0).long() & 1).to(y.dtype)),
        of(lambda y: y + (y > 0).to(y.dtype)),
        opset=15,
    ),
    Fault("set that is not there", "capturable|must declare opset", opset=99),
    Fault(
        "fixed sequence",
        "any length of the dynamic axis 'sequence'; it can be captured only with the example's 5",
        of(lambda y: y + torch.ones(5, 1)),
        metadata=STEPS,
    ),
    Fault(
        "branch on the length",
        "branch on the batch size or on the length of sequence",
        of(lambda y: y * 2 if y.shape[1] > 4 else y),
        metadata=STEPS,
    ),
    Fault("random output", "nothing can be compared", of(drop)),
    Fault(
        "stale weights",
        r"Gemm 'node_linear' of module 'linear'.* linear\.weight are not the module's",
        after=change_weights,
    ),
    Fault(
        "weights cached at construction",
        "must run in float32 and in float64",
        lambda net, y: (y + y @ net.cached[:, :3],),
        lambda net, y: (y + y @ net.linear.weight[:, :3],),
    ),
    Fault("swapped outputs", r"in this order; got \['chances', 'logits'\]", two, two, BOTH,
          tamper=swap_outputs),
    Fault("renamed input", r"inputs must be \['numbers'\]", tamper=rename_input),
    Fault("fixed batch in the file", r"input 'numbers' .*got \(2, 5\)", tamper=fix_batch),
    Fault("other dtype in the file", r"input 'numbers' must be .* float64", tamper=retype_input),
    Fault("external data", "all data must be inside the file", tamper=point_outside),
    Fault("foreign operator", r"got \['com.example'\]", tamper=foreign),
    Fault("other set in the file", r"must declare opset 20; got \[18\]", tamper=older),
)  # fmt: skip


def verdict(fault: Fault, *, broken: bool) -> str:
    """All that export, the check of the file and parity say; empty if they let it pass."""
    metadata = fault.metadata if broken else fault.declared or fault.metadata
    net = Net(fault.rule if broken else fault.twin, metadata).eval()
    rows = rows_of(metadata, fault.rows if broken else 2)
    if broken:
        fault.before(net)
    try:
        data = export_onnx(
            net,
            [torch.from_numpy(array) for array in rows.values()],
            opset=fault.opset if broken or fault.opset < 20 else 20,
            metadata=fault.properties if broken else {},
        )
    except GateError as refusal:
        return "; ".join(refusal.failures)
    if broken:
        fault.after(net)
        proto = onnx.ModelProto.FromString(data)
        fault.tamper(proto)
        data = proto.SerializeToString()
    failures = graph_failures(data, metadata, opset=min(fault.opset, 20))
    return "; ".join(failures or check_parity(net, data, rows_of(metadata, 30)).failures)


@cache
def twin_verdict(rule: Rule, metadata: ModelMetadata, opset: int) -> str:
    return verdict(Fault("", "", twin=rule, metadata=metadata, opset=opset), broken=False)


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_a_fault_is_refused_for_its_own_reason(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if fault.limit:
            patch.setattr(onnx_export, "_LIMIT", fault.limit)
        said = verdict(fault, broken=True)
    assert re.search(fault.words, said), said
    assert twin_verdict(fault.twin, fault.declared or fault.metadata, min(fault.opset, 20)) == ""


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 20
    assert len({fault.name for fault in FAULTS}) == len({fault.words for fault in FAULTS})
