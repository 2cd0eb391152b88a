"""How sure the metrics of the held-out rows are: 95 % confidence intervals for the model card.

The deciding metric has the percentile interval of the bootstrap, and so have the others where the
rows are few. Where they are many, every resample would cost a long call of ``metrics``: then the
interval is from the spread of the metric over ten random parts of the rows, t times its standard
error (batch means; Asmussen and Glynn, Stochastic Simulation, 2007, chapter IV.5), which takes the
error to shrink with the root of the rows.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from components.bootstrap import LEVEL, SLOW_RESAMPLES, estimate, take_rows
from components.pipeline import Floats, Pipeline, Scored

Rows = npt.NDArray[np.int64]
PARTS = 10
FEW_ROWS = 1000
_T_975 = 2.262157  # Student's t with PARTS - 1 degrees of freedom
_SEED = 20_130_101


def metric_intervals(
    pipeline: Pipeline, scored: Scored, metrics: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Ends of the interval by metric; a metric of a slice, or that a part has not, has none.

    Args:
        pipeline: Gives the metrics.
        scored: The held-out rows with the model's answers.
        metrics: Of all these rows.
    """
    rows = len(scored.labels)
    generator = np.random.default_rng(_SEED)
    few = rows <= FEW_ROWS
    if few:
        parts = [generator.integers(0, rows, rows) for _ in range(SLOW_RESAMPLES)]
    else:
        parts = np.array_split(generator.permutation(rows), PARTS)
    values = _measured(pipeline, scored, [name for name in metrics if "/" not in name], parts)
    found = {
        name: _middle(drawn) if few else _around(metrics[name], drawn)
        for name, drawn in values.items()
        if math.isfinite(metrics[name])
    }
    if pipeline.resampled is not None and math.isfinite(metrics.get(pipeline.metric, math.nan)):
        interval = estimate(pipeline, scored, metrics[pipeline.metric])
        if interval.low is not None and interval.high is not None:
            found[pipeline.metric] = (interval.low, interval.high)
    return found


def _measured(
    pipeline: Pipeline, scored: Scored, names: Sequence[str], parts: Iterable[Rows]
) -> dict[str, Floats]:
    """Values by metric, of those metrics that every part has."""
    answers: list[Mapping[str, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of a part with one label
        for chosen in parts:
            try:
                answers.append(pipeline.metrics(take_rows(scored, chosen)))
            except Exception:  # noqa: BLE001  the pipeline's own code, on other rows than ever
                return {}
    table = {name: np.array([one.get(name, math.nan) for one in answers]) for name in names}
    return {name: values for name, values in table.items() if np.isfinite(values).all()}


def _middle(values: Floats) -> tuple[float, float]:
    outside = (1 - LEVEL) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def _around(value: float, values: Floats) -> tuple[float, float]:
    half = _T_975 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return value - half, value + half
