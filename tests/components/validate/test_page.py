"""The report page: verdict and failures first, pictures that can be read, nothing too large."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.gate_lab import PIPELINE, Candidate, Detached, Entangled, World

from components.pipeline import Scored
from components.validate import page as pages
from components.validate.contract_report import Check, ContractReport
from components.validate.gates.report import Slice, SliceResult
from components.validate.gradients.report import Cause, GradientReport, TensorCheck, Verdict
from components.validate.page import make_page
from components.validate.page_plots import (
    MOST_TENSORS,
    Losses,
    class_probabilities,
    draw_curves,
    draw_gradients,
    draw_losses,
    draw_slices,
)
from components.validate.run import Evidence
from components.validate.source import SourceReport

LOSSES = Losses({1: 0.7, 2: 0.5}, {1: 0.8, 2: 0.6})
PICTURES = ["gradients.png", "curves.png", "slices.png", "loss.png"]
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return Candidate().evidence(tmp_path_factory.mktemp("rows"))


def test_a_page_of_what_passed(good: Evidence) -> None:
    page = make_page(PIPELINE, good, LOSSES)
    text = page.beside_files()
    assert text.startswith("# lab: validated\n\nEvery gate passed.\n\n## Gates\n")
    assert list(page.pictures) == PICTURES
    assert re.findall(r"!\[[^\]]+\]\((.*?)\)", text) == PICTURES
    assert all(picture.startswith(PNG) for picture in page.pictures.values())
    assert "failed" not in text and "{{" not in text
    for row in (
        r"\| contract \| passed \| (\d+) of \1 checks hold \| all \|",
        r"\| gradients \| passed \| 3 of 3 tensors, .* \| all \|",
        r"\| source \| passed \| 0 findings \| none \|",
        r"\| roc_auc \| passed \| 0\.\d{4} \| at least 0\.65 \|",
        r"\| log_loss \| passed \| 0\.\d{4} \| at most 0\.75 \|",
        r"\| roc_auc by group \| passed \| 0 failures, 2 of 2 slices judged \| at least 0\.6 \|",
        r"\| accuracy against a constant \| passed \| 0\.\d{4} against 0\.\d{4}, 95 % .*",
        r"\| best single feature \| passed \| signal: ROC-AUC 0\.\d{4} \| below 0\.99 \|",
        r"\| identical rows in both splits \| passed \| 0 rows \(0\.00%\) \| at most 1\.00% \|",
        r"\| keys in both splits \| passed \| 0 rows \(0\.00%\) \| at most 0\.00% \|",
        r"\| signal \| passed \| 0\.\d{4} \|  \|",
        r"- `validate/gates_report\.json`",
    ):
        assert re.search(row, text), row
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {4, 5}  # cells that escape a bar would widen a row


def test_the_page_for_prefect_holds_its_pictures(good: Evidence) -> None:
    page = make_page(PIPELINE, good, LOSSES)
    text = page.embedded()
    assert len(text) < 400_000
    found = re.findall(r"\(data:image/png;base64,(.*?)\)", text)
    assert [base64.b64decode(picture) for picture in found] == list(page.pictures.values())


def test_pictures_that_do_not_fit_are_named(
    good: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "EMBEDDED_BYTES", 60_000)
    text = make_page(PIPELINE, good, LOSSES).embedded()
    assert len(text) <= 60_000
    assert text.count("data:image/png") < 4
    assert len(re.findall(r"!\[[^\]]+\]\([a-z]+\.png\)", text)) >= 1


def test_every_failure_stands_at_the_top(tmp_path: Path) -> None:
    alarms = replace(PIPELINE.leakage, single_feature_auc=0.7)
    spoiled = replace(PIPELINE, leakage=alarms)
    evidence = Candidate(Detached, slope=5.0, world=World(repeated=9), pipeline=spoiled).evidence(
        tmp_path
    )
    failures = evidence.failures()
    assert len(failures) == 4
    text = make_page(spoiled, evidence, LOSSES).beside_files()
    head = text.split("## Gates")[0]
    assert head.startswith("# lab: rejected by validate\n\n4 failures:\n\n- gradients: ")
    listed = [line for line in head.splitlines() if line.startswith("- ")]
    assert [line[2:].split(":")[0] for line in listed] == [f.split(":")[0] for f in failures]
    for row in ("calibration_error", "gradients", "best single feature", "identical rows"):
        assert re.search(rf"\| {row}.*?\| \*\*failed\*\* \|", text), row
    assert re.search(r"\| signal \| \*\*failed\*\* \| 0\.\d{4} \|  \|", text)


def test_a_page_where_hardly_anything_could_be_measured(tmp_path: Path, good: Evidence) -> None:
    """No outputs to score, gradients that raise, rows that cannot be looked at, no history."""
    bare = replace(
        good,
        gradients=None,
        gates=None,
        leakage=None,
        scored=None,
        metrics={},
        trouble=("gradients: forward must run; it raised <lambda> | a_b*c*",),
        contract=ContractReport(
            passed=False,
            checks=(Check(name="outputs", passed=False, detail="x | y", culprit=None),),
            failures=("x | y",),
            culprit=None,
        ),
    )
    page = make_page(PIPELINE, bare, Losses({}, {}))
    assert page.pictures == {}
    text = page.embedded()
    assert "2 failures:" in text
    assert "&lt;lambda> \\| a_b\\*c\\*" in text
    assert "| outputs | **failed** | x \\| y |" in text
    for section in ("Gradients", "ROC", "Slices", "Loss", "Leakage", "Source"):
        assert f"## {section}" not in text


def test_findings_of_the_source_are_listed(good: Evidence) -> None:
    from components.validate.source import SourceFinding

    finding = SourceFinding(rule="B307", file="a.py", line=3, code="eval(x)", sentence="a.py:3: no")
    source = SourceReport(passed=False, findings=(finding,), files=("a.py",), suppressed=0)
    text = make_page(PIPELINE, replace(good, source=source), LOSSES).beside_files()
    assert "## Source\n\n- a.py:3: no\n" in text
    assert "| source | **failed** | 1 findings | none |" in text


def test_gradients_of_an_entangled_model_are_drawn(tmp_path: Path) -> None:
    evidence = Candidate(Entangled).evidence(tmp_path)
    assert not evidence.contract.passed
    assert "gradients.png" in make_page(PIPELINE, evidence, LOSSES).pictures


def report(count: int, **changes: Any) -> GradientReport:
    """Many tensors that pass, and one of another kind."""
    given = {"verdict": Verdict.FAIL, "cause": Cause.MISMATCH, "relative_error": 0.5, **changes}
    tensors = [
        TensorCheck(
            name=f"layer{number}.weight",
            module=f"layer{number}",
            verdict=Verdict.PASS,
            cause=Cause.NONE,
            relative_error=0.0,
            tolerance=1e-6,
            step=1e-5,
        )
        for number in range(count)
    ]
    tensors[count // 2] = tensors[0].model_copy(update={"name": "odd.weight", **given})
    return GradientReport.model_construct(passed=False, tensors=tuple(tensors), reason="")


def size(picture: bytes | None) -> tuple[int, int]:
    from matplotlib.image import imread

    assert picture is not None and picture.startswith(PNG)
    high, wide = imread(io.BytesIO(picture)).shape[:2]
    return wide, high


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"relative_error": None, "tolerance": None, "verdict": Verdict.UNVERIFIABLE},
        {"relative_error": 1e30},
        {"verdict": Verdict.WAIVED, "tolerance": None},
    ],
)
def test_gradients_of_every_verdict_are_drawn(changes: dict[str, Any]) -> None:
    assert size(draw_gradients(report(3, **changes)))[0] == 640


def test_of_many_tensors_the_worst_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from components.validate.page_plots import _worst

    shown = [tensor.name for tensor in _worst(report(500).tensors)]
    assert len(shown) == MOST_TENSORS
    assert "odd.weight" in shown
    assert size(draw_gradients(report(500)))[1] < 1000


def probabilities(classes: int, rows: int = 60) -> Scored:
    generator = np.random.default_rng(0)
    raw = generator.random((rows, classes))
    labels = generator.integers(0, classes, rows)
    outputs = {"codes": labels, "p": (raw / raw.sum(1, keepdims=True)).astype(np.float32)}
    return Scored(rows=pa.table({}), labels=labels, outputs=outputs)


@pytest.mark.parametrize("classes", [2, 5, 30])
def test_curves_of_few_and_many_classes(classes: int) -> None:
    assert size(draw_curves(probabilities(classes), classes)) == (720, 336)


def test_without_probabilities_there_are_no_curves() -> None:
    scored = probabilities(3)
    assert draw_curves(scored, 4) is None
    broken = replace(scored, outputs={"p": np.full((60, 3), np.nan)})
    assert draw_curves(broken, 3) is None
    one = replace(scored, outputs={"p": np.array([0.25, 1.0], np.float32)})
    found = class_probabilities(one, 2)
    assert found is not None and found.tolist() == [[0.75, 0.25], [0.0, 1.0]]


def test_many_slices_and_those_without_a_score() -> None:
    slices = [Slice(value=str(n), rows=9, score=n / 99, passed=n > 9, note="") for n in range(99)]
    slices[50] = Slice(value="odd", rows=3, score=None, passed=None, note="fewer than 9 rows")
    slices[51] = Slice(value="nan", rows=30, score=None, passed=False, note="it is nan")
    result = SliceResult(
        metric="auc",
        column="place",
        minimum=0.1,
        maximum=None,
        min_rows=9,
        slices=tuple(slices),
        passed=False,
        failures=(),
        sentence="",
    )
    assert size(draw_slices([result]))[1] < 700
    assert draw_slices([result.model_copy(update={"slices": ()})]) is None


def test_losses_may_be_unknown() -> None:
    assert draw_losses(Losses({}, {})) is None
    assert size(draw_losses(LOSSES)) == (480, 256)


def test_dollars_in_a_value_are_no_formula() -> None:
    one = Slice(value="$\\oops$", rows=9, score=0.5, passed=True, note="")
    bare = Slice(value="$", rows=9, score=None, passed=False, note="KeyError: '$\\x$'")
    result = SliceResult(
        metric="auc",
        column="$\\price$",
        minimum=0.1,
        maximum=None,
        min_rows=9,
        slices=(one, bare),
        passed=False,
        failures=(),
        sentence="",
    )
    assert size(draw_slices([result]))
