"""Rows in front of the network, the label behind it: every kind of column, and what is refused."""

import datetime as dt
import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from components.contract import Model, ModelMetadata, TensorSpec
from components.data.encoding import Encoding, Features, fit_encoding
from components.data.statistics import describe
from components.errors import ContractError, DataError, GateError
from components.export.onnx_export import export_onnx
from components.export.onnx_file import ENCODING_KEY, graph_failures
from components.export.predictors import OnnxPredictor, TorchPredictor
from components.export.raw_columns import RawColumns, raw_columns
from components.export.raw_graph import label_of, registered_metadata
from components.export.raw_parity import Registered, check_raw_parity
from components.train.run import to_tensors

ROWS = pa.table(
    {
        "carrier": ["AA", "UA", "", "déjà vu", "UA", "AA"],
        "gate": pa.array(["x", None, "y", "x", None, "y"]).dictionary_encode(),
        "day": pa.array([dt.date(2013, 1, 1), dt.date(2013, 1, 2), None] * 2),
        "stops": pa.array([0, 1, 2, 0, 1, -3], pa.int8()),
        "plane": pa.array([7, None, 9, 7, 9, None], pa.int32()),
        "late_before": pa.array([True, False, True, True, False, False]),
        "insured": pa.array([True, None, False, True, None, False]),
        "distance": pa.array([1.5, 2.25, 1e6, -4.0, 0.1, 7.0], pa.float64()),
        "delay": pa.array([1.5, None, float("nan"), 4.0, 0.1, 7.0], pa.float32()),
        "seats": pa.array([100, None, 300, 16_777_217, 2, 1], pa.int64()),
        "image": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(24.0, dtype="f4")), 4),
        "y": pa.array([0, 1, 2, 0, 1, 2], pa.int8()),
    },
    schema=pa.schema(
        [
            pa.field("carrier", pa.string(), nullable=False),
            pa.field("gate", pa.dictionary(pa.int32(), pa.string())),
            pa.field("day", pa.date32()),
            pa.field("stops", pa.int8(), nullable=False),
            pa.field("plane", pa.int32()),
            pa.field("late_before", pa.bool_(), nullable=False),
            pa.field("insured", pa.bool_()),
            pa.field("distance", pa.float64(), nullable=False),
            pa.field("delay", pa.float32()),
            pa.field("seats", pa.int64()),
            pa.field("image", pa.list_(pa.float32(), 4), nullable=False),
            pa.field("y", pa.int8(), nullable=False),
        ]
    ),
)
CATEGORICAL = ("carrier", "gate", "day", "stops", "plane", "late_before", "insured")
NUMERIC = ("stops", "distance", "delay", "seats", "late_before")
CLASSES = ("low", "mid", "high")


class Anything(Model):
    """Takes whatever an encoding gives, and answers probabilities of K classes, or one of two."""

    def __init__(self, encoding: Encoding, classes: Sequence[str], form: str = "wide") -> None:
        super().__init__()
        self._inputs = encoding.specs()
        self.classes, self.form = tuple(classes), form
        sizes = [len(c.vocabulary) + 1 for c in encoding.categorical]
        self.tables = nn.ModuleList([nn.Embedding(size, 3) for size in sizes])
        width = 3 * len(sizes) + len(encoding.numeric)
        width += sum(int(np.prod(f.shape)) for f in encoding.folded)
        self.head = nn.Linear(width, len(classes) if form == "wide" else 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip((s.name for s in self._inputs), inputs, strict=True))
        parts = []
        if "categorical" in given:
            codes = given.pop("categorical")
            parts += [table(codes[:, i]) for i, table in enumerate(self.tables)]
        for values in given.values():
            parts.append(torch.tanh(torch.nan_to_num(values, nan=0.25).flatten(1) / 8))
        return self.head(torch.cat(parts, dim=1))

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        logits = self(*inputs)
        match self.form:
            case "wide":
                return (torch.softmax(logits, dim=1),)
            case "column":
                return (torch.sigmoid(logits),)
            case "logit":
                return (logits.squeeze(1) * 8,)
        return (torch.sigmoid(logits).squeeze(1),)

    def get_model_metadata(self) -> ModelMetadata:
        shapes: dict[str, tuple[str | int, ...]] = {
            "wide": ("batch", len(self.classes)),
            "column": ("batch", 1),
        }
        shape = shapes.get(self.form, ("batch",))
        return ModelMetadata(
            inputs=self._inputs,
            outputs=(TensorSpec(name="score", dtype="float32", shape=shape),),
            classes=self.classes,
            description="anything",
        )


def fitted(**chosen: Any) -> Encoding:
    return fit_encoding(Features(label="y", classes=3, min_count=1, **chosen), describe(ROWS))


@functools.cache
def built(
    encoding: Encoding, classes: tuple[str, ...] = CLASSES, form: str = "wide", opset: int = 20
) -> tuple[Anything, Registered]:
    torch.manual_seed(0)
    model = Anything(encoding, classes, form).eval()
    described = model.get_model_metadata()
    example = to_tensors(encoding.encode(ROWS))
    properties = {ENCODING_KEY: encoding.model_dump_json()}
    network = export_onnx(model, example, opset=opset, metadata=properties)
    columns = raw_columns(encoding, ROWS.schema)
    threshold = 0.0 if form == "logit" else 0.5
    return model, Registered.compose(network, described, encoding, columns, threshold)


EVERYTHING = {"categorical": CATEGORICAL, "numeric": NUMERIC, "tensors": {"image": (2, 2)}}


def test_each_column_is_an_input_of_its_own_type() -> None:
    _, registered = built(fitted(**EVERYTHING))
    assert {spec.name: spec.dtype for spec in registered.metadata.inputs} == {
        "carrier": "string",
        "gate": "string",
        "day": "string",
        "stops": "int64",
        "plane": "float64",
        "late_before": "bool",
        "insured": "float64",
        "distance": "float64",
        "delay": "float64",
        "seats": "float64",
        "image": "float32",
    }
    assert graph_failures(registered.onnx, registered.metadata, opset=20) == []


@pytest.mark.parametrize(
    ("chosen", "opset"),
    [
        (EVERYTHING, 20),
        (EVERYTHING, 15),
        ({"categorical": CATEGORICAL}, 20),
        ({"numeric": NUMERIC}, 20),
        ({"tensors": {"image": (2, 2)}}, 20),
        ({"categorical": ("stops",), "numeric": ("stops", "delay")}, 18),
    ],
    ids=["everything", "opset 15", "categories", "numbers", "image", "read twice"],
)
def test_every_kind_of_column_answers_as_the_module_does(
    chosen: dict[str, Any], opset: int
) -> None:
    encoding = fitted(**chosen)
    model, registered = built(encoding, opset=opset)
    report = check_raw_parity(model, registered, ROWS)
    assert report.failures == ()
    assert len(report.cases) >= 20
    predictor = OnnxPredictor(registered.onnx)
    answers = predictor.predict(predictor.encoding.encode(ROWS))
    wanted = TorchPredictor(model).predict(encoding.encode(ROWS))["score"]
    np.testing.assert_allclose(answers["score"], wanted, rtol=1e-5)
    assert answers["label"].tolist() == [CLASSES[i] for i in wanted.argmax(axis=1)]


@pytest.mark.parametrize("form", ["flat", "column", "logit"])
def test_one_number_a_row_turns_to_the_second_class_above_its_threshold(form: str) -> None:
    model, registered = built(fitted(**EVERYTHING), ("on time", "late"), form)
    assert check_raw_parity(model, registered, ROWS).failures == ()
    predictor = OnnxPredictor(registered.onnx)
    answers = predictor.predict(predictor.encoding.encode(ROWS))
    late = answers["score"].reshape(-1) > registered.threshold
    assert answers["label"].tolist() == ["late" if row else "on time" for row in late]
    assert {*answers["label"]} == {"late", "on time"}
    assert answers["label"].shape == (6,)


def test_a_column_without_any_frequent_category_is_always_unknown() -> None:
    features = Features(label="y", classes=3, categorical=("carrier", "stops"), min_count=50)
    model, registered = built(fit_encoding(features, describe(ROWS)))
    assert check_raw_parity(model, registered, ROWS).failures == ()


def test_equal_arguments_give_equal_bytes() -> None:
    first, second = (built.__wrapped__(fitted(**EVERYTHING))[1].onnx for _ in range(2))
    assert first == second


def test_columns_of_different_lengths_are_refused_by_the_runtime() -> None:
    encoding = fitted(categorical=("carrier", "gate"), numeric=("distance", "delay"))
    _, registered = built(encoding)
    predictor = OnnxPredictor(registered.onnx)
    feed = registered.columns.encode(ROWS)
    session = predictor._session
    for name in feed:
        for rows in (feed[name][:1], feed[name][:3]):
            with pytest.raises(Exception, match="(?i)concat|dimension|shape"):
                session.run(None, {**feed, name: rows})
    assert len(session.run(None, dict(feed))[0]) == 6
    assert len(session.run(None, {name: array[:0] for name, array in feed.items()})[0]) == 0


def test_names_that_clash_are_refused() -> None:
    encoding = fitted(categorical=("carrier",), numeric=("distance",))
    described = Anything(encoding, CLASSES).get_model_metadata()
    columns = raw_columns(encoding, ROWS.schema)
    for name in ("score", "label"):
        renamed = columns.columns[0].model_copy(update={"name": name})
        clashing = RawColumns(columns=(renamed, *columns.columns[1:]))
        with pytest.raises(GateError, match=f"names of their own; {name} stands for two"):
            registered_metadata(described, clashing)


def test_an_empty_text_that_is_a_category_cannot_stand_for_a_missing_one() -> None:
    encoding = fitted(categorical=("carrier",))
    assert "" in encoding.categorical[0].vocabulary
    schema = pa.schema([pa.field("carrier", pa.string())])
    with pytest.raises(GateError, match="stands for a missing one.*carrier"):
        raw_columns(encoding, schema)
    assert raw_columns(encoding, ROWS.schema).columns[0].dtype == "string"


def test_a_column_with_holes_that_it_must_not_have_is_refused() -> None:
    columns = raw_columns(fitted(categorical=("stops",), numeric=("distance",)), ROWS.schema)
    stops = pa.array([1, None, 2, 3, 4, 5], pa.int8())
    rows = ROWS.drop_columns(["stops"]).append_column("stops", stops)
    with pytest.raises(DataError, match=r"'stops' must hold int64 values.*1 of 6 values"):
        columns.encode(rows)
    with pytest.raises(DataError, match="column 'stops' must be present"):
        columns.encode(ROWS.drop_columns(["stops"]))
    texts = ROWS.drop_columns(["distance"]).append_column("distance", pa.array(["far"] * 6))
    with pytest.raises(DataError, match="'distance' must hold float64 values"):
        columns.encode(texts)


def _spoiled(registered: Registered, change: Any) -> Registered:
    proto = onnx.ModelProto.FromString(registered.onnx)
    change(proto)
    return Registered(**{**vars(registered), "onnx": proto.SerializeToString()})


def _swap_vocabulary(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node if n.name.endswith("code/carrier/LabelEncoder"))
    (keys,) = (a for a in node.attribute if a.name == "keys_strings")
    keys.strings[:] = [*keys.strings[1:], keys.strings[0]]


def _swap_columns(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node if n.output[0].endswith("number_B1/delay"))
    node.input[0] = "distance"


def _swap_classes(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node if n.output[0] == "label")
    (values,) = (a for a in node.attribute if a.name == "values_strings")
    values.strings[:] = values.strings[::-1]


def _no_unknown(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node if n.name.endswith("code/plane/LabelEncoder"))
    (default,) = (a for a in node.attribute if a.name == "default_int64")
    default.i = 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_swap_vocabulary, r"rows/real|real rows.*'score' must be within.*encoding disagree"),
        (_swap_columns, "'score' must be within"),
        (_swap_classes, "'label' must name the class"),
        (_no_unknown, "(missing|unseen) rows.*'score' must be within"),
    ],
)
def test_a_graph_that_reads_rows_wrongly_is_found(change: Any, reason: str) -> None:
    model, registered = built(fitted(**EVERYTHING))
    report = check_raw_parity(model, _spoiled(registered, change), ROWS)
    assert not report.passed
    assert re.search(reason, " ".join(report.failures)), report.failures


def test_a_graph_with_other_inputs_is_refused_before_it_runs() -> None:
    model, registered = built(fitted(**EVERYTHING))

    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].name = "airline"
        for node in proto.graph.node:
            node.input[:] = ["airline" if name == "carrier" else name for name in node.input]

    report = check_raw_parity(model, _spoiled(registered, rename), ROWS)
    assert "inputs must be" in report.failures[0]
    assert report.cases == ()


def test_label_of_wide_and_single_outputs() -> None:
    described = Anything(fitted(numeric=("delay",)), CLASSES).get_model_metadata()
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]], np.float32)
    assert label_of(described, {"score": scores}, 0.5).tolist() == ["mid", "low"]
    two = Anything(fitted(numeric=("delay",)), ("no", "yes"), "flat").get_model_metadata()
    assert label_of(two, {"score": np.array([0.5, 0.51])}, 0.5).tolist() == ["no", "yes"]


def test_predictor_refuses_objects_in_place_of_text() -> None:
    _, registered = built(fitted(categorical=("carrier",)))
    with pytest.raises(ContractError, match="'carrier' must be"):
        OnnxPredictor(registered.onnx).predict({"carrier": np.array(["AA"], dtype=object)})
