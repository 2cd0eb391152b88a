"""What the data of a run looks like: one JSON and one picture, stored with the run."""

import io
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from components.data.snapshot import Snapshot
from components.data.snapshot_files import SPLITS
from components.data.statistics import BINS, ColumnStatistics, Numbers, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOP_VALUES = 10
"""Values per column in the JSON, the most frequent first."""
_DRAWN_VALUES = 6
_ACROSS = 5
_COLOURS = {"train": "tab:blue", "holdout": "tab:orange"}


def profile_json(snapshot: Snapshot) -> str:
    """Counts, moments, quantiles and most frequent values of every column and split."""
    splits = {
        split: {
            "rows": statistics.rows,
            "columns": {name: _describe(column) for name, column in statistics.columns.items()},
        }
        for split, statistics in _by_split(snapshot).items()
    }
    return json.dumps({"fingerprint": snapshot.fingerprint, "splits": splits}, indent=1)


def draw_profile(snapshot: Snapshot) -> bytes:
    """A PNG with a small picture per column: both splits side by side, and what is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = snapshot.schema.names
    across = min(_ACROSS, len(names))
    down = math.ceil(len(names) / across)
    wide, high = 3.1 * across, 2.2 * down + 0.5
    figure = Figure(figsize=(wide, high), dpi=80, facecolor="white")
    FigureCanvasAgg(figure)
    # Laid out by hand: matplotlib's own way takes seconds for so many axes.
    figure.subplots_adjust(
        left=1.05 / wide,
        right=1 - 0.15 / wide,
        bottom=0.35 / high,
        top=1 - 1.0 / high,
        wspace=0.6,
        hspace=0.62,
    )
    grid = figure.subplots(down, across, squeeze=False)
    for place, name in enumerate(names):
        _draw(grid[place // across][place % across], name, _by_split(snapshot))
    for place in range(len(names), down * across):
        grid[place // across][place % across].set_axis_off()
    figure.legend(
        handles=[
            Patch(color=_COLOURS[split], alpha=0.6, label=f"{split}: {snapshot.rows[split]:,} rows")
            for split in SPLITS
        ],
        loc="upper left",
        ncols=len(SPLITS),
        frameon=False,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _by_split(snapshot: Snapshot) -> dict[str, Statistics]:
    return {"train": snapshot.statistics, "holdout": snapshot.holdout_statistics}


def _describe(column: ColumnStatistics) -> dict[str, Any]:
    described = column.model_dump(exclude={"values"}, exclude_none=True)
    if column.values is not None and not column.overflown:
        described["distinct"] = len(column.values)
        described["top"] = [[value, count] for value, count in _top(column, TOP_VALUES)]
    return described


def _top(column: ColumnStatistics, most: int) -> list[tuple[str, int]]:
    return sorted((column.values or {}).items(), key=lambda item: (-item[1], item[0]))[:most]


def _draw(axes: "Axes", name: str, statistics: dict[str, Statistics]) -> None:
    columns = {split: found.columns[name] for split, found in statistics.items()}
    train = columns["train"]
    if train.values and train.kind.startswith("date"):
        _draw_dates(axes, columns)
    elif train.values and (train.non_finite is None or len(train.values) <= _DRAWN_VALUES):
        _draw_values(axes, columns)
    elif train.numbers is not None:
        for split, column in columns.items():
            if column.numbers is not None:
                _draw_numbers(axes, column.numbers, _COLOURS[split])
        axes.set_yticks([])
    else:
        text = "too many distinct values" if train.overflown else train.kind
        axes.text(0.5, 0.5, text, ha="center", va="center", color="grey", fontsize=8, wrap=True)
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold", pad=16)
    axes.text(0, 1.04, _below_title(columns), transform=axes.transAxes, fontsize=8, color="dimgrey")
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_numbers(axes: "Axes", numbers: Numbers, colour: str) -> None:
    """Shares of bins of equal width, as densities, so that both splits can be compared."""
    width = (numbers.maximum - numbers.minimum) / BINS or 1.0
    edges = [numbers.minimum + place * width for place in range(BINS + 1)]
    _draw_bins(axes, [share / width for share in numbers.histogram], edges, colour)
    axes.axvline(numbers.mean, color=colour, linestyle=":", linewidth=1)


def _draw_bins(axes: "Axes", heights: Any, edges: Any, colour: str) -> None:
    axes.stairs(heights, edges, fill=True, color=colour, alpha=0.35)
    axes.stairs(heights, edges, color=colour, linewidth=1)


def _draw_dates(axes: "Axes", columns: dict[str, ColumnStatistics]) -> None:
    """How many rows fall on which days."""
    every = sorted({day for column in columns.values() for day in column.values or {}})
    days = np.array([every[0], every[-1]], "datetime64[D]").astype(int)
    for split, column in columns.items():
        own = np.array(list(column.values or {}), "datetime64[D]").astype(int)
        counts = list((column.values or {}).values())
        heights, edges = np.histogram(own, BINS, (days[0], days[1] + 1), weights=counts)
        _draw_bins(axes, heights, edges, _COLOURS[split])
    axes.set_xticks(days, [every[0], every[-1]])
    axes.set_yticks([])


def _draw_values(axes: "Axes", columns: dict[str, ColumnStatistics]) -> None:
    """Shares of the most frequent values of training."""
    top = [value for value, _ in _top(columns["train"], _DRAWN_VALUES)]
    places = range(len(top))
    for split, shift in (("train", -0.2), ("holdout", 0.2)):
        column = columns[split]
        shares = [(column.values or {}).get(value, 0) / max(column.count, 1) for value in top]
        axes.barh([p + shift for p in places], shares, 0.4, color=_COLOURS[split], alpha=0.6)
    labels = [value if len(value) <= 14 else value[:13] + "…" for value in top]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.locator_params(axis="x", nbins=4)


def _below_title(columns: dict[str, ColumnStatistics]) -> str:
    """Shares of values that are missing or not finite, and how many values are not drawn."""
    notes = []
    shares = [
        (column.missing + (column.non_finite or 0)) / max(column.count + column.missing, 1)
        for column in columns.values()
    ]
    if any(shares):
        notes.append("missing " + " / ".join(f"{share:.1%}" for share in shares))
    train = columns["train"]
    if train.non_finite is None and not train.kind.startswith("date"):
        more = len(train.values or {}) - _DRAWN_VALUES
        notes += [f"{more:,} more values"] if more > 0 else []
    return ", ".join(notes)
