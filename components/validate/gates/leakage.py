"""Leakage alarms: a feature that knows the label, and held-out rows that training has seen.

One pass over the training rows, chunk by chunk; what is kept is bounded by the held-out rows and by
the sample.
"""

from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.data.chunks import CHUNK_ROWS
from components.data.snapshot import Snapshot
from components.pipeline import LeakageAlarms, Pipeline
from components.validate.gates.report import Frozen
from components.validate.gates.row_hashes import Hashes, hash_rows
from components.validate.gates.single_features import UNSCORABLE, score_features

SAMPLE_ROWS = 20_000
"""Training rows, at most, on which single features are tried."""
CLASS_ROWS = 200
"""Rows of each class in the sample, about, where training has so many."""
_NAMED = 5
_LAST = (1 << 32) - 1
_BY_CHANCE = ", or raise LeakageAlarms.duplicate_share if different things may look the same"


class FeatureScore(Frozen):
    """ROC-AUC of a column alone, by its best feature; None where there is none, for a reason."""

    column: str
    feature: str
    roc_auc: float | None
    allowed: str = ""
    note: str = ""


class Overlap(Frozen):
    """Held-out rows whose ``columns`` also stand in a training row; the first numbers from 0."""

    columns: tuple[str, ...]
    rows: int
    share: float
    allowed_share: float
    first: tuple[int, ...]


class LeakageReport(Frozen):
    """Outcome of ``check_leakage``; ``keys`` is None where the rows have no key."""

    passed: bool
    alarm: float
    sample_rows: int
    features: tuple[FeatureScore, ...]
    duplicates: Overlap
    keys: Overlap | None
    failures: tuple[str, ...]


def check_leakage(pipeline: Pipeline, snapshot: Snapshot, key: Sequence[str] = ()) -> LeakageReport:
    """Look for features that know the label, and for training rows among those held out.

    Args:
        pipeline: Gives features and alarms.
        snapshot: The rows of both splits.
        key: Columns that together tell rows apart.

    Raises:
        DataError: The stored rows are damaged.
    """
    features, alarms = pipeline.features, pipeline.leakage
    columns = features.columns
    needed = list(dict.fromkeys([*columns, *key]))
    seen = _Seen(snapshot, columns)
    keys = _Seen(snapshot, tuple(key)) if key else None
    sample = _Sample(snapshot, features.label)
    for number in range(snapshot.chunks("train")):
        chunk = snapshot.chunk("train", number, needed)
        for one in filter(None, (seen, keys)):
            one.add(chunk)
        sample.add(number, chunk)
    rows = sample.finish()
    scores, skipped = score_features(rows, features)
    found = [
        FeatureScore(
            column=column,
            feature=scores[column][0] if column in scores else column,
            roc_auc=scores[column][1] if column in scores else None,
            allowed=alarms.allowed.get(column, ""),
            note=skipped.get(column, ""),
        )
        for column in columns[:-1]
    ]
    duplicates = seen.overlap(alarms.duplicate_share)
    overlap = keys.overlap(0.0) if keys is not None else None
    failures = [
        *_known_labels(found, alarms, rows.num_rows),
        *_repeated(duplicates, "features and label", _BY_CHANCE),
        *(_repeated(overlap, f"key ({', '.join(key)})", "") if overlap is not None else ()),
    ]
    return LeakageReport(
        passed=not failures,
        alarm=alarms.single_feature_auc,
        sample_rows=rows.num_rows,
        features=tuple(found),
        duplicates=duplicates,
        keys=overlap,
        failures=tuple(failures),
    )


def _known_labels(found: Sequence[FeatureScore], alarms: LeakageAlarms, rows: int) -> list[str]:
    unscored = [one for one in found if one.note == UNSCORABLE and not one.allowed]
    if unscored:  # for a reason that lies in the labels, and so all of them
        named = ", ".join(one.feature for one in unscored[:_NAMED])
        return [
            f"no feature may predict the label alone; {named} cannot be looked at: of {rows:,} "
            f"training rows {UNSCORABLE}. Give more rows of the rare classes, or allow the "
            "features in LeakageAlarms with a reason."
        ]
    return [
        f"no feature may predict the label alone; {one.feature!r} does, with ROC-AUC "
        f"{one.roc_auc:.4f} (allowed below {alarms.single_feature_auc}) by a shallow tree fitted "
        f"on one half of {rows:,} training rows and scored on the other. Take it from the features "
        "if it is known only after the label, or allow it in LeakageAlarms with a reason."
        for one in found
        if one.roc_auc is not None and one.roc_auc >= alarms.single_feature_auc and not one.allowed
    ]


def _repeated(overlap: Overlap, what: str, hint: str) -> list[str]:
    if overlap.share <= overlap.allowed_share:
        return []
    first = ", ".join(map(str, overlap.first))
    rest = overlap.rows - len(overlap.first)
    more = f" and {rest:,} more" if rest else ""
    allowed = f"at most {overlap.allowed_share:.2%}" if overlap.allowed_share else "none"
    return [
        f"held-out rows must not stand in training; {overlap.rows:,} ({overlap.share:.2%}, allowed "
        f"{allowed}) have the {what} of a training row, the first with the numbers {first}{more}. "
        f"Split the rows so that each stands on one side{hint}."
    ]


@final
class _Seen:
    """Which held-out rows have been seen in training, by the hash of some columns."""

    def __init__(self, snapshot: Snapshot, columns: tuple[str, ...]) -> None:
        self._columns = columns
        held = [
            hash_rows(snapshot.chunk("holdout", number, columns), columns)
            for number in range(snapshot.chunks("holdout"))
        ]
        self._hashes: Hashes = np.concatenate(held)
        self._sorted = np.unique(self._hashes)
        self._found = np.zeros(len(self._sorted), dtype=bool)

    def add(self, chunk: pa.Table) -> None:
        """Take in training rows."""
        hashes = hash_rows(chunk, self._columns)
        places = np.searchsorted(self._sorted, hashes)
        places[places == len(self._sorted)] = 0
        self._found[places[self._sorted[places] == hashes]] = True

    def overlap(self, allowed_share: float) -> Overlap:
        """What was found."""
        known = self._sorted[self._found]
        numbers = np.flatnonzero(np.isin(self._hashes, known))
        return Overlap(
            columns=self._columns,
            rows=len(numbers),
            share=len(numbers) / len(self._hashes),
            allowed_share=allowed_share,
            first=tuple(int(number) for number in numbers[:_NAMED]),
        )


@final
class _Sample:
    """At most ``SAMPLE_ROWS`` rows, drawn without replacement, the same share of every chunk.

    Of a rare class more are taken, as far as there are any: ROC-AUC does not see how many rows the
    classes have, but without rows there is none.
    """

    def __init__(self, snapshot: Snapshot, label: str) -> None:
        self._share = min(1.0, SAMPLE_ROWS / snapshot.rows["train"])
        self._least = -(-CLASS_ROWS // snapshot.chunks("train"))
        self._label = label
        self._parts: list[pa.Table] = []

    def add(self, number: int, chunk: pa.Table) -> None:
        """Take in the next chunk of training rows."""
        assert chunk.num_rows <= CHUNK_ROWS
        order = self._generator(number).permutation(chunk.num_rows)
        chosen = np.arange(chunk.num_rows) < np.ceil(self._share * chunk.num_rows)
        labels = chunk.column(self._label).to_numpy()[order]
        for label in np.unique(labels):
            chosen[np.flatnonzero(labels == label)[: self._least]] = True
        self._parts.append(chunk.take(np.sort(order[chosen])))

    def finish(self) -> pa.Table:
        """The sample, in random order."""
        rows = pa.concat_tables(self._parts)
        order: npt.NDArray[np.int64] = self._generator(_LAST).permutation(rows.num_rows)
        return rows.take(order[:SAMPLE_ROWS])

    def _generator(self, number: int) -> np.random.Generator:
        """The same at every run."""
        return np.random.default_rng([0x1EAC, number])
