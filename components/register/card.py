"""The model card of a version: what it is for, how it was proved, and what it was not shown.

The sections follow Mitchell et al., Model Cards for Model Reporting (2019),
https://arxiv.org/abs/1810.03993.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from components.contract import ModelMetadata
from components.export.parity import ParityReport
from components.records import ExportedModel
from components.validate.contract_report import ContractReport
from components.validate.gates.report import GateResult, GatesReport, SliceResult
from components.validate.gradients.report import GradientReport

_MOST_SLICES = 12


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card is made from: records, and the reports that they name."""

    exported: ExportedModel
    metadata: ModelMetadata
    contract: ContractReport
    gradients: GradientReport
    gates: GatesReport
    parity: ParityReport
    plots: tuple[str, ...]
    parent: str
    flow_run: str


def model_card(facts: Facts) -> str:
    """The card, in Markdown; the sections that a reader asks for first come first."""
    job = facts.exported.validated.trained.job
    sections: list[tuple[str, Iterable[str]]] = [
        (f"# {job.pipeline}", [facts.metadata.description.rstrip(".") + "."]),
        ("## How to load", _loading(facts)),
        ("## Metrics", _metrics(facts)),
        ("## Limits", _limits(facts)),
        ("## Data", _data(facts)),
        ("## Inputs and outputs", _interface(facts.metadata)),
        ("## Gates", _gates(facts.gates)),
        ("## Slices", _slices(facts.gates.slices)),
        ("## Evidence", _evidence(facts)),
        ("## Variants", _variants(facts)),
        ("## Training", _training(facts)),
        ("## Lineage", _lineage(facts)),
        ("## Plots", [f"![{name}](plots/{name})" for name in facts.plots]),
    ]
    written = ((title, "\n".join(body)) for title, body in sections)
    return "\n\n".join(f"{title}\n\n{body}" for title, body in written if body) + "\n"


def _loading(facts: Facts) -> Iterable[str]:
    name = facts.exported.validated.trained.job.pipeline
    columns = _columns(facts.metadata)
    given = "rows)  # a DataFrame" if columns else "inputs)  # arrays by input name"
    return [
        "```python",
        "import mlflow",
        f'model = mlflow.pyfunc.load_model("models:/{name}@champion")',
        f"model.predict({given}",
        "```",
        "",
        "Or load `model.onnx` with any ONNX runtime; `golden.npz` holds rows and their answers.",
    ]


def _metrics(facts: Facts) -> Iterable[str]:
    validated = facts.exported.validated
    rows = [
        (name, f"{value:.4f}", _ends(validated.intervals.get(name)))
        for name, value in validated.metrics.items()
        if "/" not in name
    ]
    held = validated.trained.job.rows.get("holdout")
    on = f"On {held:,} held-out rows." if held else "On the held-out rows."
    return [on, "", *_table(("metric", "value", "95 % interval"), rows)]


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _limits(facts: Facts) -> Iterator[str]:
    job = facts.exported.validated.trained.job
    yield f"- It has seen nothing outside of: {job.window}."
    yield "- Its metrics hold for rows like those held out; where the world has moved on, measure."
    for reason, count in job.excluded.items():
        yield f"- {count:,} rows were left out of training and measurement: {reason}."
    for result in facts.gates.slices:
        few = [one.value for one in result.slices if one.passed is None]
        if few:
            more = ", ..." if len(few) > _MOST_SLICES else ""
            named = ", ".join(few[:_MOST_SLICES])
            yield f"- Too few rows to judge it by {result.column}: {_plain(named)}{more}."
    if any(spec.dtype == "string" for spec in facts.metadata.inputs):
        yield (
            '- Missing text is `""`. It is answered like any text that training did not show, or '
            "showed seldom: as unknown."
        )
    if _columns(facts.metadata) and any("float" in s.dtype for s in facts.metadata.inputs):
        yield "- A missing number is NaN."


def _data(facts: Facts) -> Iterator[str]:
    job = facts.exported.validated.trained.job
    yield f"- window: {job.window}"
    yield f"- as of: {job.as_of}"
    yield "- rows: " + ", ".join(f"{split} {count:,}" for split, count in job.rows.items())
    yield f"- fingerprint: `{job.data_fingerprint}`"


def _interface(metadata: ModelMetadata) -> Iterator[str]:
    sides = (("input", metadata.inputs), ("output", metadata.outputs))
    rows = [
        (spec.name, side, spec.dtype, " x ".join(map(str, spec.shape)), spec.unit)
        for side, specs in sides
        for spec in specs
    ]
    yield from _table(("name", "", "type", "shape", "unit"), rows)
    if metadata.classes:
        yield ""
        yield "Classes, in the order of the outputs: " + ", ".join(metadata.classes) + "."


def _gates(report: GatesReport) -> Iterator[str]:
    rows = [(r.metric, _number(r.value), _bounds(r), _word(r.passed)) for r in report.results]
    rows += [(f"{r.metric} by {r.column}", "", _bounds(r), _word(r.passed)) for r in report.slices]
    if (one := report.baseline) is not None:
        found = f"{_number(one.value)} against {_number(one.baseline)}"
        rows.append((f"{one.metric} against a constant", found, "above 0", _word(one.passed)))
    if rows:
        yield from _table(("gate", "found", "allowed", "verdict"), rows)


def _slices(results: tuple[SliceResult, ...]) -> Iterator[str]:
    rows = []
    for result in results:
        judged = [one for one in result.slices if one.score is not None]
        judged.sort(key=lambda one: (one.passed is None, -one.rows))
        rows += [
            (result.column, one.value, f"{one.rows:,}", result.metric, _number(one.score))
            for one in judged[:_MOST_SLICES]
        ]
    if rows:
        yield from _table(("column", "value", "rows", "metric", "found"), rows)


def _evidence(facts: Facts) -> Iterator[str]:
    contract, gradients = facts.contract, facts.gradients
    held = sum(check.passed for check in contract.checks)
    yield f"- Contract: {held} of {len(contract.checks)} checks hold."
    good = sum(not tensor.refused for tensor in gradients.tensors)
    steps = sum(check.passed for check in gradients.checks)
    yield (
        f"- Gradients: {good} of {len(gradients.tensors)} tensors agree with finite differences, "
        f"{steps} of {len(gradients.checks)} checks of the training step hold."
    )
    cases = facts.parity.cases
    yield f"- Parity with PyTorch in float64: {len(cases):,} comparisons."
    for name in dict.fromkeys(case.output for case in cases):
        worst = max(
            (case for case in cases if case.output == name),
            key=lambda case: case.error / case.allowed if case.allowed else case.error,
        )
        yield (
            f"  - `{name}`: the error nearest to its bound is {worst.error:.1e} of "
            f"{worst.allowed:.1e} allowed ({worst.case}, batch {worst.batch})"
        )


def _variants(facts: Facts) -> Iterator[str]:
    rows = [
        (
            one.kind,
            f"{one.onnx.size / 1024:,.0f} KiB",
            f"{one.difference:.1e}",
            f"{one.metric_difference:+.4f}",
            f"{one.p50_ms:.3f} ms",
        )
        for one in facts.exported.variants
    ]
    if rows:
        titles = ("variant", "size", "largest difference", "metric", "median of one row")
        yield f"The main file has {facts.exported.onnx.size / 1024:,.0f} KiB."
        yield ""
        yield from _table(titles, rows)


def _training(facts: Facts) -> Iterator[str]:
    trained = facts.exported.validated.trained
    yield (
        f"{trained.epochs} epochs on {trained.device}, the best was {trained.best_epoch}; seed "
        f"{trained.job.seed}, opset {facts.exported.opset}."
    )
    yield ""
    yield from _table(("setting", "value"), ((k, str(v)) for k, v in trained.job.config.items()))


def _lineage(facts: Facts) -> Iterator[str]:
    trained = facts.exported.validated.trained
    job = trained.job
    yield f"- champion before: {facts.parent or 'none'}"
    yield f"- MLflow run: `{trained.run_id}`"
    yield f"- Prefect flow run: {facts.flow_run}"
    yield f"- source revision: `{job.code_revision}`, digest `{job.code_digest}`"
    yield f"- config digest: `{job.config_digest}`"
    yield f"- sha256 of model.onnx: `{facts.exported.onnx.sha256}`"


def _columns(metadata: ModelMetadata) -> bool:
    return all(len(spec.shape) == 1 for spec in metadata.inputs)


def _bounds(result: GateResult | SliceResult) -> str:
    limits = [f"at least {result.minimum!r}"] if result.minimum is not None else []
    limits += [f"at most {result.maximum!r}"] if result.maximum is not None else []
    return ", ".join(limits)


def _word(passed: bool) -> str:
    return "passed" if passed else "failed"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + " --- |" * len(titles)
    for row in rows:
        yield f"| {' | '.join(_plain(cell) for cell in row)} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line of a table."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*")):
        text = text.replace(mark, safe)
    return " ".join(text.split())
