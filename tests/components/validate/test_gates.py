"""A gate passes only on a finite value within its bounds."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from components.pipeline import QualityGate
from components.validate.gates import check_gates
from components.validate.gates.report import GatesReport

ACCURACY = QualityGate(metric="accuracy", minimum=0.9)
ERROR = QualityGate(metric="calibration_error", maximum=0.05)
RATE = QualityGate(metric="positive_rate", minimum=0.1, maximum=0.3)
GOOD = {"accuracy": 0.95, "calibration_error": 0.01, "positive_rate": 0.2}


def test_all_within_bounds() -> None:
    report = check_gates([ACCURACY, ERROR, RATE], GOOD)
    assert report.passed
    assert report.failures == ()
    assert [r.metric for r in report.results] == ["accuracy", "calibration_error", "positive_rate"]
    assert report.results[0].sentence == "accuracy must be at least 0.9; got 0.95."
    assert report.results[0].minimum == 0.9
    assert report.results[0].maximum is None


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        (ACCURACY, 0.9, True),
        (ACCURACY, math.nextafter(0.9, 0), False),
        (ERROR, 0.05, True),
        (ERROR, math.nextafter(0.05, 1), False),
        (RATE, 0.1, True),
        (RATE, 0.3, True),
        (RATE, 0.09, False),
        (RATE, 0.31, False),
    ],
)
def test_bounds_are_inclusive(gate: QualityGate, value: float, passed: bool) -> None:
    report = check_gates([gate], {gate.metric: value})
    assert report.passed is passed
    assert report.results[0].value == value


def test_every_failure_is_collected() -> None:
    report = check_gates(
        [ACCURACY, ERROR, RATE], {"accuracy": 0.5, "calibration_error": 0.2, "positive_rate": 0.2}
    )
    assert not report.passed
    assert report.failures == (
        "accuracy must be at least 0.9; got 0.5, which fails.",
        "calibration_error must be at most 0.05; got 0.2, which fails.",
    )
    assert [r.passed for r in report.results] == [False, False, True]


def test_a_near_miss_is_not_rounded_away() -> None:
    value = math.nextafter(0.9, 0)
    assert repr(value) in check_gates([ACCURACY], {"accuracy": value}).failures[0]


def test_missing_metric_fails() -> None:
    report = check_gates([ACCURACY], {"accuracy_top1": 0.99})
    assert report.results[0].value is None
    assert report.failures == (
        (
            "accuracy must be at least 0.9; it was not measured. "
            "The pipeline's metrics are: accuracy_top1."
        ),
    )
    assert "metrics are: none" in check_gates([ACCURACY], {}).failures[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gate", [ACCURACY, ERROR, RATE])
def test_not_finite_fails(gate: QualityGate, value: float) -> None:
    report = check_gates([gate], {gate.metric: value})
    assert not report.passed
    assert report.results[0].value is None
    assert repr(value) in report.failures[0]


def test_nan_bound_refuses() -> None:
    assert not check_gates([QualityGate(metric="accuracy", minimum=math.nan)], GOOD).passed


def test_no_gates_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one gate"):
        check_gates([], GOOD)


def test_report_is_frozen_json() -> None:
    report = check_gates([ACCURACY, ERROR], {"accuracy": np.float64(0.95), "x": math.nan})
    assert GatesReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError):
        report.passed = False
