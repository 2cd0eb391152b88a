"""Slice gates: a metric on the held-out rows of each value of a column."""

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.bootstrap import take_rows
from components.pipeline import Pipeline, Scored, SliceGate
from components.validate.gates.report import Slice, SliceResult, bound, in_words

MOST_VALUES = 1000
"""Distinct values that a column may have to be sliced by."""
MISSING = "(missing)"
_NAMED = 8

Numbers = npt.NDArray[np.int64]


class _UnusableError(Exception):
    """The column cannot be sliced by."""


def check_slices(pipeline: Pipeline, gate: SliceGate, scored: Scored) -> SliceResult:
    """Hold a slice gate against every value of its column; every failing slice is named.

    A slice with fewer rows than the gate asks for, or with one label only, is listed and not
    judged; of the label's own column every slice has one label, and is judged. A gate that judges
    no slice fails, as does one whose metric cannot be measured on a slice that it judges.
    """
    try:
        found = list(_slices(pipeline, gate, scored))
    except _UnusableError as error:
        return _refused(gate, str(error))
    except Exception as error:  # noqa: BLE001  the pipeline's own code may raise anything
        return _refused(gate, f"{type(error).__name__}: {error}")
    failing = [one for one in found if one.passed is False]
    rule = f"{gate.metric} must {in_words(gate)} for every value of {gate.column!r}"
    failures = tuple(
        f"{rule}; {one.value!r} ({one.rows:,} rows) {_got(gate, one)}, which fails."
        for one in failing
    )
    if all(one.passed is None for one in found):
        return _refused(gate, f"none of its values could be judged: {_idle(found)}", found)
    return SliceResult(
        metric=gate.metric,
        column=gate.column,
        minimum=bound(gate.minimum),
        maximum=bound(gate.maximum),
        min_rows=gate.min_rows,
        slices=tuple(found),
        passed=not failing,
        failures=failures,
        sentence=" ".join(failures) or f"{rule}; {_summary(gate, found)}.",
    )


def _slices(pipeline: Pipeline, gate: SliceGate, scored: Scored) -> Iterator[Slice]:
    label = gate.column == pipeline.features.label
    measure = _measure(pipeline, gate, scored)
    for value, chosen in slice_rows(scored.rows, gate.column).items():
        rows = len(chosen)
        note = ""
        if rows < gate.min_rows:
            note = f"fewer than {gate.min_rows:,} rows"
        elif not label and len(np.unique(scored.labels[chosen])) < 2:
            note = "one label only"
        if note:
            yield Slice(value=value, rows=rows, score=None, passed=None, note=note)
            continue
        score, note = measure(chosen)
        passed = score is not None and gate.minimum <= score <= gate.maximum
        yield Slice(value=value, rows=rows, score=score, passed=passed, note=note)


def slice_rows(rows: pa.Table, column: str) -> dict[str, Numbers]:
    """Row numbers of each value of a column, values sorted, missing ones last."""
    if column not in rows.column_names:
        raise _UnusableError(f"there is no such column, only {', '.join(rows.column_names)}")
    values = rows.column(column).combine_chunks()
    kind = values.type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (any(test(plain) for test in tests) or pa.types.is_boolean(plain)):
        raise _UnusableError(
            f"it holds {kind}, and neither strings, whole numbers nor truth values"
        )
    # Encoded anew: a dictionary may hold a value twice, unused ones, and missing ones.
    coded = pc.dictionary_encode(values.cast(plain))
    if len(coded.dictionary) > MOST_VALUES:
        raise _UnusableError(f"it has more than {MOST_VALUES:,} distinct values")
    known = coded.dictionary.to_pylist()
    codes = coded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False).astype(np.int64)
    order = np.argsort(codes, kind="stable")
    pieces = np.split(order, np.searchsorted(codes[order], np.arange(1, len(known) + 1)))
    named = {
        known[place]: pieces[place] for place in sorted(range(len(known)), key=known.__getitem__)
    }
    found = {str(value): chosen for value, chosen in named.items() if len(chosen)}
    if len(pieces[-1]):
        found[MISSING] = np.sort(np.r_[found.pop(MISSING, pieces[-1][:0]), pieces[-1]])
    return found


def _measure(
    pipeline: Pipeline, gate: SliceGate, scored: Scored
) -> Callable[[Numbers], tuple[float | None, str]]:
    """A function from row numbers to the metric, or to None and why there is none."""
    fast = None
    if gate.metric == pipeline.metric and pipeline.resampled is not None:
        fast = pipeline.resampled(scored)

    def measure(chosen: Numbers) -> tuple[float | None, str]:
        try:
            if fast is not None:
                score = float(fast(np.bincount(chosen, minlength=len(scored.labels))))
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # scikit-learn warns where it gives NaN
                    metrics = pipeline.metrics(take_rows(scored, chosen))
                if gate.metric not in metrics:
                    return None, f"it was not measured, only {', '.join(metrics) or 'nothing'}"
                score = float(metrics[gate.metric])
        except Exception as error:  # noqa: BLE001  the pipeline's own code may raise anything
            return None, f"{type(error).__name__}: {error}"
        return (score, "") if math.isfinite(score) else (None, f"it is {score}")

    return measure


def _got(gate: SliceGate, one: Slice) -> str:
    return f"cannot be judged: {one.note}" if one.score is None else f"has {one.score!r}"


def _summary(gate: SliceGate, found: list[Slice]) -> str:
    judged = [one for one in found if one.score is not None]
    low = gate.minimum > float("-inf")
    worst = (min if low else max)(judged, key=lambda one: one.score or 0.0)
    said = (
        f"{len(judged)} of {len(found)} keep it, the {'lowest' if low else 'highest'} is "
        f"{worst.value!r} ({worst.rows:,} rows) with {worst.score!r}"
    )
    return f"{said}. Not judged: {_idle(found)}" if len(judged) < len(found) else said


def _idle(found: list[Slice]) -> str:
    idle = [one for one in found if one.passed is None]
    named = [f"{one.value!r} ({one.rows:,} rows, {one.note})" for one in idle[:_NAMED]]
    more = [f"and {len(idle) - _NAMED:,} more"] if len(idle) > _NAMED else []
    return ", ".join([*named, *more]) or "there are none"


def _refused(gate: SliceGate, why: str, found: list[Slice] | None = None) -> SliceResult:
    rule = f"{gate.metric} must {in_words(gate)} for every value of {gate.column!r}"
    sentence = f"{rule}; the gate cannot be evaluated: {why}. Mend the gate or take it away."
    return SliceResult(
        metric=gate.metric,
        column=gate.column,
        minimum=bound(gate.minimum),
        maximum=bound(gate.maximum),
        min_rows=gate.min_rows,
        slices=tuple(found or ()),
        passed=False,
        failures=(sentence,),
        sentence=sentence,
    )
