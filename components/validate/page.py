"""The report page of validation: verdict and every failure first, then tables and pictures."""

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from components.pipeline import Pipeline
from components.validate.gates.leakage import LeakageReport, Overlap
from components.validate.gates.report import BaselineResult, GateResult, SliceResult
from components.validate.gates.single_features import UNSCORABLE
from components.validate.gradients.report import GradientReport
from components.validate.page_plots import (
    Losses,
    draw_curves,
    draw_gradients,
    draw_losses,
    draw_slices,
)
from components.validate.run import Evidence

EMBEDDED_BYTES = 360_000
"""Size up to which pictures are put into the page itself; Prefect keeps it in its database."""
_TOP_FEATURES = 20


@dataclass(frozen=True)
class Page:
    """Markdown with a place ``{{name}}`` for the address of each picture, and the pictures (PNG).

    The Markdown holds no other braces of two.
    """

    template: str
    pictures: Mapping[str, bytes]

    def beside_files(self) -> str:
        """The page as a file, its pictures beside it by name."""
        return self._filled(lambda name, _: name)

    def embedded(self) -> str:
        """The page with its pictures inside, as far as they fit; the others by name."""
        left = EMBEDDED_BYTES - len(self.template.encode())
        inside: dict[str, str] = {}
        for name, picture in self.pictures.items():
            address = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            if len(address) <= left:
                inside[name] = address
                left -= len(address)
        return self._filled(lambda name, _: inside.get(name, name))

    def _filled(self, address: Callable[[str, bytes], str]) -> str:
        text = self.template
        for name, picture in self.pictures.items():
            text = text.replace(f"{{{{{name}}}}}", address(name, picture))
        return text


def make_page(pipeline: Pipeline, evidence: Evidence, losses: Losses) -> Page:
    """Draw the page; what was not measured is left out, and the verdict says why.

    Args:
        pipeline: What was validated.
        evidence: What its gates found.
        losses: Of training, by epoch.
    """
    pictures = {
        "gradients": draw_gradients(evidence.gradients) if evidence.gradients else None,
        "curves": draw_curves(evidence.scored, pipeline.features.classes)
        if evidence.scored
        else None,
        "slices": draw_slices(evidence.gates.slices) if evidence.gates else None,
        "loss": draw_losses(losses),
    }
    drawn = {f"{name}.png": picture for name, picture in pictures.items() if picture is not None}
    sections = [
        _verdict(pipeline, evidence),
        ("Gates", _table(("gate", "found", "allowed"), _gates(evidence))),
        ("Gradients", _gradients(evidence.gradients)),
        ("ROC and calibration", _picture("curves", drawn)),
        ("Slices", _picture("slices", drawn)),
        ("Loss of training", _picture("loss", drawn)),
        ("Contract", _contract(evidence)),
        ("Leakage", _leakage(evidence.leakage)),
        ("Source", _source(evidence)),
        ("Reports", "\n".join(f"- `validate/{name}.json`" for name in evidence.reports())),
    ]
    text = "\n\n".join(
        f"{'#' * (2 if place else 1)} {title}\n\n{body}"
        for place, (title, body) in enumerate(sections)
        if body
    )
    return Page(text + "\n", drawn)


def _verdict(pipeline: Pipeline, evidence: Evidence) -> tuple[str, str]:
    failures = evidence.failures()
    if not failures:
        return f"{_plain(pipeline.name)}: validated", "Every gate passed."
    listed = "\n".join(f"- {_plain(failure)}" for failure in failures)
    count = "1 failure" if len(failures) == 1 else f"{len(failures)} failures"
    return f"{_plain(pipeline.name)}: rejected by validate", f"{count}:\n\n{listed}"


def _gates(evidence: Evidence) -> Iterable[tuple[str, str, str, bool]]:
    checks = evidence.contract.checks
    held = sum(check.passed for check in checks)
    yield "contract", f"{held} of {len(checks)} checks hold", "all", evidence.contract.passed
    if (report := evidence.gradients) is not None:
        good = sum(not t.refused for t in report.tensors)
        steps = sum(check.passed for check in report.checks)
        found = f"{good} of {len(report.tensors)} tensors, {steps} of {len(report.checks)} checks"
        yield "gradients", found, "all", report.passed
    source = evidence.source
    yield "source", f"{len(source.findings)} findings", "none", source.passed
    if (gates := evidence.gates) is not None:
        yield from map(_absolute, gates.results)
        yield from map(_by_slice, gates.slices)
        if gates.baseline is not None:
            yield _baseline(gates.baseline)
    if (leakage := evidence.leakage) is not None:
        yield _features(leakage)
        yield _overlap("identical rows in both splits", leakage.duplicates)
        if leakage.keys is not None:
            yield _overlap("keys in both splits", leakage.keys)


def _absolute(result: GateResult) -> tuple[str, str, str, bool]:
    return result.metric, _number(result.value), _bounds(result), result.passed


def _by_slice(result: SliceResult) -> tuple[str, str, str, bool]:
    judged = sum(one.passed is not None for one in result.slices)
    found = f"{len(result.failures)} failures, {judged} of {len(result.slices)} slices judged"
    return f"{result.metric} by {result.column}", found, _bounds(result), result.passed


def _baseline(result: BaselineResult) -> tuple[str, str, str, bool]:
    found = f"{_number(result.value)} against {_number(result.baseline)}"
    if result.interval is not None:
        found += f", {result.interval}"
    return f"{result.metric} against a constant", found, "above 0", result.passed


def _features(report: LeakageReport) -> tuple[str, str, str, bool]:
    scored = [one for one in report.features if one.roc_auc is not None and not one.allowed]
    best = max(scored, key=lambda one: one.roc_auc or 0.0, default=None)
    found = f"{best.feature}: ROC-AUC {best.roc_auc:.4f}" if best else "none was looked at"
    unscored = any(one.note == UNSCORABLE and not one.allowed for one in report.features)
    passed = not unscored and (best is None or (best.roc_auc or 0.0) < report.alarm)
    return "best single feature", found, f"below {report.alarm}", passed


def _overlap(what: str, overlap: Overlap) -> tuple[str, str, str, bool]:
    passed = overlap.share <= overlap.allowed_share
    found = f"{overlap.rows:,} rows ({overlap.share:.2%})"
    return what, found, f"at most {overlap.allowed_share:.2%}", passed


def _gradients(report: GradientReport | None) -> str:
    if report is None:
        return ""
    return f"![relative error of each tensor]({{{{gradients.png}}}})\n\n{_plain(report.reason)}"


def _picture(name: str, drawn: Mapping[str, bytes]) -> str:
    return f"![{name}]({{{{{name}.png}}}})" if f"{name}.png" in drawn else ""


def _contract(evidence: Evidence) -> str:
    rows = ((c.name, c.detail, c.passed) for c in evidence.contract.checks)
    return _table(("check", "rule, or what broke it"), rows)


def _leakage(report: LeakageReport | None) -> str:
    if report is None:
        return ""
    order = sorted(report.features, key=lambda one: -(one.roc_auc or 0.0))
    rows = (
        (
            one.feature,
            _number(one.roc_auc),
            one.allowed or one.note,
            one.roc_auc is None or one.roc_auc < report.alarm or bool(one.allowed),
        )
        for one in order[:_TOP_FEATURES]
    )
    titles = ("feature alone", "ROC-AUC", "note")
    return f"On {report.sample_rows:,} training rows.\n\n{_table(titles, rows)}"


def _source(evidence: Evidence) -> str:
    return "\n".join(f"- {_plain(found.sentence)}" for found in evidence.source.findings)


def _bounds(result: GateResult | SliceResult) -> str:
    limits = [f"at least {result.minimum!r}"] if result.minimum is not None else []
    limits += [f"at most {result.maximum!r}"] if result.maximum is not None else []
    return ", ".join(limits)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str | bool, ...]]) -> str:
    """Rows end with whether they passed; that is shown second, where narrow pages do not cut it."""
    lines = [_row([titles[0], "verdict", *titles[1:]]), f"|{' --- |' * (len(titles) + 1)}"]
    for first, *cells, passed in rows:
        verdict = "passed" if passed else "**failed**"
        lines.append(_row([_plain(str(first)), verdict, *(_plain(str(cell)) for cell in cells)]))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line of a table."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("{{", "{ {"), ("*", "\\*")):
        text = text.replace(mark, safe)
    return " ".join(text.split())
