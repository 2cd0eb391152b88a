"""How well each feature alone predicts the label: nearly perfectly means that it knows it.

On one half of a sample of training rows a shallow decision tree is fitted on the feature alone; its
ROC-AUC is taken on the other half (of several classes one against the rest, averaged). A
categorical feature gives the frequencies of the labels in each of its categories, which is a tree
with a branch per category. After the single-feature leakage checks of data validation tools; a
tree is scikit-learn's.

Legend: B = rows, C = classes.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.data.encoding import Features, read_labels
from components.data.statistics import as_floats
from components.metrics import sorted_roc_auc
from components.pipeline import Floats

ELEMENTS = 256
"""Elements that a tensor column may have to be looked at one by one."""
UNSCORABLE = "no class stands in both halves of the sample with another"
"""Why no feature has a score: the labels do not allow one."""
_LEAVES = 16
_LEAF_ROWS = 5

Labels = npt.NDArray[np.int64]


def score_features(
    rows: pa.Table, features: Features
) -> tuple[dict[str, tuple[str, float]], Mapping[str, str]]:
    """ROC-AUC of every feature alone, and why a feature has none.

    Args:
        rows: A sample of training rows, in random order.
        features: Which columns are read.

    Returns:
        By column, the feature's name (``image[17]`` is an element of a tensor) and its score, that
        of the best element; and by column the reason why it was not looked at.
    """
    labels = read_labels(rows, features)
    scores: dict[str, tuple[str, float]] = {}
    skipped = dict(_too_wide(features))
    half = len(labels) // 2
    for column, name, values in _values(rows, features, half, labels):
        score = _score(values[:half], labels[:half], values[half:], labels[half:], features.classes)
        if score is None:
            skipped[column] = UNSCORABLE
        elif column not in scores or score > scores[column][1]:
            scores[column] = name, score
    return scores, skipped


def _too_wide(features: Features) -> Iterator[tuple[str, str]]:
    for column, shape in features.tensors.items():
        elements = int(np.prod(shape))
        if elements > ELEMENTS:
            yield column, f"it has {elements:,} elements, more than {ELEMENTS}"


def _values(
    rows: pa.Table, features: Features, half: int, labels: Labels
) -> Iterator[tuple[str, str, Floats]]:
    """Column, feature, and what a tree is given of it: (B, 1), or (B, C) of a category."""
    for column in features.categorical:
        codes = _codes(rows.column(column))
        yield column, column, _frequencies(codes, half, labels, features.classes)
    for column in features.numeric:
        yield column, column, _ranks(as_floats(rows.column(column).combine_chunks()))
    for column, shape in features.tensors.items():
        elements = int(np.prod(shape))
        if elements <= ELEMENTS:
            flat = as_floats(rows.column(column).combine_chunks().flatten()).reshape(-1, elements)
            for place in range(elements):
                yield column, f"{column}[{place}]", _ranks(flat[:, place])


def _ranks(values: npt.NDArray[np.float32]) -> Floats:
    """Places in the order of values (B, 1), all that a tree looks at; NaN stays.

    scikit-learn's trees overflow on infinite and very large values.
    """
    places = np.unique(values, return_inverse=True)[1].astype(np.float64)
    return np.asarray(np.where(np.isnan(values), np.nan, places))[:, np.newaxis]


def _codes(column: pa.ChunkedArray) -> Labels:
    coded = pc.dictionary_encode(column.combine_chunks().cast(pa.string()), null_encoding="encode")
    codes: Labels = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes


def _frequencies(codes: Labels, half: int, labels: Labels, classes: int) -> Floats:
    """Label frequencies of each row's category in the first half; where it is new, of all rows."""
    table = np.zeros((int(codes.max()) + 1, classes))
    np.add.at(table, (codes[:half], labels[:half]), 1.0)
    seen = table.sum(axis=1, keepdims=True)
    overall = table.sum(axis=0) / max(1.0, table.sum())
    shares = np.where(seen > 0, table / np.maximum(seen, 1.0), overall)
    return np.asarray(shares[codes])


def _score(
    fit_values: Floats, fit_labels: Labels, values: Floats, labels: Labels, classes: int
) -> float | None:
    from sklearn.tree import DecisionTreeClassifier

    asked = range(classes) if classes > 2 else (1,)  # of two classes, one says all
    known = [c for c in asked if 0 < (labels == c).sum() < len(labels)]
    known = [c for c in known if (fit_labels == c).any()]
    if len(np.unique(fit_labels)) < 2 or not known:
        return None
    if values.shape[1] > 1:
        chances = values
    else:
        tree = DecisionTreeClassifier(
            max_leaf_nodes=max(_LEAVES, 2 * classes), min_samples_leaf=_LEAF_ROWS, random_state=0
        )
        tree.fit(fit_values, fit_labels)
        chances = np.zeros((len(labels), classes))
        chances[:, tree.classes_] = tree.predict_proba(values)
    every = np.ones(len(labels), dtype=np.int64)
    return float(np.mean([sorted_roc_auc(labels == c, chances[:, c])(every) for c in known]))
