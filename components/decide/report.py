"""The decision as Markdown, for Prefect and MLflow."""

from components.decide.promotion import Contender, Judgement
from components.pipeline import Pipeline


def decision_markdown(
    pipeline: Pipeline, candidate: Contender, champion: Contender | None, judgement: Judgement
) -> str:
    """Verdict, reason, and a table of both contenders' metrics on the whole holdout."""
    contenders = [candidate]
    if champion is not None and champion.version != candidate.version:
        contenders.append(champion)
    titles = ["metric", f"candidate {candidate.version}"]
    titles += [f"champion {other.version}" for other in contenders[1:]]
    lines = [_row(titles), _row(["---"] + ["---:"] * len(contenders))]
    for name in candidate.metrics:
        if "/" not in name:
            values = [c.metrics.get(name) for c in contenders]
            lines.append(_row([name, *("" if v is None else f"{v:.4f}" for v in values)]))
    return "\n".join(
        [f"# {pipeline.name}: {judgement.verdict}", "", judgement.reason, "", *lines, ""]
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
