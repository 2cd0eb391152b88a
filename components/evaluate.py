"""Scoring held-out rows with a predictor, whatever engine it runs on."""

import pyarrow as pa

from components.contract import Predictor
from components.data.encoding import Encoding, read_labels
from components.pipeline import Pipeline, Scored


def answer_rows(
    pipeline: Pipeline, predictor: Predictor, encoding: Encoding, rows: pa.Table
) -> Scored:
    """A predictor's outputs on rows, encoded as that predictor was trained, with their labels.

    Raises:
        DataError: A column that the encoding needs is missing, or a label is outside its range.
        ContractError: The predictor refuses the encoded rows.
    """
    outputs = predictor.predict(encoding.encode(rows))
    return Scored(rows=rows, labels=read_labels(rows, pipeline.features), outputs=outputs)


def score_rows(
    pipeline: Pipeline, predictor: Predictor, encoding: Encoding, rows: pa.Table
) -> dict[str, float]:
    """The pipeline's metrics of :func:`answer_rows`, which raises the same errors."""
    return pipeline.metrics(answer_rows(pipeline, predictor, encoding, rows))
