"""Scoring: the predictor sees encoded rows, the metrics see its answers and the labels."""

from dataclasses import replace
from typing import Any, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from torch import Tensor, nn

from components.contract import Arrays, DataSource, Model, ModelMetadata, Predictor, TensorSpec
from components.data.encoding import Categorical, Encoding, Features
from components.errors import ContractError, DataError
from components.evaluate import score_rows
from components.pipeline import Pipeline, QualityGate, Scored
from components.train.config import TrainConfig

ENCODING = Encoding(categorical=(Categorical(column="word", vocabulary=("a", "b")),))
ROWS = pa.table({"label": pa.array([1, 0, 1], pa.int8()), "word": ["b", "a", "?"]})


@final
class Echo(Predictor):
    """Answers with the code that it was given."""

    @property
    def metadata(self) -> ModelMetadata:
        return ModelMetadata(
            inputs=ENCODING.specs(),
            outputs=(TensorSpec(name="code", dtype="int64", shape=("batch",)),),
            classes=(),
            description="",
        )

    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        assert list(inputs) == ["categorical"]
        return {"code": inputs["categorical"][:, 0]}


class Nothing(Model):
    def forward(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def get_model_metadata(self) -> ModelMetadata:
        raise NotImplementedError


def no_source(at: Any) -> DataSource:
    raise NotImplementedError


@pytest.fixture
def seen() -> list[Scored]:
    return []


@pytest.fixture
def pipeline(seen: list[Scored]) -> Pipeline:
    def metrics(scored: Scored) -> dict[str, float]:
        seen.append(scored)
        return {"mean": float(np.mean(scored.outputs["code"] * 10 + scored.labels))}

    return Pipeline(
        name="echo",
        description="",
        source=no_source,
        features=Features(label="label", classes=2, categorical=("word",)),
        model=Nothing,
        loss=nn.functional.cross_entropy,
        config=TrainConfig(),
        metrics=metrics,
        gates=(QualityGate(metric="mean", minimum=0),),
        metric="mean",
        margin=0.0,
        dated=False,
    )


def test_metrics_see_rows_labels_and_answers_side_by_side(
    pipeline: Pipeline, seen: list[Scored]
) -> None:
    assert score_rows(pipeline, Echo(), ENCODING, ROWS) == {"mean": (21 + 10 + 1) / 3}
    (scored,) = seen
    assert scored.rows is ROWS
    assert scored.labels.tolist() == [1, 0, 1]
    assert scored.outputs["code"].tolist() == [2, 1, 0]


def test_a_missing_column_is_named(pipeline: Pipeline) -> None:
    with pytest.raises(DataError, match="column 'word' must be present"):
        score_rows(pipeline, Echo(), ENCODING, ROWS.drop_columns(["word"]))


def test_a_label_outside_its_range_is_refused(pipeline: Pipeline) -> None:
    rows = ROWS.set_column(0, "label", [pa.array([0, 1, 2], pa.int8())])
    with pytest.raises(DataError, match=r"must lie in 0\.\.1"):
        score_rows(pipeline, Echo(), ENCODING, rows)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"mean": "high"}, "could not convert"), (0.5, "AttributeError"), (None, "AttributeError")],
)
def test_metrics_must_be_numbers_by_name(pipeline: Pipeline, given: Any, words: str) -> None:
    odd = replace(pipeline, metrics=lambda scored: given)
    with pytest.raises(ContractError, match=words) as caught:
        score_rows(odd, Echo(), ENCODING, ROWS)
    assert "numbers by name for 3 held-out rows with the outputs code" in str(caught.value)


def test_numbers_of_any_library_are_numbers(pipeline: Pipeline) -> None:
    narrow = replace(pipeline, metrics=lambda scored: {"mean": np.float32(0.5)})  # type: ignore[dict-item]
    (value,) = score_rows(narrow, Echo(), ENCODING, ROWS).values()
    assert type(value) is float and value == 0.5
