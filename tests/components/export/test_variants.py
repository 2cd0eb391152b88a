"""Smaller forms: what they compute, what they keep, and what makes one be left out."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from onnx import TensorProto, helper
from support.training_lab import CLASSES, COLUMNS, NAMES, PIPELINE, snapshot_of
from torch import Tensor, nn

from components.contract import Model, ModelMetadata, TensorSpec
from components.data.encoding import Encoding, Features, fit_encoding
from components.data.snapshot import Snapshot
from components.errors import ContractError
from components.export.config import Variant
from components.export.onnx_export import export_onnx
from components.export.onnx_file import DOMAINS, METADATA_KEY, properties
from components.export.predictors import open_session, run_session
from components.export.smaller import VARIANT_KEY, make_variant
from components.export.variant_report import variants_markdown
from components.export.variants import MadeVariant, run_variants
from components.metrics import class_metrics
from components.pipeline import Pipeline

ROWS = 300
FP16 = Variant(kind="fp16", tolerance=5e-3, metric_drop=0.02)
INT8 = Variant(kind="int8", tolerance=6e-2, metric_drop=0.02)
KINDS = pytest.mark.parametrize("variant", [FP16, INT8], ids=lambda variant: variant.kind)


class Net(Model):
    """A body between one input and the probabilities of three classes, with their label."""

    def __init__(self, encoding: Encoding, body: nn.Module) -> None:
        super().__init__()
        self._inputs = encoding.specs()
        self.body = body

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.body(inputs[0])
        return logits

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        logits = self(*inputs)
        return torch.softmax(logits, dim=1), logits.argmax(dim=1)

    def get_model_metadata(self) -> ModelMetadata:
        outputs = (
            TensorSpec(name="probabilities", dtype="float32", shape=("batch", CLASSES)),
            TensorSpec(name="code", dtype="int64", shape=("batch",)),
        )
        return ModelMetadata(
            inputs=self._inputs, outputs=outputs, classes=("x", "y", "z"), description="a net"
        )


class Times(nn.Module):
    """Multiplies columns by constants."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.register_buffer("factors", torch.tensor(factors))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factors


def mlp() -> nn.Module:
    first, last = nn.Linear(COLUMNS, 128), nn.Linear(128, CLASSES)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), last)


def conv() -> nn.Module:
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), head
    )


def uneven() -> nn.Module:
    """One hidden unit is a million times as large as the others, and hardly counts."""
    large, small = [1e6] + [1.0] * 127, [1e-6] + [1.0] * 127
    ends = nn.Linear(COLUMNS, 128), nn.Linear(128, CLASSES)
    middle = nn.Linear(128, 128)
    with torch.no_grad():
        middle.weight[:, 0] = 0.0
        ends[1].weight *= 20
    return nn.Sequential(ends[0], Times(*large), middle, Times(*small), nn.ReLU(), ends[1])


def loud() -> nn.Module:
    """Hidden units beyond 65504, which are scaled down again."""
    up, down = ([Times(*[scale] * 128) for _ in range(2)] for scale in (1e3, 1e-3))
    ends = nn.Linear(COLUMNS, 128), nn.Linear(128, CLASSES)
    return nn.Sequential(ends[0], *up, nn.ReLU(), *down, ends[1])


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with rows whose labels are its own answers."""

    model: Net
    encoding: Encoding
    snapshot: Snapshot
    pipeline: Pipeline
    onnx: bytes

    def judge(self, *variants: Variant) -> list[MadeVariant]:
        return run_variants(
            variants, self.onnx, self.model, self.encoding, self.snapshot, self.pipeline
        )

    def only(self, variant: Variant) -> MadeVariant:
        (made,) = self.judge(variant)
        return made


@pytest.fixture
def case(tmp_path: Path) -> Callable[[nn.Module], Case]:
    def make(body: nn.Module, scale: float = 1.0) -> Case:
        images = any(isinstance(part, nn.Conv2d) for part in body.modules())
        rng = np.random.default_rng(3)
        if images:
            values = rng.normal(size=(ROWS, 64)).astype(np.float32)
            columns = {"image": pa.FixedSizeListArray.from_arrays(values.ravel(), 64)}
            features = Features(label="label", classes=CLASSES, tensors={"image": (1, 8, 8)})
            rows = torch.from_numpy(values).reshape(-1, 1, 8, 8)
        else:
            values = (scale * rng.normal(size=(ROWS, COLUMNS))).astype(np.float32)
            columns = dict(zip(NAMES, values.T, strict=True))
            features = Features(label="label", classes=CLASSES, numeric=NAMES)
            rows = torch.from_numpy(values)
        with torch.inference_mode():
            labels = body.eval()(rows).argmax(dim=1).numpy()
        pipeline = dataclasses.replace(
            PIPELINE,
            features=features,
            metrics=lambda scored: class_metrics(scored, "probabilities"),
        )
        snapshot = snapshot_of(pa.table({**columns, "label": labels}), tmp_path, pipeline)
        encoding = fit_encoding(features, snapshot.statistics)
        model = Net(encoding, body).eval()
        data = export_onnx(model, [rows[:2]], metadata={"assay.pipeline": "lab"})
        return Case(model, encoding, snapshot, pipeline, data)

    torch.manual_seed(0)
    return make


@pytest.mark.parametrize("body", [mlp, conv])
def test_sound_models_keep_their_bounds(
    case: Callable[[nn.Module], Case], body: Callable[[], nn.Module]
) -> None:
    here = case(body())
    made = here.judge(FP16, INT8)
    for item in made:
        report = item.report
        assert report.passed, report.failures
        assert report.rows == ROWS
        assert 0 < report.differences["probabilities"] <= item.variant.tolerance
        assert report.differences["code"] < 0.05
        assert report.size_bytes == len(item.onnx) < len(here.onnx) == report.main_size_bytes
        assert math.isfinite(report.metric_value) and report.metric_value > 0.97
        for speed in (report.speed, report.main_speed):
            assert speed is not None
            assert 0 < speed.p50_ms <= speed.p99_ms
            assert speed.rows_per_s > 0
    assert made[0].report.difference < made[1].report.difference
    assert len(made[1].onnx) < len(made[0].onnx)
    table = variants_markdown([item.report for item in made])
    assert table.count("| yes |") == 2
    assert "left out" not in table


@KINDS
def test_files_are_reproducible_and_keep_what_the_main_file_says(
    case: Callable[[nn.Module], Case], variant: Variant
) -> None:
    here = case(mlp())
    data = make_variant(variant.kind, here.onnx)
    assert data == make_variant(variant.kind, here.onnx)
    proto, main = (onnx.ModelProto.FromString(d) for d in (data, here.onnx))
    assert properties(proto) == {**properties(main), VARIANT_KEY: variant.kind}
    assert METADATA_KEY in properties(proto)
    assert proto.opset_import == main.opset_import
    assert {node.domain for node in proto.graph.node} <= DOMAINS
    sides = [(p.graph.input, p.graph.output) for p in (proto, main)]
    assert sides[0] == sides[1]


def test_int8_breaks_on_activations_of_very_different_sizes(
    case: Callable[[nn.Module], Case],
) -> None:
    made = case(uneven()).only(dataclasses.replace(INT8, metric_drop=1.0))
    assert not made.report.passed
    (failure,) = made.report.failures
    assert failure.startswith("output 'probabilities' must be within 0.06 of the module in float64")


def test_fp16_breaks_on_activations_beyond_its_range(case: Callable[[nn.Module], Case]) -> None:
    here = case(loud())
    made, whole = here.judge(FP16, INT8)
    assert not made.report.passed
    assert "output 'probabilities' must be within 0.005" in made.report.failures[0]
    assert made.report.difference == math.inf
    assert not made.report.passed and whole.report.passed  # nothing is wrong with the model
    table = variants_markdown([made.report, whole.report])
    assert "| fp16 | no |" in table
    assert "fp16 is left out: output 'probabilities'" in table


def test_fp16_refuses_weights_beyond_its_range(case: Callable[[nn.Module], Case]) -> None:
    body = mlp()
    with torch.no_grad():
        body[2].weight[0, 0] = 70_000.0  # type: ignore[index, union-attr, operator]
    made = case(body).only(FP16)
    assert made.onnx == b""
    (failure,) = made.report.failures
    assert "weights must fit into half precision, up to 65504" in failure
    assert "model.body.2.weight" in failure
    assert "| fp16 | no | 0 B" in variants_markdown([made.report])


def test_a_worse_metric_alone_is_reason_enough(case: Callable[[nn.Module], Case]) -> None:
    made = case(uneven()).only(dataclasses.replace(INT8, tolerance=1.0))
    assert not made.report.passed
    assert made.report.metric_difference < -INT8.metric_drop
    (failure,) = made.report.failures
    assert failure.startswith("accuracy must be at most 0.02 worse than the main file's 1.0000")


def test_a_metric_that_is_no_number_is_refused(case: Callable[[nn.Module], Case]) -> None:
    here = case(mlp())
    blind = dataclasses.replace(here.pipeline, metrics=lambda scored: {"accuracy": math.nan})
    made = dataclasses.replace(here, pipeline=blind).only(FP16)
    assert "accuracy must be at most" in made.report.failures[0]


def test_a_variant_that_is_not_smaller_is_refused(case: Callable[[nn.Module], Case]) -> None:
    made = case(nn.Linear(COLUMNS, CLASSES)).only(INT8)
    (failure,) = made.report.failures
    assert failure.startswith("a variant must be smaller than the main file's")


def test_a_graph_without_products_has_no_int8(case: Callable[[nn.Module], Case]) -> None:
    made = case(nn.Sequential(nn.AdaptiveAvgPool1d(CLASSES), nn.Tanh())).only(INT8)
    (failure,) = made.report.failures
    assert "int8 needs a MatMul, Gemm or Conv with constant weights" in failure


@KINDS
def test_a_graph_with_nested_graphs_is_refused(variant: Variant) -> None:
    then, other = (
        helper.make_graph(
            [helper.make_node("Identity", ["x"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"])],
        )
        for name in ("a", "b")
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(ContractError, match=r"without nested graphs and functions; got \['If'\]"):
        make_variant(variant.kind, proto.SerializeToString())


@KINDS
def test_missing_values_and_embeddings_come_through(
    variant: Variant, exported: bytes, rows: dict[str, np.ndarray]
) -> None:
    wanted = run_session(open_session(exported), rows)
    got = run_session(open_session(make_variant(variant.kind, exported)), rows)
    for name, (a, b) in enumerate(zip(wanted, got, strict=True)):
        assert np.isfinite(b).all(), name
        np.testing.assert_allclose(a, b, atol=variant.tolerance)


def test_raw_columns_are_not_rounded_to_half_precision(case: Callable[..., Case]) -> None:
    """Values that float16 cannot hold are normalised first, in float32."""
    here = case(nn.Sequential(Times(*[1e-7] * COLUMNS), mlp()), 1e7)
    with np.errstate(over="ignore"):
        assert np.isinf(here.snapshot.table("holdout")["a"].to_numpy().astype(np.float16)).any()
    made = here.only(FP16)
    assert made.report.passed, made.report.failures


def test_without_variants_nothing_is_computed(case: Callable[[nn.Module], Case]) -> None:
    here = case(mlp())
    assert dataclasses.replace(here, onnx=b"not a file").judge() == []
