"""Parity holds for good exports, and each way of being another function is found."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from components.contract import Arrays, Model, ModelMetadata, TensorSpec
from components.errors import ContractError, GateError
from components.export.measures import Run, Yardstick, changed_decisions, measure
from components.export.onnx_export import export_onnx
from components.export.onnx_file import graph_failures
from components.export.parity import ParityReport, check_parity, require_parity
from components.export.probes import BATCHES, LARGE, neighbours, probe_rows, split_batches


class Small(Model):
    """One linear layer whose logits pass through ``rule``."""

    def __init__(self, rule: Callable[[Tensor], Tensor], *, shape: int | None = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, shape or 1)
        self.rule, self.shape = rule, shape

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.linear(inputs[0])

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.rule(self(*inputs)),)

    def get_model_metadata(self) -> ModelMetadata:
        shape = ("batch", self.shape) if self.shape else ("batch",)
        return ModelMetadata(
            inputs=(TensorSpec(name="numeric", dtype="float32", shape=("batch", 5)),),
            outputs=(TensorSpec(name="logits", dtype="float32", shape=shape),),
            classes=("a", "b", "c"),
            description="one layer",
        )


def exported_small(model: Small) -> bytes:
    return export_onnx(model.eval(), [torch.zeros(2, 5)], metadata={})


@pytest.fixture
def numbers() -> Arrays:
    return {"numeric": np.random.default_rng(1).normal(size=(50, 5)).astype(np.float32)}


def with_weight(data: bytes, ending: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    proto = onnx.ModelProto.FromString(data)
    (tensor,) = [t for t in proto.graph.initializer if t.name.endswith(ending)]
    changed = change(numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    return proto.SerializeToString()


def test_a_good_export_passes_every_case(tabular: Model, exported: bytes, rows: Arrays) -> None:
    report = check_parity(tabular, exported, rows)
    require_parity(report)
    assert report.failures == ()
    kinds = {"real", "random", "zeros", "large", "missing"}
    assert {(c.case, c.batch, c.optimisation, c.output) for c in report.cases} == {
        (kind, batch, level, output)
        for kind in kinds
        for batch in BATCHES
        for level in ("disabled", "all")
        for output in ("logits", "probabilities")
    }
    assert all(0 <= c.error <= c.allowed <= 1e-3 * c.scale for c in report.cases)


def test_a_conv_net_with_an_integer_output_passes(
    conv: Model, exported_conv: bytes, images: Arrays
) -> None:
    report = check_parity(conv, exported_conv, images)
    require_parity(report)
    labels = [c for c in report.cases if c.output == "label"]
    assert labels
    assert {(c.error, c.allowed) for c in labels} == {(0.0, 0.0)}
    assert "missing" not in {c.case for c in report.cases}


def test_the_report_is_json_and_deterministic(
    tabular: Model, exported: bytes, rows: Arrays
) -> None:
    report = check_parity(tabular, exported, rows, seed=3)
    assert ParityReport.model_validate_json(report.model_dump_json()) == report
    assert check_parity(tabular, exported, rows, seed=3) == report
    assert check_parity(tabular, exported, rows, seed=4) != report


def test_the_model_is_left_as_it_was(tabular: Model, exported: bytes, rows: Arrays) -> None:
    tabular.get_submodule("net").train()
    before = {name: value.clone() for name, value in tabular.state_dict().items()}
    require_parity(check_parity(tabular, exported, rows))
    assert tabular.get_submodule("net").training
    assert not tabular.training
    assert all(torch.equal(before[k], v) for k, v in tabular.state_dict().items())


@pytest.mark.parametrize("count", [1, 2, 1500])
def test_few_and_many_rows_are_enough(
    tabular: Model, exported: bytes, rows: Arrays, count: int
) -> None:
    taken = {name: np.resize(array, (count, *array.shape[1:])) for name, array in rows.items()}
    require_parity(check_parity(tabular, exported, taken))


def test_a_tampered_weight_is_found_with_measured_and_allowed(
    tabular: Model, exported: bytes, rows: Arrays
) -> None:
    tampered = with_weight(exported, "net.3.bias", lambda w: w + np.float32(1e-4))
    report = check_parity(tabular, tampered, rows)
    assert not report.passed
    failing = [c for c in report.cases if c.error > c.allowed]
    assert {"real", "zeros", "missing", "random"} <= {c.case for c in failing}
    assert len(failing) + 1 == len(report.failures)
    assert report.divergence is not None
    assert report.failures[0] == report.divergence.sentence
    first = next(c for c in failing if c.batch == 1)
    words = (
        f"{first.case} rows, batch 1, optimisation {first.optimisation}: output {first.output!r} "
        f"must be within {first.allowed:.3g} of the float64 module; got {first.error:.3g}"
    )
    assert any(failure.startswith(words) for failure in report.failures)
    with pytest.raises(GateError) as caught:
        require_parity(report)
    assert (caught.value.stage, caught.value.failures) == ("export", report.failures)
    assert caught.value.culprit == "net.3"


def test_one_part_in_a_thousand_of_one_weight_is_found(
    tabular: Model, exported: bytes, rows: Arrays
) -> None:
    def nudge(weights: np.ndarray) -> np.ndarray:
        changed = weights.copy()
        at = np.unravel_index(np.abs(weights).argmax(), weights.shape)
        changed[at] *= np.float32(1.001)
        return changed

    assert not check_parity(tabular, with_weight(exported, "net.3.weight", nudge), rows).passed


def test_changed_decisions_are_named(tabular: Model, exported: bytes, rows: Arrays) -> None:
    flipped = with_weight(exported, "net.3.weight", lambda w: -w)
    report = check_parity(tabular, flipped, rows)
    assert any("must decide as the module does" in failure for failure in report.failures)


def test_missing_values_that_the_graph_imputes_otherwise_are_found(
    tabular: Model, exported: bytes, rows: Arrays
) -> None:
    numbers = np.nan_to_num(rows["numeric"])
    proto = onnx.ModelProto.FromString(exported)
    (node,) = [n for n in proto.graph.node if n.op_type == "IsNaN"]
    node.op_type = "IsInf"
    changed = proto.SerializeToString()
    assert check_parity(tabular, changed, {**rows, "numeric": numbers}).passed
    report = check_parity(tabular, changed, rows)
    assert {c.case for c in report.cases if c.error == float("inf")} == {"real", "missing"}
    assert ParityReport.model_validate_json(report.model_dump_json()) == report


def test_names_come_first_and_alone(tabular: Model, exported: bytes, rows: Arrays) -> None:
    proto = onnx.ModelProto.FromString(exported)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    report = check_parity(tabular, proto.SerializeToString(), rows)
    assert report.cases == ()
    order = ("must pass onnx.checker", "must be the dynamic axis", "'logits' must be")
    assert len(report.failures) == len(order)
    assert all(word in f for word, f in zip(order, report.failures, strict=True))
    proto.graph.output[0].name = "scores"
    last = check_parity(tabular, proto.SerializeToString(), rows).failures[-1]
    assert "outputs must be ['logits'" in last


def test_swapped_labels_are_found(tabular: Model, exported: bytes, rows: Arrays) -> None:
    proto = onnx.ModelProto.FromString(exported)
    other = {"logits": "probabilities", "probabilities": "logits"}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            renamed = [other.get(name, name) for name in names]
            del names[:]
            names.extend(renamed)
    assert check_parity(tabular, proto.SerializeToString(), rows).cases
    assert not check_parity(tabular, proto.SerializeToString(), rows).passed


def test_a_model_that_specialises_on_a_batch_of_one_is_found(numbers: Arrays) -> None:
    model = Small(lambda logits: logits * 2 if logits.shape[0] == 1 else logits)
    report = check_parity(model, exported_small(model), numbers)
    assert {c.batch for c in report.cases if c.error > c.allowed} == {1}
    assert "a choice that the export has fixed" in report.failures[0]
    assert "branch on the batch size" in report.failures[1]


def test_a_graph_that_fixes_the_batch_inside_is_found(numbers: Arrays) -> None:
    model = Small(lambda logits: logits.reshape(-1, 3))
    proto = onnx.ModelProto.FromString(exported_small(model))
    (sizes,) = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT64]
    sizes.CopyFrom(numpy_helper.from_array(np.array([7, 3]), sizes.name))
    assert graph_failures(proto.SerializeToString(), model.get_model_metadata()) == []
    report = check_parity(model, proto.SerializeToString(), numbers)
    assert {case.batch for case in report.cases} == {7}
    assert any("batch 3" in f and "a size that predict fixes" in f for f in report.failures)


def test_a_module_that_a_rounding_error_turns_over_is_refused(numbers: Arrays) -> None:
    model = Small(lambda logits: (logits * 2**24).sin())
    report = check_parity(model, exported_small(model), numbers)
    assert any("or nothing can be compared" in failure for failure in report.failures)


def test_overflow_of_large_rows_alone_is_no_fault(numbers: Arrays) -> None:
    model = Small(lambda logits: (logits * logits).exp())
    require_parity(check_parity(model, exported_small(model), numbers))


def test_an_output_without_classes_passes(numbers: Arrays) -> None:
    model = Small(lambda logits: logits.sigmoid().squeeze(-1), shape=None)
    data = exported_small(model)
    require_parity(check_parity(model, data, numbers))
    assert not check_parity(model, with_weight(data, "linear.bias", lambda w: -w), numbers).passed


def test_inputs_that_do_not_fit_are_the_callers_fault(
    tabular: Model, exported: bytes, rows: Arrays
) -> None:
    with pytest.raises(ContractError, match="'numeric' must be"):
        check_parity(tabular, exported, {**rows, "numeric": rows["numeric"].astype(np.float64)})
    with pytest.raises(ContractError, match="at least one row"):
        check_parity(tabular, exported, {name: array[:0] for name, array in rows.items()})


def test_probes_stay_within_what_was_observed(rows: Arrays) -> None:
    made = dict(probe_rows(rows, np.random.default_rng(0)))
    codes = rows["categorical"]
    for kind, arrays in made.items():
        assert {a.shape[0] for a in arrays.values()} == {1024}
        assert {k: a.dtype for k, a in arrays.items()} == {k: a.dtype for k, a in rows.items()}
        if kind != "zeros":
            for place in range(codes.shape[1]):
                assert set(arrays["categorical"][:, place]) <= set(codes[:, place])
    low, high = np.nanmin(rows["numeric"], axis=0), np.nanmax(rows["numeric"], axis=0)
    assert (made["random"]["numeric"] >= low).all()
    assert (made["random"]["numeric"] <= high).all()
    assert LARGE / 2 < np.abs(made["large"]["numeric"]).max() <= LARGE * max(-low.min(), high.max())
    missing = np.isnan(made["missing"]["numeric"])
    assert missing[:, :2].mean() > 0.4
    assert missing[0, :2].all()
    assert not missing[:, 2:].any()


def test_batches_have_the_sizes_and_neighbours_are_adjacent(rows: Arrays) -> None:
    made = dict(probe_rows(rows, np.random.default_rng(0)))["real"]
    sizes = tuple(batch["numeric"].shape[0] for batch in split_batches(made))
    assert sizes == BATCHES
    moved = neighbours(made, np.random.default_rng(0))
    assert (moved["categorical"] == made["categorical"]).all()
    steps = np.abs(moved["numeric"] - made["numeric"])
    assert np.nanmax(steps / np.spacing(np.abs(made["numeric"]))) == 1
    assert (np.isnan(moved["numeric"]) == np.isnan(made["numeric"])).all()


def test_measures_against_numbers_worked_out_by_hand() -> None:
    rows = {"x": np.zeros((2, 1), np.float32)}
    wanted, narrow = np.array([[3.0, 1.0], [1.0, 1.5]]), np.array([[3.25, 1.0], [1.0, 1.5]])
    run = Run("real", rows, [wanted], [narrow])
    yardstick = measure([run], 0, Yardstick())
    assert (yardstick.error, yardstick.scale, yardstick.allowed) == (0.25, 3.0, 1.0)
    assert measure([run], 0, Yardstick(0.5, 8.0)) == Yardstick(0.5, 8.0)
    assert Yardstick(0.0, 5.0).allowed == pytest.approx(5e-6)
    swapped = [wanted[:, ::-1]]
    assert changed_decisions(run, 0, swapped, 0.9) == 1  # the margins are 2 and 0.5
    assert changed_decisions(run, 0, swapped, 0.2) == 2
    assert changed_decisions(run, 0, swapped, 1.0) == 0
    holes = [np.array([[np.nan, 1.0], [1.0, np.inf]])]
    assert np.isinf(run.differences(0, holes)).sum() == 2
