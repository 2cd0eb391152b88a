"""How sure the metrics of the held-out rows are: 95 % confidence intervals for the model card.

The deciding metric has the percentile interval of the bootstrap. The others would cost a call of
``metrics`` for every resample: their interval is from the spread of the metric over ten random
parts of the rows, t times its standard error (batch means; Asmussen and Glynn, Stochastic
Simulation, 2007, chapter IV.5), which takes the error to shrink with the root of the rows.
"""

import math
import warnings
from collections.abc import Mapping

import numpy as np

from components.bootstrap import Interval, estimate, take_rows
from components.pipeline import Pipeline, Scored

PARTS = 10
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
    value = metrics.get(pipeline.metric, math.nan)
    found = _spread(pipeline, scored, metrics)
    if math.isfinite(value):
        interval: Interval = estimate(pipeline, scored, value)
        found.pop(pipeline.metric, None)
        if interval.low is not None and interval.high is not None:
            found[pipeline.metric] = (interval.low, interval.high)
    return found


def _spread(
    pipeline: Pipeline, scored: Scored, metrics: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    rows = len(scored.labels)
    order = np.random.default_rng(_SEED).permutation(rows)
    parts: list[Mapping[str, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of a part with one label
        for chosen in np.array_split(order, PARTS) if rows >= PARTS else []:
            try:
                parts.append(pipeline.metrics(take_rows(scored, chosen)))
            except Exception:  # noqa: BLE001  the pipeline's own code, on fewer rows than ever
                return {}
    found = {}
    for name, value in metrics.items():
        values = np.array([part.get(name, math.nan) for part in parts], dtype=np.float64)
        if "/" not in name and len(values) and np.isfinite([value, *values]).all():
            half = _T_975 * float(values.std(ddof=1)) / math.sqrt(PARTS)
            found[name] = (value - half, value + half)
    return found
