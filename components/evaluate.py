"""Scoring held-out rows with a predictor, whatever engine it runs on."""

from typing import Protocol

import pyarrow as pa

from components.contract import Arrays, Predictor
from components.data.encoding import read_labels
from components.errors import ContractError
from components.pipeline import Pipeline, Scored


class RowEncoder(Protocol):
    """What turns rows into the named inputs of a predictor."""

    def encode(self, rows: pa.RecordBatch | pa.Table) -> Arrays:
        """Inputs by name, one row each."""


def answer_rows(
    pipeline: Pipeline, predictor: Predictor, encoding: RowEncoder, rows: pa.Table
) -> Scored:
    """A predictor's outputs on rows, encoded as that predictor was trained, with their labels.

    Raises:
        DataError: A column that the encoding needs is missing, or a label is outside its range.
        ContractError: The predictor refuses the encoded rows.
    """
    outputs = predictor.predict(encoding.encode(rows))
    return Scored(rows=rows, labels=read_labels(rows, pipeline.features), outputs=outputs)


def measure(pipeline: Pipeline, scored: Scored) -> dict[str, float]:
    """The pipeline's metrics of scored rows.

    Raises:
        ContractError: ``metrics`` raised, or gave something else than numbers by name.
    """
    try:
        found = pipeline.metrics(scored)
        return {str(name): float(value) for name, value in found.items()}
    except Exception as error:
        raise ContractError(
            f"metrics of pipeline {pipeline.name!r} must give numbers by name for "
            f"{len(scored.labels):,} held-out rows with the outputs {', '.join(scored.outputs)}; "
            f"got {type(error).__name__}: {error}. Mend metrics, or the model's outputs."
        ) from error


def score_rows(
    pipeline: Pipeline, predictor: Predictor, encoding: RowEncoder, rows: pa.Table
) -> dict[str, float]:
    """Measures what :func:`answer_rows` gives; both raise the same errors."""
    return measure(pipeline, answer_rows(pipeline, predictor, encoding, rows))
