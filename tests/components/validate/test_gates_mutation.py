"""For every gate of validate and decide, a candidate that it alone rejects."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from support.gate_lab import (
    PIPELINE,
    Candidate,
    Detached,
    Entangled,
    Reckless,
    Timid,
    World,
)

from components.decide.promotion import Contender, Judgement, judge
from components.errors import GateError
from components.validate.run import Evidence

GOOD = Candidate()
UNSAFE = """
from support.gate_lab import loss as kept


def loss(logits, labels):
    return kept(logits, labels)


def restore(text):
    return eval(text)
"""

REJECTED = {
    "floor": (
        Candidate(slope=0.5, world=World(slope=0.5)),
        r"quality: roc_auc must be at least 0\.65; got 0\.6\d+, which fails\.",
    ),
    "ceiling": (
        Candidate(Reckless),
        r"quality: log_loss must be at most 0\.75; got \d\.\d+, which fails\.",
    ),
    "slice floor": (
        Candidate(world=World(lawless=True)),
        r"quality: roc_auc must be at least 0\.6 for every value of 'group'; 'b' \(1\d\d rows\) "
        r"has 0\.[45]\d+, which fails\.",
    ),
    "calibration": (
        Candidate(slope=5.0),
        r"quality: calibration_error must be at most 0\.1; got 0\.1\d+, which fails\.",
    ),
    "baseline": (
        Candidate(Timid, slope=1.0, shift=-2.5, world=World(slope=1.0, shift=-2.5)),
        r"quality: accuracy must be higher than that of a constant prediction of the training "
        r"labels' frequencies; on 600 held-out rows the model has 0\.(\d+), the constant 0\.\1: "
        r"\+0\.0000, 95 % confidence interval \[\+0\.0000, \+0\.0000\] from 1,000 paired "
        r"resamples, which does not lie above zero and fails\.",
    ),
    "single feature": (
        Candidate(world=World(leak=True)),
        r"leakage: no feature may predict the label alone; 'other' does, with ROC-AUC 1\.0000 "
        r"\(allowed below 0\.99\)",
    ),
    "identical rows": (
        Candidate(world=World(repeated=7)),
        r"leakage: held-out rows must not stand in training; 7 \(1\.17%, allowed at most 1\.00%\) "
        r"have the features and label of a training row, the first with the numbers 593, 594, "
        r"595, 596, 597 and 2 more\. ",
    ),
    "keys": (
        Candidate(world=World(shared_keys=1)),
        r"leakage: held-out rows must not stand in training; 1 \(0\.17%, allowed none\) have the "
        r"key \(id\) of a training row, the first with the numbers 0\. ",
    ),
    "contract": (
        Candidate(Entangled),
        r"contract: a row's outputs must not depend on its batch; output 0 changes by ",
    ),
    "gradients": (Candidate(Detached), r"gradients: .*groups\.weight \(broken_path\)"),
}


@pytest.fixture
def unsafe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Candidate]:
    """A candidate whose loss stands in a file with a call of eval."""
    (tmp_path / "losses_of_lab.py").write_text(UNSAFE)
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = import_module("losses_of_lab").loss
    yield Candidate(pipeline=replace(PIPELINE, loss=loss))
    del sys.modules["losses_of_lab"]


def only_failure(evidence: Evidence) -> str:
    with pytest.raises(GateError) as caught:
        evidence.require_passed()
    assert evidence.failures() == caught.value.failures
    first, *others = evidence.failures()
    # One entangled batch breaks a rule of the contract in several ways.
    assert {failure.split(":")[0] for failure in others} <= {"contract"}
    assert first.startswith("contract: ") or not others
    return first


def test_the_good_candidate_passes_every_gate(tmp_path: Path) -> None:
    evidence = GOOD.evidence(tmp_path)
    assert evidence.failures() == ()
    gradients, gates = evidence.require_passed()
    assert gradients.passed and gates.passed


@pytest.mark.parametrize("gate", REJECTED)
def test_a_candidate_that_one_gate_alone_rejects(gate: str, tmp_path: Path) -> None:
    candidate, sentence = REJECTED[gate]
    assert re.match(sentence, only_failure(candidate.evidence(tmp_path)))


def test_a_candidate_that_the_look_at_its_source_alone_rejects(
    unsafe: Candidate, tmp_path: Path
) -> None:
    failure = only_failure(unsafe.evidence(tmp_path))
    assert failure.startswith("source: losses_of_lab.py:10: eval runs text as code.")


def test_a_candidate_that_the_champion_alone_rejects(tmp_path: Path) -> None:
    """It keeps every gate, and is worse than the champion by more than the margin."""
    contenders = []
    for version, given in enumerate((GOOD, Candidate(slope=1.2, noise=0.8)), start=1):
        evidence = given.evidence(tmp_path / str(version))
        assert evidence.failures() == ()
        assert evidence.scored is not None
        contenders.append(Contender(version, evidence.metrics, evidence.scored))
    champion, candidate = contenders
    assert judge(PIPELINE, candidate, None).verdict == "promoted"
    assert judge(PIPELINE, champion, candidate).verdict == "promoted"
    found = judge(PIPELINE, candidate, champion)
    assert found.verdict == "kept_champion"
    assert decision(found) < -PIPELINE.margin


def decision(found: Judgement) -> float:
    assert found.interval is not None and found.interval.low is not None
    return found.interval.low
