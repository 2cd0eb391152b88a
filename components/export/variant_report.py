"""What smaller forms of a model are like, as a record and as a table."""

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from components.export.config import VariantKind


class Speed(BaseModel):
    """Of one thread: milliseconds of a call with one row, and rows a second by 1024."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50_ms: float
    p99_ms: float
    rows_per_s: float


class VariantReport(BaseModel):
    """What a variant is like beside the main file, and every bound that it breaks.

    ``differences`` are the largest absolute ones from the module in float64, over all held-out
    rows; of an integer output, the share of rows that are answered otherwise, which only the
    metric bounds. ``metric_difference`` is negative where the variant is worse. What could not be
    measured is absent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    kind: VariantKind
    passed: bool
    failures: tuple[str, ...]
    size_bytes: int = 0
    main_size_bytes: int = 0
    rows: int = 0
    tolerance: float
    differences: Mapping[str, float] = {}
    metric: str
    metric_drop: float
    metric_value: float = math.nan
    metric_difference: float = math.nan
    speed: Speed | None = None
    main_speed: Speed | None = None

    @property
    def difference(self) -> float:
        """The largest of the differences."""
        return max(self.differences.values(), default=math.nan)


def variants_markdown(reports: Sequence[VariantReport]) -> str:
    """A table of sizes, differences and speeds, and the reasons of those that are left out."""
    lines = [
        "| variant | kept | size | difference | metric | p50 at 1 row | p99 at 1 row | rows/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for report in reports:
        share = report.size_bytes / report.main_size_bytes
        cells = ["-"] * 3
        if report.speed and report.main_speed:
            ours, main = report.speed, report.main_speed
            pairs = ((ours.p50_ms, main.p50_ms), (ours.p99_ms, main.p99_ms))
            cells = [f"{a * 1e3:.0f} µs ({a / b:.2f} x main)" for a, b in pairs]
            cells.append(f"{ours.rows_per_s:,.0f} ({ours.rows_per_s / main.rows_per_s:.2f} x main)")
        lines.append(
            f"| {report.kind} | {'yes' if report.passed else 'no'} | {report.size_bytes:,} B "
            f"({share:.2f} x main) | {report.difference:.2g} (allowed {report.tolerance:.2g}) | "
            f"{report.metric} {report.metric_value:.4f} ({report.metric_difference:+.4f}) | "
            f"{' | '.join(cells)} |"
        )
    for report in (report for report in reports if not report.passed):
        lines += ["", f"{report.kind} is left out: {'; '.join(report.failures)}"]
    return "\n".join(lines) + "\n"
