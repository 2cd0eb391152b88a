"""Golden rows, one by one and in batches of every size, must give the recorded answers.

Legend: B = rows of one batch.
"""

import numpy as np
import numpy.typing as npt

from .golden import Array, count_bad
from .job import Job
from .session import Subject


class Answers:
    """Compares a session's answers with the golden ones; ``largest`` is the largest difference."""

    def __init__(self, subject: Subject, job: Job) -> None:
        self.subject = subject
        self.job = job
        self.largest = 0.0

    def batch_faults(self, size: int) -> list[str]:
        """Answer every golden row in batches of one size, tiling the rows to fill the last."""
        for rows_B in self.subject.golden.tiled(size):
            answers = self.subject.run(self.subject.golden.feed(rows_B))
            faults = [self.fault(name, got, rows_B) for name, got in answers.items()]
            if any(faults):
                return [fault for fault in faults if fault]  # one bad batch says enough
        return []

    def fault(self, name: str, got: Array, rows_B: npt.NDArray[np.intp]) -> str | None:
        """Compare one output of one batch: shape and dtype, finiteness, values.

        Text and integers must be equal. A label may in principle flip where two classes tie within
        the engines' rounding; golden rows that lie so close are not worth recording.
        """
        want = self.subject.golden.outputs[name][rows_B]
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            return f"{name!r} must be {want.shape} {want.dtype}; got {got.shape} {got.dtype}"
        if bad := count_bad(got):
            return f"{name!r} must be finite; got {bad} NaN or infinite values"
        if want.dtype.kind != "f":
            wrong = int((got != want).sum())
            return f"{name!r} must equal the recorded values; {wrong} differ" if wrong else None
        want_64 = want.astype(np.float64)
        difference = np.abs(got.astype(np.float64) - want_64)
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        excess = difference - self.job["atol"] - self.job["rtol"] * np.abs(want_64)
        if excess.max(initial=0.0) <= 0:
            return None
        row = rows_B[np.unravel_index(excess.argmax(), excess.shape)[0]]
        return (
            f"{name!r} must equal the recorded values within rtol {self.job['rtol']:g} and atol "
            f"{self.job['atol']:g}; row {row} differs by {difference.flat[excess.argmax()]:.3g}"
        )
