"""The rule that decides who is champion, and the sentence that explains it."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from components.decide.promotion import Contender, hold_back, judge
from components.export.config import Promotion
from components.metrics import resampled_accuracy
from components.pipeline import QualityGate, Scored, SliceGate
from components.pipelines.digits import pipeline as digits

ROWS = 64
# Halves and quarters are exact in binary, so that a boundary is a boundary.
PIPELINE = replace(
    digits,
    gates=(QualityGate(metric="accuracy", minimum=0.25),),
    metric="accuracy",
    margin=0.25,
    resampled=resampled_accuracy("probabilities"),
)


def scored(right: int) -> Scored:
    """Answers of which the first ``right`` are right."""
    labels = np.arange(ROWS) % 2
    answers = np.where(np.arange(ROWS) < right, labels, 1 - labels)
    return Scored(
        rows=pa.table({"half": ["a", "b"] * (ROWS // 2)}),
        labels=labels,
        outputs={"probabilities": np.eye(2, dtype=np.float32)[answers]},
    )


def contender(version: int, right: int, **others: float) -> Contender:
    return Contender(version, {"accuracy": right / ROWS, **others}, scored(right))


def test_the_first_candidate_that_keeps_the_gates_is_champion() -> None:
    found = judge(PIPELINE, contender(1, 32), None)
    assert found.verdict == "promoted"
    assert found.reason == (
        "version 1 has accuracy 0.5000 on 64 held-out rows and keeps every gate; there was no "
        "champion."
    )
    assert found.interval is None


@pytest.mark.parametrize(
    ("candidate", "champion", "verdict"),
    [
        (56, 48, "promoted"),  # better
        (48, 48, "promoted"),  # equal
        (44, 48, "promoted"),  # worse, and with certainty not by more than the margin
        (36, 48, "kept_champion"),  # worse by less than the margin, but who knows
        (24, 48, "kept_champion"),  # worse beyond the margin
    ],
)
def test_the_interval_and_the_margin_decide_between_two(
    candidate: int, champion: int, verdict: str
) -> None:
    found = judge(PIPELINE, contender(5, candidate), contender(3, champion))
    assert found.verdict == verdict
    difference = (candidate - champion) / ROWS
    interval = found.interval
    assert interval is not None and interval.low is not None and interval.high is not None
    assert interval.low <= difference <= interval.high
    assert (interval.low >= -PIPELINE.margin) is (verdict == "promoted")
    assert found.reason.startswith(
        f"version 5 has accuracy {candidate / ROWS:.4f} on 64 held-out rows, champion version 3 "
        f"has 0.7500 on the same rows: {difference:+.4f}, 95 % confidence interval "
        f"[{interval.low:+.4f}, {interval.high:+.4f}] from 1,000 paired resamples, with a margin "
        "of 0.25"
    )
    end = "the candidate is champion." if verdict == "promoted" else "the champion stays."
    assert found.reason.endswith(end)
    unsure = "that it is not worse by more than the margin is not shown" in found.reason
    assert unsure is (verdict == "kept_champion" and difference >= -PIPELINE.margin)


def test_without_a_margin_equal_answers_are_enough_and_one_row_less_is_not() -> None:
    strict = replace(PIPELINE, margin=0.0)
    equal = judge(strict, contender(4, 48), contender(3, 48))
    assert equal.verdict == "promoted"
    assert equal.interval is not None
    assert (equal.interval.low, equal.interval.high) == (0.0, 0.0)
    assert judge(strict, contender(4, 47), contender(3, 48)).verdict == "kept_champion"


def test_the_low_end_of_the_interval_may_touch_the_margin() -> None:
    found = judge(PIPELINE, contender(5, 40), contender(3, 48))
    assert found.interval is not None and found.interval.low is not None
    low = found.interval.low
    for margin, verdict in ((-low, "promoted"), (math.nextafter(-low, 0), "kept_champion")):
        pipeline = replace(PIPELINE, margin=margin)
        assert judge(pipeline, contender(5, 40), contender(3, 48)).verdict == verdict


def test_a_champion_of_a_later_date_is_said_to_know_the_rows() -> None:
    later = replace(contender(3, 48), trained_later=True)
    reason = judge(PIPELINE, contender(5, 48), later).reason
    assert "the champion was trained as of a later date and may know these rows" in reason


@pytest.mark.parametrize("champion", [None, contender(3, 0)])
def test_a_broken_gate_rejects_whoever_is_champion(champion: Contender | None) -> None:
    found = judge(PIPELINE, contender(5, 8), champion)
    assert found.verdict == "rejected"
    assert "accuracy must be at least 0.25; got 0.125, which fails" in found.reason


def test_a_broken_gate_rejects_the_champion_itself() -> None:
    same = contender(5, 8)
    assert judge(PIPELINE, same, same).verdict == "rejected"


def test_a_broken_slice_rejects() -> None:
    gate = SliceGate(metric="accuracy", column="half", minimum=0.5, min_rows=1)
    pipeline = replace(PIPELINE, gates=(gate,), features=replace(digits.features, label="half"))
    assert judge(pipeline, contender(5, 32), None).verdict == "promoted"
    found = judge(pipeline, contender(5, 31), None)
    assert found.verdict == "rejected"
    assert "'b' (32 rows) has 0.46875, which fails." in found.reason


def test_every_broken_gate_is_named() -> None:
    gates = (
        QualityGate(metric="accuracy", minimum=0.5),
        QualityGate(metric="log_loss", maximum=0.5),
        QualityGate(metric="unheard_of", minimum=0.0),
    )
    found = judge(replace(PIPELINE, gates=gates), contender(5, 16, log_loss=2.0), None)
    assert found.verdict == "rejected"
    for name in ("accuracy", "log_loss", "unheard_of"):
        assert f"{name} must" in found.reason


def test_the_gates_of_the_champion_are_not_asked_again() -> None:
    """A champion below a gate that was raised since still has to be beaten."""
    raised = replace(PIPELINE, gates=(QualityGate(metric="accuracy", minimum=0.5),))
    assert judge(raised, contender(5, 32), contender(3, 24)).verdict == "promoted"


def test_the_same_version_stays_champion() -> None:
    found = judge(PIPELINE, contender(3, 32), contender(3, 32))
    assert found.verdict == "kept_champion"
    assert "0.5000 on 64 held-out rows; it is the champion already." in found.reason


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_rejected(score: float) -> None:
    """Even where the gates look at another metric."""
    gates = (QualityGate(metric="log_loss", maximum=1.0),)
    pipeline = replace(PIPELINE, gates=gates)
    for champion in (None, contender(3, 32, log_loss=0.1)):
        candidate = Contender(5, {"accuracy": score, "log_loss": 0.1}, scored(32))
        found = judge(pipeline, candidate, champion)
        assert found.verdict == "rejected"
        assert "accuracy must be finite" in found.reason


@pytest.mark.parametrize("metrics", [{}, {"accuracy": math.nan}])
def test_a_champion_without_a_score_is_replaced(metrics: dict[str, float]) -> None:
    found = judge(PIPELINE, contender(5, 32), Contender(3, metrics, scored(32)))
    assert found.verdict == "promoted"
    assert "champion version 3 has no finite accuracy" in found.reason


def test_a_candidate_without_the_deciding_metric_is_rejected() -> None:
    pipeline = replace(PIPELINE, gates=(QualityGate(metric="log_loss", maximum=1.0),))
    found = judge(pipeline, Contender(5, {"log_loss": 0.1}, scored(32)), None)
    assert found.verdict == "rejected"
    assert "accuracy" in found.reason


def test_a_pipeline_that_is_promoted_by_hand_has_candidates() -> None:
    assert hold_back("automatic", "digits", 5, 3, None) is None
    hold = hold_back("manual", "digits", 5, 3, None)
    better = judge(PIPELINE, contender(5, 56), contender(3, 48), hold)
    assert better.verdict == "candidate" and better.interval is not None
    assert better.reason.endswith(
        "with a margin of 0.25, so it could be champion, and this pipeline is promoted by hand: "
        "approve it by 'assay promote digits 5 --reason TEXT'."
    )
    first = judge(PIPELINE, contender(5, 56), None, hold)
    assert first.verdict == "candidate"
    assert "there was no champion, so it could be champion, and this pip" in first.reason
    unscored = judge(PIPELINE, contender(5, 56), Contender(3, {}, scored(1)), hold)
    assert unscored.verdict == "candidate"
    # What would not be champion anyway is not held back.
    assert judge(PIPELINE, contender(5, 8), None, hold).verdict == "rejected"
    assert judge(PIPELINE, contender(5, 24), contender(3, 48), hold).verdict == "kept_champion"
    assert judge(PIPELINE, contender(3, 56), contender(3, 56), hold).verdict == "kept_champion"


@pytest.mark.parametrize("promotion", ["automatic", "manual"])
def test_what_was_rolled_back_does_not_return_by_itself(promotion: Promotion) -> None:
    hold = hold_back(promotion, "digits", 5, 3, "too slow")
    found = judge(PIPELINE, contender(5, 56), contender(3, 48), hold)
    assert found.verdict == "kept_champion"
    assert found.reason.endswith(
        "so it could be champion, but it was rolled back (too slow), and returns by "
        "'assay promote digits 5 --reason TEXT'."
    )
    alone = hold_back(promotion, "digits", 5, None, "too slow")
    assert judge(PIPELINE, contender(5, 56), None, alone).verdict == "candidate"
