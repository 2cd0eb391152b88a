"""Pictures of the report page, as PNG: gradients, ROC and calibration, slices, loss.

Legend: B = held-out rows, C = classes.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from components.metrics import calibration_bins
from components.pipeline import Floats, Scored
from components.validate.gates.report import Slice, SliceResult
from components.validate.gradients.report import GradientReport, TensorCheck, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TENSORS = 48
MOST_SLICES = 24
_SMALLEST = 1e-18
_LARGEST = 10.0
_POINTS = 400
_COLOURS = {
    Verdict.PASS: "tab:green",
    Verdict.DEGRADED: "tab:olive",
    Verdict.WAIVED: "tab:grey",
    Verdict.UNVERIFIABLE: "tab:orange",
    Verdict.FAIL: "tab:red",
}


class Losses(NamedTuple):
    """Mean loss per row in training and validation, by epoch."""

    train: Mapping[int, float]
    validation: Mapping[int, float]


def draw_gradients(report: GradientReport) -> bytes:
    """Relative error and tolerance of each tensor on a log scale, coloured by verdict.

    Where there are many tensors, those that did not pass and those nearest to their tolerance.
    """
    shown = _worst(report.tensors)
    figure = _figure(8.0, 1.3 + 0.2 * len(shown))
    axes = figure.subplots()
    for place, tensor in enumerate(shown):
        colour = _COLOURS[tensor.verdict]
        if tensor.relative_error is None:
            axes.plot(1.0, place, marker="x", color=colour)  # nothing could be compared
            continue
        shown_error = min(max(tensor.relative_error, _SMALLEST), _LARGEST)
        axes.plot(shown_error, place, marker="o", color=colour)
        if tensor.tolerance is not None:
            axes.plot(tensor.tolerance, place, marker="|", markersize=10, color="black")
    for verdict in dict.fromkeys(tensor.verdict for tensor in shown):
        axes.plot([], [], "o", color=_COLOURS[verdict], label=str(verdict))
    axes.plot([], [], "|", color="black", label="tolerance")
    axes.set_xscale("log")
    axes.set_xlim(_SMALLEST / 3, 30)
    axes.set_yticks(range(len(shown)), [_plain(tensor.name) for tensor in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("relative error; a cross: nothing could be compared")
    axes.legend(loc="lower left", fontsize=7, ncols=3)
    return _png(figure)


def draw_curves(scored: Scored, classes: int) -> bytes | None:
    """ROC curve and calibration curve; None where no output holds the classes' probabilities."""
    chances = class_probabilities(scored, classes)
    if chances is None or not np.isfinite(chances).all():
        return None
    figure = _figure(9.0, 4.2)
    left, right = figure.subplots(1, 2)
    _draw_roc(left, scored.labels, chances)
    if classes == 2:
        _draw_calibration(right, chances[:, 1], scored.labels, "probability of class 1")
    else:
        chosen = chances.argmax(axis=1)
        happened = (chosen == scored.labels).astype(np.int64)
        _draw_calibration(right, chances.max(axis=1), happened, "probability of the top class")
    return _png(figure)


def class_probabilities(scored: Scored, classes: int) -> Floats | None:
    """Probabilities (B, C) from the first output that holds them, or that of class 1 of two."""
    for output in scored.outputs.values():
        if not np.issubdtype(output.dtype, np.floating):
            continue
        if output.shape[1:] == (classes,):
            return output.astype(np.float64)
        if output.ndim == 1 and classes == 2:
            one = output.astype(np.float64)
            return np.stack([1 - one, one], axis=1)
    return None


def draw_slices(results: Sequence[SliceResult]) -> bytes | None:
    """The metric of each slice with its bounds, a panel per gate; None without any slice."""
    drawn = [(result, _shown(result)) for result in results if result.slices]
    if not drawn:
        return None
    heights = [max(2, len(slices)) for _, slices in drawn]
    figure = _figure(8.0, 0.9 * len(drawn) + 0.22 * sum(heights))
    panels = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (result, slices) in zip(panels, drawn, strict=True):
        _draw_slices(axes, result, slices)
    return _png(figure)


def draw_losses(losses: Losses) -> bytes | None:
    """Loss of training and validation by epoch; None where none is known."""
    if not losses.train:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = _figure(6.0, 3.2)
    axes = figure.subplots()
    for name, values in (("training", losses.train), ("validation", losses.validation)):
        steps = sorted(values)
        axes.plot(steps, [values[step] for step in steps], "o-", markersize=3, label=name)
    axes.set(xlabel="epoch", ylabel="mean loss per row")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return _png(figure)


def _worst(tensors: Sequence[TensorCheck]) -> list[TensorCheck]:
    """In the model's order, at most ``MOST_TENSORS`` of them."""

    def badness(tensor: TensorCheck) -> float:
        if tensor.refused:
            return float("inf")
        return (tensor.relative_error or 0.0) / (tensor.tolerance or 1.0)

    order = sorted(range(len(tensors)), key=lambda place: -badness(tensors[place]))
    return [tensors[place] for place in sorted(order[:MOST_TENSORS])]


def _draw_roc(axes: "Axes", labels: npt.NDArray[np.int64], chances: Floats) -> None:
    from sklearn.metrics import roc_curve

    classes = [1] if chances.shape[1] == 2 else list(range(chances.shape[1]))
    for number in classes:
        positive = labels == number
        if 0 < positive.sum() < len(labels):
            false_rate, true_rate, _ = roc_curve(positive, chances[:, number])
            shown = np.unique(np.linspace(0, len(false_rate) - 1, _POINTS).astype(int))
            name = f"class {number}" if len(classes) <= 10 else None
            axes.plot(false_rate[shown], true_rate[shown], linewidth=1.2, label=name)
    axes.plot([0, 1], [0, 1], ":", color="grey")
    one = len(classes) == 1
    axes.set(
        xlabel="false positive rate",
        ylabel="true positive rate",
        title="ROC curve" if one else "ROC curves, one class against the rest",
    )
    if not one and len(classes) <= 10:
        axes.legend(fontsize=7, ncols=2)


def _draw_calibration(
    axes: "Axes", chance: Floats, happened: npt.NDArray[np.int64], what: str
) -> None:
    bins = calibration_bins(chance, happened)
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.plot(bins.predicted, bins.observed, "o-", markersize=4)
    axes.set(xlabel=what, ylabel="share in which it came true", title="Calibration curve")


def _shown(result: SliceResult) -> list[Slice]:
    """Judged slices first, the worst first, then the largest of those not judged."""
    direction = 1 if result.minimum is not None else -1
    judged = sorted(
        (one for one in result.slices if one.passed is not None),
        key=lambda one: direction * (one.score if one.score is not None else float("-inf")),
    )
    idle = sorted((one for one in result.slices if one.passed is None), key=lambda one: -one.rows)
    return [*judged, *idle][:MOST_SLICES]


def _draw_slices(axes: "Axes", result: SliceResult, slices: Sequence[Slice]) -> None:
    for place, one in enumerate(slices):
        if one.score is None:
            axes.text(0, place, f" {_plain(one.note)}", va="center", fontsize=7, color="dimgrey")
        else:
            axes.barh(place, one.score, 0.7, color="tab:blue" if one.passed else "tab:red")
    for limit in (result.minimum, result.maximum):
        if limit is not None:
            axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    labels = [f"{_plain(one.value[:24])} ({one.rows:,})" for one in slices]
    axes.set_yticks(range(len(slices)), labels, fontsize=7)
    axes.set_ylim(len(slices) - 0.4, -0.6)
    more = len(result.slices) - len(slices)
    rest = f", {more} more not shown" if more else ""
    title = _plain(f"{result.metric} by {result.column}{rest}")
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=7)


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: between dollars it would read a formula, or fail."""
    return text.replace("$", r"\$")


def _figure(wide: float, high: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), dpi=80, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: "Figure") -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
