"""The tables that `benchmarks/gradients.py` prints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from faults.campaign import Outcome, score, share

OURS = "verify_gradients"
Judged = Sequence[Mapping[str, Outcome]]


def percent(value: float | None) -> str:
    """A share as text."""
    return "-" if value is None else f"{100 * value:.1f} %"


def heading(title: str, columns: Sequence[str]) -> None:
    """The title and the head of a Markdown table whose first column is text."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |")
    print("|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|")


def row(*cells: Any) -> None:
    """One line of a table."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |")


def of(judged: Judged, detector: str) -> list[Outcome]:
    """The outcomes that a detector gave a verdict on."""
    found = (outcomes.get(detector) for outcomes in judged)
    return [o for o in found if o is not None and o.answer is not None]


def detection(judged: Judged, detectors: Sequence[str]) -> None:
    """Shares per operator: caught by each, and how well ours points."""
    heading(
        "Faults caught, by operator; tensors and module are right only of verify_gradients",
        ("fault", "family", "cases", *detectors, "tensors right", "module right"),
    )
    for name in dict.fromkeys(o.operator for o in of(judged, OURS)):
        mine = [outcomes for outcomes in judged if outcomes[OURS].operator == name]
        ours = score(of(mine, OURS))
        caught = (percent(score(of(mine, d)).caught) for d in detectors)
        family = mine[0][OURS].family.replace("_", " ")
        right = (percent(ours.tensors_right), percent(ours.module_right))
        row(name, family, ours.cases, *caught, *right)


def aims(judged: Judged, answers: Iterable[Any]) -> None:
    """What was promised and what was measured."""
    ours = score(of(judged, OURS))
    clean = [a for a in answers if a.detector == OURS]
    alarms = sum(a.answer.alarm for a in clean)
    over = sum(a.answer.forwards > 2 * a.tensors + 10 for a in clean)
    models = len({a.model for a in clean})
    tensors = sum(a.tensors for a in clean if a.seed == 0)
    heading("Aims of verify_gradients", ("measure", "aim", "measured"))
    row("applicable faults caught", "98 %", percent(ours.caught))
    row("wrong gradients off by 1 % or more caught", "100 %", percent(ours.large_caught))
    row("set of wrong tensors right", "95 %", percent(ours.tensors_right))
    row("module named is the one at fault", "90 %", percent(ours.module_right))
    where = f"on {models} correct models, {tensors} tensors, {len(clean)} runs"
    row(f"alarms {where}", 0, alarms)
    row(f"more than 2P + 10 forwards {where}", 0, over)


def comparison(judged: Judged, detectors: Sequence[str]) -> None:
    """Shares caught by family, each detector on the cases it can judge, and on common ones."""
    common = [o for o in judged if all(d in o and o[d].answer is not None for d in detectors)]
    families = tuple(dict.fromkeys(o.family for o in of(judged, OURS)))
    for title, cases in (("all cases", judged), ("cases that all of them judged", common)):
        heading(f"Faults caught, {title}", ("detector", "cases", *families, "all"))
        for detector in detectors:
            mine = of(cases, detector)
            by_family = (share(o.caught for o in mine if o.family == f) for f in families)
            total = share(o.caught for o in mine)
            row(detector.replace("_", " "), len(mine), *map(percent, by_family), percent(total))


def false_alarms(answers: Sequence[Any], detectors: Sequence[str]) -> None:
    """Alarms on correct models; the references see only those without a waiver."""
    heading("Alarms on correct models", ("detector", "runs", "tensors", "alarms", "on"))
    for detector in detectors:
        mine = [a for a in answers if a.detector == detector]
        alarms = sorted({a.model for a in mine if a.answer.alarm})
        count = sum(a.answer.alarm for a in mine)
        row(detector, len(mine), sum(a.tensors for a in mine), count, ", ".join(alarms) or "none")


def cost(answers: Sequence[Any], detectors: Sequence[str], models: Sequence[str]) -> None:
    """Forwards and seconds on the architectures without faults; a gradcheck forward is one call."""
    budget = "2P + 10"
    heading(
        "Cost on correct models: forwards / seconds",
        ("model", "P", budget, *detectors, "backwards of verify_gradients"),
    )
    for model in models:
        mine = {a.detector: a for a in answers if a.model == model and a.seed == 0}
        ours = mine[OURS]
        cells = [
            f"{mine[d].answer.forwards} / {mine[d].seconds:.2f}" if d in mine else "-"
            for d in detectors
        ]
        row(model, ours.tensors, 2 * ours.tensors + 10, *cells, ours.answer.backwards)


def large(rows: Sequence[Any]) -> None:
    """Seconds and memory on the model of five million parameters."""
    first = rows[0]
    heading(
        f"A correct transformer of {first.elements:,} parameters in {first.tensors} tensors, two "
        f"threads; 2P + 10 is {2 * first.tensors + 10}",
        ("detector", "alarm", "forwards", "backwards", "seconds", "MiB more", "float64 models"),
    )
    for r in rows:
        alarm, backwards = "yes" if r.alarm else "no", r.backwards or "-"
        memory = f"{r.memory / 2**20:.0f}"
        row(r.detector, alarm, r.forwards, backwards, f"{r.seconds:.1f}", memory, f"{r.ratio:.1f}")
