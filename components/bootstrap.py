"""How sure a difference of two models is: the paired bootstrap on the rows that both answered.

Rows are drawn with replacement, the same for both models, and the metric of each is taken on them;
the interval holds the middle part of the differences found (the percentile interval of Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 16).
"""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from components.errors import ContractError
from components.pipeline import Floats, Pipeline, Resampled, Scored

LEVEL = 0.95
RESAMPLES = 1000
SLOW_RESAMPLES = 200
"""Where ``Pipeline.resampled`` is not given and every resample costs a call of ``metrics``."""
_SEED = 20_130_101
_AGREEMENT = 1e-9


class Interval(BaseModel):
    """A confidence interval of (first - second) on the same rows.

    ``low`` and ``high`` are None where fewer than half of the resamples could be scored.
    ``skipped`` counts those that could not: a metric may need both labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    difference: float
    low: float | None
    high: float | None
    level: float
    resamples: int
    skipped: int
    rows: int

    def __str__(self) -> str:
        """Level, ends and number of resamples in words; the rows are left to the sentence."""
        how = f"{self.resamples:,} paired resamples"
        if self.skipped:
            how += f", {self.skipped:,} of them without a score"
        if self.low is None or self.high is None:
            return f"no confidence interval, from {how}"
        ends = f"[{self.low:+.4f}, {self.high:+.4f}]"
        return f"{100 * self.level:.0f} % confidence interval {ends} from {how}"


def compare(
    pipeline: Pipeline, first: tuple[Scored, float], second: tuple[Scored, float]
) -> Interval:
    """The interval of the deciding metric's difference; equal rows and answers, equal interval.

    Args:
        pipeline: Gives the metric, and how it is resampled.
        first: Scored rows, and their deciding metric.
        second: The same rows as another model answered them, and their metric.

    Raises:
        ContractError: ``Pipeline.resampled`` is not the deciding metric.
    """
    rows = len(first[0].labels)
    wanted = SLOW_RESAMPLES if pipeline.resampled is None else RESAMPLES
    metrics = [_resampled(pipeline, scored, value) for scored, value in (first, second)]
    if _alike(first[0], second[0]):  # every difference is zero
        return _interval(first[1] - second[1], np.zeros(wanted), wanted, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of a resample with one label
        pairs = [tuple(metric(counts) for metric in metrics) for counts in _draws(rows, wanted)]
    found = np.array([a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)])
    return _interval(first[1] - second[1], found, wanted, rows)


def estimate(pipeline: Pipeline, scored: Scored, value: float) -> Interval:
    """The interval of the deciding metric itself, as the difference from nothing.

    Args:
        pipeline: Gives the metric, and how it is resampled.
        scored: Rows as a model answered them.
        value: Their deciding metric.

    Raises:
        ContractError: ``Pipeline.resampled`` is not the deciding metric.
    """
    rows, wanted = len(scored.labels), SLOW_RESAMPLES
    metric = _resampled(pipeline, scored, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of a resample with one label
        found = np.array([metric(counts) for counts in _draws(rows, wanted)], dtype=np.float64)
    return _interval(value, found[np.isfinite(found)], wanted, rows)


def _interval(difference: float, found: Floats, wanted: int, rows: int) -> Interval:
    low = high = None
    if 2 * len(found) >= wanted:
        outside = (1 - LEVEL) / 2
        low, high = (float(end) for end in np.quantile(found, [outside, 1 - outside]))
    return Interval(
        difference=difference,
        low=low,
        high=high,
        level=LEVEL,
        resamples=wanted,
        skipped=wanted - len(found),
        rows=rows,
    )


def _alike(first: Scored, second: Scored) -> bool:
    return first.outputs.keys() == second.outputs.keys() and all(
        np.array_equal(output, second.outputs[name]) for name, output in first.outputs.items()
    )


def take_rows(scored: Scored, chosen: npt.NDArray[np.int64]) -> Scored:
    """Some of the rows, in the order of their numbers."""
    return Scored(
        rows=scored.rows.take(chosen),
        labels=scored.labels[chosen],
        outputs={name: output[chosen] for name, output in scored.outputs.items()},
    )


def _draws(rows: int, resamples: int) -> Iterator[npt.NDArray[np.int64]]:
    """How often each row was drawn, for every resample."""
    generator = np.random.default_rng(_SEED)
    for _ in range(resamples):
        yield np.bincount(generator.integers(0, rows, rows), minlength=rows)


def _resampled(pipeline: Pipeline, scored: Scored, value: float) -> Resampled:
    if pipeline.resampled is None:
        return lambda counts: _measured(pipeline, scored, counts)
    try:
        metric = pipeline.resampled(scored)
        whole = float(metric(np.ones(len(scored.labels), dtype=np.int64)))
    except Exception as error:
        raise ContractError(
            f"resampled of pipeline {pipeline.name!r} must take what metrics take, outputs "
            f"{', '.join(scored.outputs)}; it raised {type(error).__name__}: {error}. Mend it, or "
            "leave resampled out."
        ) from error
    if not math.isclose(whole, value, rel_tol=_AGREEMENT, abs_tol=_AGREEMENT):
        raise ContractError(
            f"resampled of pipeline {pipeline.name!r} must give its deciding metric "
            f"{pipeline.metric!r}; with every row drawn once it gives {whole!r} and metrics give "
            f"{value!r}. Mend the one that is wrong, or leave resampled out."
        )
    return metric


def _measured(pipeline: Pipeline, scored: Scored, counts: npt.NDArray[np.int64]) -> float:
    drawn = take_rows(scored, np.repeat(np.arange(len(counts)), counts))
    try:
        return float(pipeline.metrics(drawn).get(pipeline.metric, math.nan))
    except (ValueError, ZeroDivisionError):  # a metric that needs both labels
        return math.nan
