"""The paired bootstrap against scipy's, and what becomes of resamples without a score."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from components import bootstrap
from components.bootstrap import RESAMPLES, SLOW_RESAMPLES, compare, take_rows
from components.errors import ContractError
from components.metrics import resampled_accuracy, resampled_roc_auc
from components.pipeline import Pipeline, Resampled, Scored
from components.pipelines.digits import pipeline as digits

ROWS = 250


def by_pairs(labels: npt.NDArray[np.int64], scores: npt.NDArray[Any]) -> float:
    """ROC-AUC as the share of pairs in the right order; ValueError without a pair."""
    ones, zeros = scores[labels == 1][:, np.newaxis], scores[labels == 0]
    if not ones.size or not zeros.size:
        raise ValueError("one label only")
    return float(np.mean((ones > zeros) + 0.5 * (ones == zeros)))


PIPELINE = replace(
    digits,
    metrics=lambda scored: {"roc_auc": by_pairs(scored.labels, scored.outputs["p"])},
    metric="roc_auc",
    resampled=resampled_roc_auc("p"),
)


def model(noise: float, seed: int, rows: int = ROWS) -> tuple[Scored, float]:
    """Labels that are always the same, a probability, and its ROC-AUC."""
    labels = np.random.default_rng(0).integers(0, 2, rows)
    clues = labels + noise * np.random.default_rng(seed).normal(size=rows)
    p = (1 / (1 + np.exp(-clues))).round(2).astype(np.float32)
    found = Scored(rows=pa.table({"x": np.arange(rows)}), labels=labels, outputs={"p": p})
    return found, by_pairs(labels, p)


def test_the_interval_is_that_of_scipy() -> None:
    """Other resamples, so the ends agree as far as chance lets them."""
    from scipy.stats import bootstrap as reference

    first, second = model(1.0, 1), model(1.5, 2)
    labels = first[0].labels

    def difference(rows: npt.NDArray[np.int64]) -> float:
        a, b = (scored.outputs["p"][rows] for scored, _ in (first, second))
        return by_pairs(labels[rows], a) - by_pairs(labels[rows], b)

    wanted = reference(
        (np.arange(ROWS),),
        difference,
        vectorized=False,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(5),
    )
    found = compare(PIPELINE, first, second)
    assert found.low is not None and found.high is not None
    width = found.high - found.low
    assert found.difference == first[1] - second[1]
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=0.05 * width)
    assert (found.level, found.resamples, found.skipped, found.rows) == (0.95, RESAMPLES, 0, ROWS)


def test_it_is_the_same_every_time_and_mirrored_when_turned_round() -> None:
    first, second = model(1.0, 1), model(1.5, 2)
    found, turned = compare(PIPELINE, first, second), compare(PIPELINE, second, first)
    assert compare(PIPELINE, first, second) == found
    assert found.low is not None and turned.high is not None
    assert turned.high == pytest.approx(-found.low)


def test_pairing_makes_the_interval_narrow() -> None:
    """Models that differ in few rows are told apart, though each score alone is unsure."""
    scored, score = model(1.0, 1)
    p = scored.outputs["p"].copy()
    p[:10] += 0.01
    close = Scored(rows=scored.rows, labels=scored.labels, outputs={"p": p})
    other = compare(PIPELINE, (scored, score), (close, by_pairs(close.labels, p)))
    apart = compare(PIPELINE, (scored, score), model(1.0, 2))
    assert None not in (other.low, other.high, apart.low, apart.high)
    assert 10 * (other.high - other.low) < apart.high - apart.low  # type: ignore[operator]


def test_equal_outputs_give_an_interval_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("every difference is zero: nothing needs to be drawn")

    monkeypatch.setattr(bootstrap, "_draws", refuse)
    found = compare(PIPELINE, model(1.0, 1), model(1.0, 1))
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    assert str(found) == ("95 % confidence interval [+0.0000, +0.0000] from 1,000 paired resamples")


def test_without_a_function_of_its_own_metrics_are_called_for_fewer_resamples() -> None:
    first, second = model(1.0, 1, 60), model(1.5, 2, 60)
    slow = compare(replace(PIPELINE, resampled=None), first, second)
    fast = compare(PIPELINE, first, second)
    assert slow.resamples == SLOW_RESAMPLES
    assert None not in (slow.low, slow.high, fast.low, fast.high)
    assert slow.low == pytest.approx(fast.low, abs=0.1)
    assert slow.high == pytest.approx(fast.high, abs=0.1)


def with_one_label(ones: int) -> list[Scored]:
    labels = np.zeros(20, dtype=np.int64)
    labels[:ones] = 1
    scores = np.linspace(0.9, 0.1, 20)
    return [
        Scored(rows=pa.table({"x": labels}), labels=labels, outputs={"p": p})
        for p in (scores, scores[::-1].copy())
    ]


@pytest.mark.parametrize("own", [True, False])
def test_resamples_without_a_score_are_counted(own: bool) -> None:
    """With a single 1 among the rows, about a third of the resamples have none."""
    first, second = with_one_label(1)
    pipeline = PIPELINE if own else replace(PIPELINE, resampled=None)
    found = compare(pipeline, (first, 1.0), (second, 0.0))
    assert 0.25 < found.skipped / found.resamples < 0.45
    assert (found.low, found.high) == (1.0, 1.0)
    assert f"paired resamples, {found.skipped} of them without a score" in str(found)


def test_where_most_resamples_have_no_score_there_is_no_interval() -> None:
    first, second = with_one_label(0)
    pipeline = replace(PIPELINE, resampled=None, metrics=lambda scored: {})
    found = compare(pipeline, (first, 0.5), (second, 0.5))
    assert (found.low, found.high, found.skipped) == (None, None, SLOW_RESAMPLES)
    assert str(found).startswith("no confidence interval, from 200 paired resamples, 200 of them")


@pytest.mark.parametrize(("first_row", "known"), [((1,), False), ((0, 1), True)])
def test_half_of_the_resamples_must_have_a_score(first_row: tuple[int, ...], known: bool) -> None:
    """A row is drawn once in 37 % of all resamples, and once or never in 74 %."""

    def resampled(scored: Scored) -> Resampled:
        return lambda counts: 0.5 if counts[0] in first_row else math.nan

    first, second = with_one_label(1)
    pipeline = replace(PIPELINE, resampled=resampled)
    found = compare(pipeline, (first, 0.5), (second, 0.5))
    assert (found.low is not None) is known
    assert 0 < found.skipped < found.resamples


def test_a_function_that_is_another_metric_is_refused() -> None:
    pipeline: Pipeline = replace(PIPELINE, resampled=lambda scored: lambda counts: 0.25)
    with pytest.raises(ContractError, match=r"'roc_auc'; with every row drawn once it gives 0\.25"):
        compare(pipeline, model(1.0, 1), model(1.5, 2))


def slowly(metric: Any, scored: Scored, counts: npt.NDArray[np.int64]) -> float:
    return float(metric(take_rows(scored, np.repeat(np.arange(len(counts)), counts))))


@pytest.mark.parametrize("seed", range(3))
def test_resampled_metrics_agree_with_those_of_the_drawn_rows(seed: int) -> None:
    from sklearn.metrics import accuracy_score, roc_auc_score

    generator = np.random.default_rng(seed)
    counts = np.bincount(generator.integers(0, ROWS, ROWS), minlength=ROWS)
    scored, _ = model(1.0, seed)
    auc: Resampled = resampled_roc_auc("p")(scored)
    wanted = slowly(lambda s: roc_auc_score(s.labels, s.outputs["p"]), scored, counts)
    assert auc(counts) == pytest.approx(wanted, rel=1e-12)
    chances = generator.random((ROWS, 4))
    many = Scored(rows=scored.rows, labels=generator.integers(0, 4, ROWS), outputs={"p": chances})
    right = resampled_accuracy("p")(many)
    wanted = slowly(lambda s: accuracy_score(s.labels, s.outputs["p"].argmax(1)), many, counts)
    assert right(counts) == pytest.approx(wanted, rel=1e-12)


def test_a_function_that_raises_is_the_users_to_mend() -> None:
    """A champion may have outputs of other names."""
    first, score = model(0.5, 1)
    other = replace(first, outputs={"q": first.outputs["p"]})
    with pytest.raises(ContractError, match="resampled of pipeline 'digits' .* outputs q; .*'p'"):
        compare(PIPELINE, (first, score), (other, score))


def test_a_resample_that_divides_by_nothing_has_no_score() -> None:
    def metrics(scored: Scored) -> dict[str, float]:
        return {"roc_auc": 1 / int(scored.labels.sum())}

    first, second = with_one_label(2)
    pipeline = replace(PIPELINE, metrics=metrics, resampled=None)
    assert compare(pipeline, (first, 0.5), (second, 0.5)).skipped > 0
