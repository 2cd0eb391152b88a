"""Inputs that no golden file holds: missing, extreme, none at all, and wrong.

Each check gives the faults that it found. What a session refuses by an exception is refused
cleanly; a crash ends the process, which the parent sees.
"""

from collections.abc import Iterator

import numpy as np

from .golden import Array, Named, count_bad
from .session import Subject

EXTREME_TEXTS = ("x" * 10_000, "Ünbekannt 漢字 \N{GRINNING FACE}\N{COMBINING ACUTE ACCENT}\t\n")
EXTREME_NUMBERS = (1e30, -1e30)


def missing_faults(subject: Subject) -> list[str]:
    """Every input that may be missing is, alone and with all others; answers must be finite."""
    sample = subject.sample()
    gone = {
        name: _missing(sample[name], subject.golden.inputs[name])
        for name in subject.golden.inputs
        if subject.may_miss(name)
    }
    cases = [({name: array}, f"{name!r} missing") for name, array in gone.items()]
    if len(gone) > 1:
        cases.append((gone, "everything missing"))
    return _together(
        fault for changes, what in cases if (fault := _fault(subject, sample | changes, what))
    )


def extreme_faults(subject: Subject) -> list[str]:
    """Every number and text at its extremes: a column's answers are finite or it is refused.

    A float tensor inside a network may overflow, in PyTorch as here; it must only not crash.
    """
    return _together(_extreme_faults(subject, subject.sample(), subject.columns()))


def empty_faults(subject: Subject) -> list[str]:
    """A batch without rows gives none, or is refused."""
    try:
        answers = subject.run({name: array[:0] for name, array in subject.sample().items()})
    except Exception:
        return []
    return [
        f"{name!r} must have 0 rows for 0 rows; got shape {array.shape}. Find what in predict does "
        "not follow the batch size"
        for name, array in answers.items()
        if array.shape[:1] != (0,)
    ]


def refusal_faults(subject: Subject) -> list[str]:
    """An input of another dtype, under another name, or left out must be refused."""
    sample = subject.sample()
    accepted = [what for what, feed in _wrong_feeds(sample) if not _refuses(subject, feed)]
    if not accepted:
        return []
    return [
        f"the session must refuse wrong inputs; it answered with {', '.join(accepted[:5])}"
        f"{' and others' if len(accepted) > 5 else ''}. Declare every input with its type"
    ]


def _missing(sample: Array, recorded: Array) -> Array:
    """The sample with nothing in it, at those places (axes after the first) that may be missing."""
    if sample.dtype == object:
        return np.full(sample.shape, "", dtype=object)
    places = np.isnan(recorded).any(axis=0) if sample.ndim > 1 else np.array(True)
    return np.where(places, np.array(np.nan, sample.dtype), sample)


def _extreme_faults(subject: Subject, sample: Named, columns: list[str]) -> Iterator[str]:
    for name, array in sample.items():
        for value in _extremes(array, name in columns):
            feed = sample | {name: np.full(array.shape, value, dtype=array.dtype)}
            try:
                fault = _fault(subject, feed, f"{name!r} at {_shown(value)}")
            except Exception:  # refused, which is as good as answered
                fault = None
            if fault and name in columns:
                yield fault


def _extremes(array: Array, is_column: bool) -> tuple[object, ...]:
    if array.dtype == object:
        return EXTREME_TEXTS
    if array.dtype.kind == "f":
        return EXTREME_NUMBERS
    if array.dtype.kind == "i" and is_column:
        limits = np.iinfo(array.dtype)
        return (limits.min, limits.max)
    return ()


def _shown(value: object) -> str:
    return f"{value[:10]!r}... of {len(value)} characters" if isinstance(value, str) else str(value)


def _fault(subject: Subject, feed: Named, what: str) -> str | None:
    answers = subject.run(feed)
    bad = [repr(name) for name, array in answers.items() if count_bad(array)]
    return f"{', '.join(bad)} with {what}" if bad else None


def _together(faults: Iterator[str]) -> list[str]:
    """One failure for all inputs with the same trouble."""
    found = list(faults)
    if not found:
        return []
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return [
        f"answers must be finite; NaN or infinite are {'; '.join(found[:5])}{more}. Impute and "
        "clamp inside the model"
    ]


def _wrong_feeds(sample: Named) -> Iterator[tuple[str, Named]]:
    for name, array in sample.items():
        others = {key: value for key, value in sample.items() if key != name}
        dtype = np.float64 if array.dtype == np.float32 else np.float32
        yield f"{name!r} as {np.dtype(dtype)}", others | {name: np.zeros(array.shape, dtype)}
        yield f"{name!r} under another name", others | {f"{name}_": array}
        yield f"{name!r} left out", others


def _refuses(subject: Subject, feed: Named) -> bool:
    try:
        subject.run(feed)
    except Exception:
        return True
    return False
