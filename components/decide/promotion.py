"""Champion or candidate: one rule, and the sentence that explains it."""

import math
from dataclasses import dataclass

from components.bootstrap import Interval, compare
from components.export.config import Promotion
from components.pipeline import Pipeline, Scored
from components.records import Verdict
from components.validate.gates import check_quality


@dataclass(frozen=True)
class Judgement:
    """The verdict and its reason, with both scores; the interval where two were compared."""

    verdict: Verdict
    reason: str
    interval: Interval | None = None


@dataclass(frozen=True)
class Contender:
    """A registered version, its answers to the held-out rows through ONNX Runtime, their metrics.

    ``trained_later`` says that it was trained as of a later date, and so may know these rows.
    """

    version: int
    metrics: dict[str, float]
    scored: Scored
    trained_later: bool = False


@dataclass(frozen=True)
class Hold:
    """What becomes of a version that could be champion and must not be by itself, and why."""

    verdict: Verdict
    why: str


def hold_back(
    promotion: Promotion, model: str, version: int, champion: int | None, rolled_back: str | None
) -> Hold | None:
    """Whether a person has to approve of this version first.

    Args:
        promotion: How the pipeline promotes.
        model: The registered model's name.
        version: The candidate.
        champion: The version that is champion now.
        rolled_back: Why this version was rolled back, if it was.
    """
    command = f"'assay promote {model} {version} --reason TEXT'"
    if rolled_back is not None:
        verdict: Verdict = "candidate" if champion is None else "kept_champion"
        return Hold(verdict, f"but it was rolled back ({rolled_back}), and returns by {command}.")
    if promotion == "manual":
        return Hold("candidate", f"and this pipeline is promoted by hand: approve it by {command}.")
    return None


def judge(
    pipeline: Pipeline,
    candidate: Contender,
    champion: Contender | None,
    hold: Hold | None = None,
) -> Judgement:
    """Decide who is champion.

    The candidate must keep the pipeline's gates. It replaces the champion if it is shown not to be
    worse by more than the pipeline's margin: the lower end of the confidence interval of the
    metric's difference on the same rows lies at -margin or above. With no champion, or with one
    whose metric is not finite, the gates suffice.

    Args:
        pipeline: Gives gates, deciding metric (higher is better) and margin.
        candidate: The version that was just proved.
        champion: The version that is champion now, or None; on the same rows.
        hold: What becomes of the candidate instead, if it could be champion.

    Raises:
        ContractError: ``Pipeline.resampled`` is not the deciding metric.
    """
    gates = check_quality(pipeline, candidate.scored, candidate.metrics)
    if not gates.passed:
        return Judgement("rejected", " ".join(gates.failures))
    metric = pipeline.metric
    score = candidate.metrics.get(metric, math.nan)
    if not math.isfinite(score):
        return Judgement(
            "rejected",
            f"{metric} must be finite to decide; version {candidate.version} has {score}.",
        )
    rows = len(candidate.scored.labels)
    found = f"version {candidate.version} has {metric} {score:.4f} on {rows:,} held-out rows"
    if champion is None:
        evidence = f"{found} and keeps every gate; there was no champion"
        return _win(evidence, hold) if hold else Judgement("promoted", f"{evidence}.")
    if champion.version == candidate.version:
        return Judgement("kept_champion", f"{found}; it is the champion already.")
    other = champion.metrics.get(metric, math.nan)
    if not math.isfinite(other):
        return _win(
            f"{found} and keeps every gate; champion version {champion.version} has no finite "
            f"{metric} on the same rows",
            hold,
        )
    against = f"{found}, champion version {champion.version} has {other:.4f} on the same rows"
    return _against(pipeline, candidate, champion, against, hold)


def _win(evidence: str, hold: Hold | None, interval: Interval | None = None) -> Judgement:
    if hold is None:
        return Judgement("promoted", f"{evidence}, so the candidate is champion.", interval)
    return Judgement(hold.verdict, f"{evidence}, so it could be champion, {hold.why}", interval)


def _against(
    pipeline: Pipeline,
    candidate: Contender,
    champion: Contender,
    against: str,
    hold: Hold | None,
) -> Judgement:
    """Whether the difference is sure enough; ``against`` begins the sentence."""
    interval = compare(
        pipeline,
        (candidate.scored, candidate.metrics[pipeline.metric]),
        (champion.scored, champion.metrics[pipeline.metric]),
    )
    against += f": {interval.difference:+.4f}, {interval}, with a margin of {pipeline.margin}"
    if champion.trained_later:
        against += ", though the champion was trained as of a later date and may know these rows"
    if interval.low is not None and interval.low >= -pipeline.margin:
        return _win(against, hold, interval)
    unsure = interval.low is None or interval.difference >= -pipeline.margin
    why = "; that it is not worse by more than the margin is not shown" if unsure else ""
    return Judgement("kept_champion", f"{against}{why}, so the champion stays.", interval)
