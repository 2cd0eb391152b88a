"""The rule that decides who is champion, and the sentence that explains it."""

import math
from dataclasses import replace

import pytest

from components.decide.promotion import Contender, judge
from components.pipeline import QualityGate
from components.pipelines.digits import pipeline as digits

# Halves and quarters are exact in binary, so that a boundary is a boundary.
PIPELINE = replace(
    digits, gates=(QualityGate(metric="accuracy", minimum=0.25),), metric="accuracy", margin=0.25
)


def contender(version: int, score: float, **others: float) -> Contender:
    return Contender(version, {"accuracy": score, **others})


def test_the_first_candidate_that_keeps_the_gates_is_champion() -> None:
    found = judge(PIPELINE, contender(1, 0.5), None, 1234)
    assert found.verdict == "promoted"
    assert found.reason == (
        "version 1 has accuracy 0.5000 on 1,234 held-out rows and keeps every gate; there was no "
        "champion."
    )


@pytest.mark.parametrize(
    ("candidate", "champion", "verdict"),
    [
        (0.875, 0.75, "promoted"),  # better
        (0.75, 0.75, "promoted"),  # equal
        (0.625, 0.75, "promoted"),  # worse, within the margin
        (0.5, 0.75, "promoted"),  # worse by exactly the margin
        (math.nextafter(0.5, 0), 0.75, "kept_champion"),  # by the least bit more
        (0.375, 0.75, "kept_champion"),  # worse, beyond the margin
    ],
)
def test_the_margin_decides_between_two(candidate: float, champion: float, verdict: str) -> None:
    found = judge(PIPELINE, contender(5, candidate), contender(3, champion), 1234)
    assert found.verdict == verdict
    assert found.reason.startswith("version 5 has accuracy ")
    assert "champion version 3 has 0.7500 on the same rows" in found.reason
    assert f"{candidate:.4f} on 1,234 held-out rows" in found.reason
    assert f"{candidate - champion:+.4f} with a margin of 0.25" in found.reason
    end = "the candidate is champion." if verdict == "promoted" else "the champion stays."
    assert found.reason.endswith(end)


def test_without_a_margin_the_least_bit_decides() -> None:
    strict = replace(PIPELINE, margin=0.0)
    champion = contender(3, 0.75)
    assert judge(strict, contender(4, 0.75), champion, 9).verdict == "promoted"
    worse = contender(4, math.nextafter(0.75, 0))
    assert judge(strict, worse, champion, 9).verdict == "kept_champion"


@pytest.mark.parametrize("champion", [None, contender(3, 0.0)])
def test_a_broken_gate_rejects_whoever_is_champion(champion: Contender | None) -> None:
    found = judge(PIPELINE, contender(5, 0.125), champion, 1234)
    assert found.verdict == "rejected"
    assert "accuracy must be at least 0.25; got 0.125, which fails" in found.reason


def test_a_broken_gate_rejects_the_champion_itself() -> None:
    same = contender(5, 0.125)
    assert judge(PIPELINE, same, same, 1234).verdict == "rejected"


def test_every_broken_gate_is_named() -> None:
    gates = (
        QualityGate(metric="accuracy", minimum=0.5),
        QualityGate(metric="log_loss", maximum=0.5),
        QualityGate(metric="unheard_of", minimum=0.0),
    )
    found = judge(replace(PIPELINE, gates=gates), contender(5, 0.25, log_loss=2.0), None, 1234)
    assert found.verdict == "rejected"
    for name in ("accuracy", "log_loss", "unheard_of"):
        assert f"{name} must" in found.reason


def test_the_gates_of_the_champion_are_not_asked_again() -> None:
    """A champion below a gate that was raised since still has to be beaten."""
    raised = replace(PIPELINE, gates=(QualityGate(metric="accuracy", minimum=0.5),))
    assert judge(raised, contender(5, 0.5), contender(3, 0.375), 1234).verdict == "promoted"


def test_the_same_version_stays_champion() -> None:
    found = judge(PIPELINE, contender(3, 0.5), contender(3, 0.5), 1234)
    assert found.verdict == "kept_champion"
    assert "0.5000 on 1,234 held-out rows; it is the champion already." in found.reason


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_rejected(score: float) -> None:
    """Even where the gates look at another metric."""
    gates = (QualityGate(metric="log_loss", maximum=1.0),)
    pipeline = replace(PIPELINE, gates=gates)
    for champion in (None, contender(3, 0.5, log_loss=0.1)):
        found = judge(pipeline, contender(5, score, log_loss=0.1), champion, 1234)
        assert found.verdict == "rejected"
        assert "accuracy must be finite" in found.reason


@pytest.mark.parametrize("metrics", [{}, {"accuracy": math.nan}])
def test_a_champion_without_a_score_is_replaced(metrics: dict[str, float]) -> None:
    found = judge(PIPELINE, contender(5, 0.5), Contender(3, metrics), 1234)
    assert found.verdict == "promoted"
    assert "champion version 3 has no finite accuracy" in found.reason


def test_a_candidate_without_the_deciding_metric_is_rejected() -> None:
    pipeline = replace(PIPELINE, gates=(QualityGate(metric="log_loss", maximum=1.0),))
    found = judge(pipeline, Contender(5, {"log_loss": 0.1}), None, 1234)
    assert found.verdict == "rejected"
    assert "accuracy" in found.reason
