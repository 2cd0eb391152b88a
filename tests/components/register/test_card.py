"""The model card: every section that there is evidence for, and nothing that is not known."""

from dataclasses import replace

import pytest
from support.column_model import METADATA
from support.records import exported_model

from components.adapters.mlflow_registry import cut
from components.bootstrap import Interval
from components.export.parity import Case, ParityReport
from components.records import Artifact, VariantModel
from components.register.card import Facts, model_card
from components.validate.contract_report import Check, ContractReport
from components.validate.gates.report import (
    BaselineResult,
    GateResult,
    GatesReport,
    Slice,
    SliceResult,
)
from components.validate.gradients.report import GradientReport


@pytest.fixture
def facts() -> Facts:
    slices = (
        Slice(value="a|b", rows=900, score=0.8, passed=True, note=""),
        Slice(value="few", rows=3, score=None, passed=None, note="too few rows"),
    )
    case = {"batch": 7, "optimisation": "all", "scale": 1.0}
    return Facts(
        exported=exported_model("flights", "run", "ab" * 32),
        metadata=METADATA,
        contract=ContractReport(
            passed=True,
            checks=(Check(name="finite", passed=True, detail="finite"),),
            failures=(),
            culprit=None,
        ),
        gradients=GradientReport(
            passed=True,
            tensors=(),
            culprit=None,
            reason="",
            checks=(),
            modes=(),
            forwards=1,
            backwards=1,
            seconds=1,
        ),
        gates=GatesReport(
            passed=True,
            results=(
                GateResult(
                    metric="accuracy",
                    value=0.9,
                    minimum=0.8,
                    maximum=None,
                    passed=True,
                    sentence="",
                ),
            ),
            slices=(
                SliceResult(
                    metric="accuracy",
                    column="carrier",
                    minimum=0.5,
                    maximum=None,
                    min_rows=10,
                    slices=slices,
                    passed=True,
                    failures=(),
                    sentence="",
                ),
            ),
            baseline=BaselineResult(
                metric="accuracy",
                value=0.9,
                baseline=0.5,
                interval=Interval(
                    difference=0.4,
                    low=0.3,
                    high=0.5,
                    level=0.95,
                    resamples=10,
                    skipped=0,
                    rows=355,
                ),
                passed=True,
                sentence="",
            ),
            failures=(),
        ),
        parity=ParityReport(
            passed=True,
            failures=(),
            cases=(
                Case(case="real", output="score", error=1e-7, allowed=1e-6, **case),
                Case(case="zeros", output="score", error=5e-7, allowed=6e-7, **case),
            ),
        ),
        plots=("loss.png",),
        parent="flights/3",
        flow_run="http://ui/runs/flow-run/f",
    )


@pytest.mark.parametrize(
    "text",
    [
        "# flights\n\na rule with columns.",
        'load_model("models:/flights@champion")',
        "model.predict(rows)  # a DataFrame",
        "On 355 held-out rows.",
        "| accuracy | 0.9000 | 0.8500 to 0.9500 |",
        "| log_loss | 0.2000 |  |",
        "- It has seen nothing outside of: train a, hold out b.",
        "- 7 rows were left out of training and measurement: cancelled.",
        "- Too few rows to judge it by carrier: few.",
        '- Missing text is `""`.',
        "- A missing number is NaN.",
        "- rows: train 1,442, holdout 355",
        "- fingerprint: `data`",
        "| distance | input | float64 | batch | miles |",
        "Classes, in the order of the outputs: on time, late.",
        "| accuracy | 0.9000 | at least 0.8 | passed |",
        "| accuracy against a constant | 0.9000 against 0.5000 | above 0 | passed |",
        "| carrier | a\\|b | 900 | accuracy | 0.8000 |",
        "- Contract: 1 of 1 checks hold.",
        "- Gradients: 0 of 0 tensors",
        "2 comparisons.",
        "`score`: the error nearest to its bound is 5.0e-07 of 6.0e-07 allowed (zeros, batch 7)",
        "| epochs | 2 |",
        "- champion before: flights/3",
        "- Prefect flow run: http://ui/runs/flow-run/f",
        "- source revision: `abc+changes`, digest `code`",
        "- sha256 of model.onnx: `" + "ab" * 32,
        "![loss.png](plots/loss.png)",
    ],
)
def test_the_card_says(facts: Facts, text: str) -> None:
    assert text in model_card(facts)


def test_what_there_is_none_of_is_left_out(facts: Facts) -> None:
    card = model_card(replace(facts, plots=(), parent=""))
    assert "## Plots" not in card
    assert "## Variants" not in card
    assert "accuracy/digit/1" not in card, "metrics of slices are many"
    assert "champion before: none" in card


def test_variants_are_compared_with_the_main_file(facts: Facts) -> None:
    variant = VariantModel(
        kind="fp16",
        onnx=Artifact(uri="", sha256="", size=4096),
        difference=1e-3,
        metric_difference=-0.002,
        p50_ms=0.01234,
    )
    exported = facts.exported.model_copy(update={"variants": (variant,)})
    card = model_card(replace(facts, exported=exported))
    assert "| fp16 | 4 KiB | 1.0e-03 | -0.0020 | 0.012 ms |" in card


def test_a_card_without_columns_speaks_of_arrays(facts: Facts) -> None:
    specs = tuple(spec.model_copy(update={"shape": ("batch", 2)}) for spec in METADATA.inputs)
    card = model_card(replace(facts, metadata=METADATA.model_copy(update={"inputs": specs})))
    assert "model.predict(inputs)  # arrays by input name" in card
    assert "missing number" not in card


def test_a_long_card_is_cut_before_a_heading(facts: Facts) -> None:
    card = model_card(facts)
    assert cut(card, len(card)) == card
    short = cut(card, 1200)
    assert len(short) <= 1200
    kept, _, note = short.rpartition("\n\n*")
    assert card.startswith(kept + "\n\n## ")
    assert note.startswith("The whole card is the file model_card.md")
    assert len(cut("x" * 9000, 5000)) == 5000
