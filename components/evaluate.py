"""Scoring held-out rows with a predictor, whatever engine it runs on."""

import pyarrow as pa

from components.contract import Predictor
from components.data.encoding import Encoding, read_labels
from components.pipeline import Pipeline, Scored


def score_rows(
    pipeline: Pipeline, predictor: Predictor, encoding: Encoding, rows: pa.Table
) -> dict[str, float]:
    """The pipeline's metrics of a predictor on rows, encoded as that predictor was trained.

    Raises:
        DataError: A column that the encoding needs is missing, or a label is outside its range.
        ContractError: The predictor refuses the encoded rows.
    """
    outputs = predictor.predict(encoding.encode(rows))
    labels = read_labels(rows, pipeline.features)
    return pipeline.metrics(Scored(rows=rows, labels=labels, outputs=outputs))
