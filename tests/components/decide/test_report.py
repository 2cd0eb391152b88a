"""The decision as a page that Prefect and MLflow show."""

import numpy as np
import pyarrow as pa

from components.decide.promotion import Contender, Judgement
from components.decide.report import decision_markdown
from components.pipeline import Scored
from components.pipelines.digits import pipeline

SCORED = Scored(rows=pa.table({}), labels=np.zeros(0, np.int64), outputs={})
CANDIDATE = Contender(5, {"accuracy": 0.98765, "log_loss": 0.125, "accuracy/digit/3": 0.5}, SCORED)
CHAMPION = Contender(3, {"accuracy": 0.9, "log_loss": 0.25, "accuracy/digit/3": 0.75}, SCORED)


def test_both_contenders_stand_side_by_side() -> None:
    judgement = Judgement("promoted", "Version 5 is better.")
    assert decision_markdown(pipeline, CANDIDATE, CHAMPION, judgement).splitlines() == [
        "# digits: promoted",
        "",
        "Version 5 is better.",
        "",
        "| metric | candidate 5 | champion 3 |",
        "| --- | ---: | ---: |",
        "| accuracy | 0.9877 | 0.9000 |",
        "| log_loss | 0.1250 | 0.2500 |",
    ]


def test_without_a_champion_there_is_one_column() -> None:
    text = decision_markdown(pipeline, CANDIDATE, None, Judgement("promoted", "First."))
    assert "| metric | candidate 5 |\n| --- | ---: |\n| accuracy | 0.9877 |\n" in text
    assert "champion" not in text


def test_the_champion_itself_is_shown_once() -> None:
    same = Contender(5, {"accuracy": 0.5}, SCORED)
    text = decision_markdown(pipeline, CANDIDATE, same, Judgement("kept_champion", "Same."))
    assert "champion 5" not in text
    assert text.startswith("# digits: kept_champion\n\nSame.\n")


def test_a_metric_that_the_champion_lacks_is_left_empty() -> None:
    old = Contender(3, {"accuracy": 0.9}, SCORED)
    text = decision_markdown(pipeline, CANDIDATE, old, Judgement("promoted", "Better."))
    assert "| log_loss | 0.1250 |  |" in text


def test_every_row_has_the_same_number_of_cells() -> None:
    text = decision_markdown(pipeline, CANDIDATE, CHAMPION, Judgement("promoted", "Better."))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {4}
    assert len(rows) == 4, "slices stay in MLflow"
