"""Champion or candidate: one rule, and the sentence that explains it."""

import math
from dataclasses import dataclass

from components.pipeline import Pipeline
from components.records import Verdict
from components.validate.gates import check_gates


@dataclass(frozen=True)
class Judgement:
    """The verdict and its reason, with both scores."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Contender:
    """A registered version and its metrics on the held-out rows, through ONNX Runtime.

    ``trained_later`` says that it was trained as of a later date, and so may know these rows.
    """

    version: int
    metrics: dict[str, float]
    trained_later: bool = False


def judge(
    pipeline: Pipeline, candidate: Contender, champion: Contender | None, rows: int
) -> Judgement:
    """Decide who is champion.

    The candidate must keep the pipeline's gates. It replaces the champion if its metric on the same
    rows is not lower by more than the pipeline's margin; with no champion, or with one whose metric
    is not finite, the gates suffice.

    Args:
        pipeline: Gives gates, deciding metric (higher is better) and margin.
        candidate: The version that was just proved.
        champion: The version that is champion now, or None.
        rows: Number of held-out rows that both were scored on.
    """
    gates = check_gates(pipeline.gates, candidate.metrics)
    if not gates.passed:
        return Judgement("rejected", " ".join(gates.failures))
    metric = pipeline.metric
    score = candidate.metrics.get(metric, math.nan)
    if not math.isfinite(score):
        return Judgement(
            "rejected",
            f"{metric} must be finite to decide; version {candidate.version} has {score}.",
        )
    found = f"version {candidate.version} has {metric} {score:.4f} on {rows:,} held-out rows"
    if champion is None:
        return Judgement("promoted", f"{found} and keeps every gate; there was no champion.")
    if champion.version == candidate.version:
        return Judgement("kept_champion", f"{found}; it is the champion already.")
    other = champion.metrics.get(metric, math.nan)
    if not math.isfinite(other):
        return Judgement(
            "promoted",
            f"{found} and keeps every gate; champion version {champion.version} has no finite "
            f"{metric} on the same rows, so the candidate is champion.",
        )
    against = (
        f"{found}, champion version {champion.version} has {other:.4f} on the same rows: "
        f"{score - other:+.4f} with a margin of {pipeline.margin}"
    )
    if champion.trained_later:
        against += ", though the champion was trained as of a later date and may know these rows"
    if score >= other - pipeline.margin:
        return Judgement("promoted", f"{against}, so the candidate is champion.")
    return Judgement("kept_champion", f"{against}, so the champion stays.")
