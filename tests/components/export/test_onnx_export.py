"""Every rule of the exported file fires on a file, or a model, that breaks it."""

import hashlib
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from torch import Tensor, nn

from components.contract import Model, ModelMetadata, TensorSpec
from components.errors import GateError
from components.export import onnx_export
from components.export.onnx_export import export_onnx
from components.export.onnx_file import graph_failures, properties, texts

ROOT = Path(__file__).parents[3]
EXAMPLE = [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 5)]


class Small(Model):
    """One linear layer; ``rule`` makes its outputs, ``dtype`` and ``shape`` are what it claims."""

    def __init__(
        self,
        rule: Callable[[Tensor], Tensor],
        *,
        dtype: str = "float32",
        shape: tuple[int | str, ...] = ("batch", 3),
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.rule, self.dtype, self.shape = rule, dtype, shape

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.linear(inputs[0])

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.rule(self(*inputs)),)

    def get_model_metadata(self) -> ModelMetadata:
        output = {"name": "logits", "dtype": self.dtype, "shape": self.shape}
        return ModelMetadata(
            inputs=(TensorSpec(name="numeric", dtype="float32", shape=("batch", 5)),),
            outputs=(TensorSpec.model_validate(output),),
            classes=("a", "b", "c"),
            description="one layer",
        )


def export_small(model: Small, **metadata: str) -> bytes:
    return export_onnx(model.eval(), [torch.zeros(2, 5)], metadata=metadata)


def identity(logits: Tensor) -> Tensor:
    return logits


@pytest.fixture
def described(tabular: Model) -> ModelMetadata:
    return tabular.get_model_metadata()


@pytest.fixture
def proto(exported: bytes) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(exported)


def judge(proto: onnx.ModelProto, metadata: ModelMetadata, opset: int | None = None) -> str:
    return "; ".join(graph_failures(proto.SerializeToString(), metadata, opset=opset))


def test_a_good_file_is_as_declared(exported: bytes, described: ModelMetadata) -> None:
    assert graph_failures(exported, described, opset=20) == []
    proto = onnx.ModelProto.FromString(exported)
    assert [i.name for i in proto.graph.input] == ["categorical", "numeric"]
    assert [o.name for o in proto.graph.output] == ["logits", "probabilities"]
    values = (*proto.graph.input, *proto.graph.output)
    assert {v.type.tensor_type.shape.dim[0].dim_param for v in values} == {"batch"}
    assert not proto.graph.value_info


def test_properties_are_sorted_and_hold_the_models_metadata(
    exported: bytes, described: ModelMetadata
) -> None:
    held = properties(onnx.ModelProto.FromString(exported))
    assert list(held) == sorted(held)
    assert ModelMetadata.model_validate_json(held["assay.metadata"]) == described


def test_no_trace_of_the_exporting_process_is_left(exported: bytes) -> None:
    proto = onnx.ModelProto.FromString(exported)
    for word in (b"pkg.torch", b"stack_trace", b"conftest", str(ROOT).encode(), b"site-packages"):
        assert word not in exported
    assert "+" not in proto.producer_version
    assert not [text for text in texts(proto) if "/" in text or ".py" in text]


def test_the_opset_asked_for_is_the_opset_in_the_file() -> None:
    model = Small(identity).eval()
    data = export_onnx(model, [torch.zeros(2, 5)], opset=18, metadata={})
    assert [entry.version for entry in onnx.ModelProto.FromString(data).opset_import] == [18]


def test_bytes_are_equal_in_other_processes_and_folders(tmp_path: Path) -> None:
    digests = set()
    for seed, name in (("1", "first"), ("2", "second/deeper")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        script = folder / f"run_{seed}.py"
        script.write_text(SCRIPT)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)]
        done = subprocess.run(
            command, cwd=folder, env=env, check=True, capture_output=True, text=True
        )
        assert done.stderr == ""
        digests.add(done.stdout)
    assert len(digests) == 1, digests


MODELS = Path(__file__).with_name("conftest.py")
SCRIPT = f"""
import hashlib, importlib.util, sys, torch
from pathlib import Path
spec = importlib.util.spec_from_file_location("case", {str(MODELS)!r})
case = importlib.util.module_from_spec(spec)
spec.loader.exec_module(case)
from components.export.onnx_export import export_onnx

class Here(case.Tabular):
    def predict(self, *inputs):
        logits = self(*inputs)
        return logits, logits.softmax(dim=-1)

torch.manual_seed(0)
example = [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 5)]
data = export_onnx(Here().eval(), example, metadata={{"b": "2", "a": "1"}})
assert str(Path.cwd()).encode() not in data and b"run_" not in data
assert "onnxruntime" not in sys.modules
print(hashlib.sha256(data).hexdigest())
"""


def test_a_second_export_gives_equal_bytes_whatever_the_example(
    tabular: Model, exported: bytes
) -> None:
    held = properties(onnx.ModelProto.FromString(exported))
    example = [torch.ones(5, 3, dtype=torch.int64), torch.ones(5, 5)]
    again = export_onnx(tabular, example, metadata=dict(reversed(held.items())))
    assert hashlib.sha256(again).digest() == hashlib.sha256(exported).digest()


def test_global_state_is_as_before_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("torch.onnx")
    before = (list(warnings.filters), logger.level, torch.is_grad_enabled(), torch.get_rng_state())
    model = Small(identity)
    export_small(model)
    with pytest.raises(GateError):
        export_small(Small(lambda logits: logits * 2 if logits.sum() > 0 else logits))
    after = (list(warnings.filters), logger.level, torch.is_grad_enabled(), torch.get_rng_state())
    assert before[:3] == after[:3]
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")


def test_hooks_fire_while_the_graph_is_captured() -> None:
    seen = []
    model = Small(identity)
    model.register_forward_hook(lambda *_: seen.append(1))
    export_small(model)
    assert seen


def test_train_mode_is_refused_with_the_modules_named(tabular: Model) -> None:
    tabular.get_submodule("net.2").train()
    with pytest.raises(GateError, match=r"in train mode: net\.2\. Call model\.eval") as caught:
        export_onnx(tabular, EXAMPLE, metadata={})
    assert caught.value.stage == "export"


def test_a_model_away_from_the_cpu_is_refused() -> None:
    with pytest.raises(GateError, match=r"linear\.bias on meta, linear\.weight on meta"):
        export_small(Small(identity).to("meta"))


def test_all_faults_of_a_call_are_reported_together() -> None:
    model = Small(identity, shape=(4, 3)).train()
    with pytest.raises(GateError) as caught:
        export_onnx(model, [torch.zeros(1, 5)], metadata={"assay.metadata": "{}"})
    text = str(caught.value)
    assert len(caught.value.failures) == 4
    for words in ("eval mode", "first axis", "2 rows or more; got 1", "'assay.metadata'"):
        assert words in text


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ([], "one tensor per input, 1; got 0"),
        ([torch.zeros(2, 4)], r"must be \('batch', 5\) float32"),
        ([torch.zeros(2, 5, dtype=torch.float64)], "float64"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(example: list[Tensor], words: str) -> None:
    with pytest.raises(GateError, match=words):
        export_onnx(Small(identity).eval(), example, metadata={})


@pytest.mark.parametrize(
    "rule",
    [
        lambda logits: logits.reshape(2, 3),
        lambda logits: logits + torch.arange(2.0)[:, None],
        lambda logits: logits * 2 if logits.sum() > 0 else logits,
    ],
    ids=["fixed reshape", "fixed addend", "branch on values"],
)
def test_a_model_that_cannot_be_captured_dynamically_is_refused(
    rule: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(GateError, match="capturable with a batch of any size; the exporter"):
        export_small(Small(rule))


def test_metadata_of_another_shape_is_refused() -> None:
    with pytest.raises(GateError, match=r"must be \('batch', 4\) float32; got \('batch', 3\)"):
        export_small(Small(identity, shape=("batch", 4)))


def test_an_output_too_many_is_refused(tabular: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tabular), "predict", lambda self, *inputs: (self(*inputs),) * 3)
    with pytest.raises(GateError, match="outputs must be"):
        export_onnx(tabular, EXAMPLE, metadata={})


def test_a_vocabulary_of_paths_is_allowed() -> None:
    data = export_small(Small(identity), vocabulary="/srv/page, /cart/index.py")
    assert b"/cart/index.py" in data


def test_a_name_that_tells_of_the_source_is_refused() -> None:
    model = Small(identity)
    model.add_module("main", nn.ParameterDict({"py": torch.ones(3)}))
    model.rule = lambda logits: logits + model.main["py"]
    with pytest.raises(GateError, match=r"must not tell where it was made.*main\.py"):
        export_small(model)


def tampered() -> Iterator[tuple[str, Callable[[onnx.ModelProto], None], str]]:
    def rename(m: onnx.ModelProto) -> None:
        m.graph.output[0].name = "scores"

    def swap(m: onnx.ModelProto) -> None:
        first, second = list(m.graph.output)
        del m.graph.output[:]
        m.graph.output.extend([second, first])

    def swap_inputs(m: onnx.ModelProto) -> None:
        first, second = list(m.graph.input)
        del m.graph.input[:]
        m.graph.input.extend([second, first])

    def rename_axis(m: onnx.ModelProto) -> None:
        m.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "N"

    def fix_axis(m: onnx.ModelProto) -> None:
        m.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    def free_axis(m: onnx.ModelProto) -> None:
        m.graph.output[1].type.tensor_type.shape.dim[1].dim_param = "classes"

    def retype(m: onnx.ModelProto) -> None:
        m.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE

    def domain(m: onnx.ModelProto) -> None:
        m.graph.node[0].domain = "com.example"

    def declare(m: onnx.ModelProto) -> None:
        m.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    def external(m: onnx.ModelProto) -> None:
        external_data_helper.set_external_data(m.graph.initializer[0], "../weights.bin")

    def hidden(m: onnx.ModelProto) -> None:
        tensor = numpy_helper.from_array(np.zeros(1, np.float32), "t")
        external_data_helper.set_external_data(tensor, "weights.bin")
        branch = helper.make_graph([], "g", [], [], initializer=[tensor])
        m.graph.node[0].attribute.append(helper.make_attribute("then_branch", branch))

    def unsorted(m: onnx.ModelProto) -> None:
        nodes = list(reversed(m.graph.node))
        del m.graph.node[:]
        m.graph.node.extend(nodes)

    def opset(m: onnx.ModelProto) -> None:
        m.opset_import[0].version = 18

    yield "renamed output", rename, r"outputs must be \['logits', .*got \['scores'"
    yield "swapped outputs", swap, "in this order; got"
    yield "swapped inputs", swap_inputs, r"inputs must be \['categorical', 'numeric'\]"
    yield "renamed axis", rename_axis, r"axis 0 of input 'numeric' .*got \('N', 5\)"
    yield "fixed axis", fix_axis, r"axis 0 of input 'categorical' .*got \(2, 3\)"
    yield "free axis", free_axis, r"'probabilities' must be .*got \('batch', 'classes'\)"
    yield "other dtype", retype, r"'logits' must be .*got \('batch', 3\) float64"
    yield "foreign operator", domain, r"got \['com.example'\]"
    yield "foreign operator set", declare, r"got \['com.microsoft'\]"
    yield "external data", external, "all data must be inside the file"
    yield "external data in a subgraph", hidden, "all data must be inside the file; external: t"
    yield "nodes out of order", unsorted, "must pass onnx.checker"
    yield "other opset", opset, r"must declare opset 20; got \[18\]"


@pytest.mark.parametrize(
    ("tamper", "words"), [pytest.param(t, w, id=name) for name, t, w in tampered()]
)
def test_a_tampered_file_is_refused(
    proto: onnx.ModelProto,
    described: ModelMetadata,
    tamper: Callable[[onnx.ModelProto], None],
    words: str,
) -> None:
    tamper(proto)
    assert re.search(words, judge(proto, described, opset=20))


def test_bytes_that_are_no_protobuf_are_refused(described: ModelMetadata) -> None:
    assert graph_failures(b"\xff" * 40, described)[0].startswith("the file must be an ONNX")
    assert graph_failures(b"", described)


def test_what_the_exporter_writes_is_verified_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture = onnx_export.capture

    def keeps_another_opset(*args: object) -> onnx.ModelProto:
        proto = capture(*args)  # type: ignore[arg-type]
        proto.opset_import[0].version = 18
        return proto

    monkeypatch.setattr(onnx_export, "capture", keeps_another_opset)
    with pytest.raises(GateError, match=r"must declare opset 20; got \[18\]"):
        export_small(Small(identity))
