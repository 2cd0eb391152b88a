"""Raw rows: text, missing and extreme values, an empty batch, wrong inputs; each check fires."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from support.smoke_models import raw_model, raw_recorded
from support.smoke_types import Recorded, Smoke

from components.smoke_test.judge import hardship
from components.smoke_test.judge.golden import Golden
from components.smoke_test.judge.session import Subject


@pytest.fixture
def raw(tmp_path: Path) -> Callable[..., Path]:
    """Write the raw model, sound or broken."""

    def write(broken: str = "", **options: Any) -> Path:
        path = tmp_path / "raw.onnx"
        path.write_bytes(raw_model(broken, **options))
        return path

    return write


def test_a_sound_model_of_raw_rows_passes(raw: Callable[..., Path], smoke: Smoke) -> None:
    report = smoke(raw(), raw_recorded(), batch_sizes=(1, 2, 7, 1024))
    assert report.golden_rows == 9
    assert report.max_difference < 1e-6
    assert report.not_tried == {}
    assert {"missing values", "extreme values", "empty batch", "wrong inputs"} < {*report.parts_ms}
    assert {"concurrency", "many calls", "throughput"} < {*report.parts_ms}


def test_rows_with_missing_values_are_recorded_and_answered(
    raw: Callable[..., Path], smoke: Smoke
) -> None:
    recorded = raw_recorded()
    wind, hour = recorded["input/wind"], recorded["input/hour"]
    code = 1 - 1  # of a carrier that is missing too
    recorded["input/carrier"][0], wind[0] = "", np.nan
    score = (code + 0.5 + hour[0] + recorded["input/wet"][0]) * 0.125 - 1
    recorded["output/probability"][0] = 1 / (1 + np.exp(-score))
    smoke(raw(columns=False), recorded)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("no imputation", "missing values: answers must be finite; NaN or infinite are "),
        ("no imputation", "'probability' with 'wind' missing"),
        ("no code for the unknown", "'probability' with 'carrier' missing"),
        ("no code for the unknown", "'carrier' at 'xxxxxxxxxx'... of 10000 characters"),
        ("no code for the unknown", "'carrier' at 'Ünbekannt "),
        ("no clamp", "extreme values: answers must be finite; NaN or infinite are "),
        ("no clamp", "'wind' at 1000000000.0; 'probability' with 'wind' at -1000000000.0"),
        ("no clamp of integers", "'hour' at 1000000000"),
        ("a row for none", "empty batch: 'probability' must have 0 rows for 0 rows; got shape (1,"),
    ],
)
def test_what_no_golden_row_holds(
    raw: Callable[..., Path], reject: Callable[..., str], broken: str, expected: str
) -> None:
    message = reject(raw(broken), raw_recorded(broken))
    assert expected in message
    assert "golden rows: " not in message


@pytest.mark.parametrize(
    "broken", ["no imputation", "no clamp of integers", "codes that are looked up"]
)
def test_a_network_is_not_asked_for_what_it_need_not_know(
    raw: Callable[..., Path], smoke: Smoke, broken: str
) -> None:
    smoke(raw(broken, columns=False), raw_recorded(broken))


def test_an_extreme_integer_may_be_refused(raw: Callable[..., Path], smoke: Smoke) -> None:
    smoke(raw("codes that are looked up"), raw_recorded())


def test_text_must_be_equal(raw: Callable[..., Path], reject: Callable[..., str]) -> None:
    recorded = raw_recorded()
    recorded["output/label"] = recorded["output/label"].copy()
    recorded["output/label"][2] = "perhaps"
    assert "'label' must equal the recorded values; 1 differ" in reject(raw(), recorded)


def test_text_in_the_place_of_numbers_is_another_signature(
    raw: Callable[..., Path], reject: Callable[..., str]
) -> None:
    recorded = raw_recorded()
    recorded["input/hour"] = recorded["input/hour"].astype(str)
    assert "'hour': 'tensor(string)'" in reject(raw(), recorded)


def test_network_that_overflows_far_away_is_not_refused(
    save_model: Callable[..., Path], smoke: Smoke, rows: Any
) -> None:
    square = helper.make_node("Mul", ["features", "features"], ["scores"])
    smoke(save_model([square], width=3), {"input/features": rows, "output/scores": rows**2})


def test_missing_number_of_a_tensor_is_where_one_was_recorded(
    save_model: Callable[..., Path], smoke: Smoke, reject: Callable[..., str], rows: Any
) -> None:
    nodes = [
        helper.make_node("IsNaN", ["features"], ["gone"]),
        helper.make_node("Where", ["gone", "means", "features"], ["scores"]),
    ]
    rows[0, 1] = np.nan
    scores = np.where(np.isnan(rows), np.float32(0.5), rows)
    recorded = {"input/features": rows, "output/scores": scores}
    means = np.full(3, 0.5, np.float32)
    smoke(save_model(nodes, constants={"means": means}, width=3), recorded)
    # One that imputes the first rows only, as a mask from training would.
    nodes = [
        helper.make_node("Shape", ["features"], ["shape"]),
        helper.make_node("Slice", ["features", "from", "to", "axis"], ["first"]),
        helper.make_node("IsNaN", ["features"], ["gone"]),
        helper.make_node("IsNaN", ["first"], ["gone_first"]),
        helper.make_node("And", ["gone", "gone_first"], ["some"]),
        helper.make_node("Where", ["some", "means", "features"], ["scores"]),
    ]
    constants = {"from": [1], "to": [2], "axis": [1]}
    arrays = {name: np.array(value) for name, value in constants.items()} | {"means": means}
    smoke(save_model(nodes, constants=arrays, width=3), recorded)
    rows[1, 2] = np.nan
    message = reject(save_model(nodes, constants=arrays, width=3), recorded)
    assert "'scores' must be finite" in message


class Accepting:
    """A session that answers whatever it is given."""

    def run(self, names: list[str], _feed: Any) -> list[Any]:
        return [np.zeros(3, np.float32) for _ in names]


def test_a_session_that_accepts_wrong_inputs(
    save_golden: Callable[[Recorded], Path],
) -> None:
    golden = Golden(save_golden(raw_recorded()))
    (fault,) = hardship.refusal_faults(Subject(Accepting(), golden))
    assert "must refuse wrong inputs; it answered with 'carrier' as float32" in fault
    assert "'carrier' under another name, 'carrier' left out" in fault
    assert "and others" in fault
    faults = hardship.empty_faults(Subject(Accepting(), golden))
    assert len(faults) == 2 and "got shape (3,)" in faults[0]


class Refusing:
    """A session that refuses everything."""

    def run(self, _names: list[str], _feed: Any) -> list[Any]:
        raise RuntimeError("no")


def test_an_empty_batch_may_be_refused(save_golden: Callable[[Recorded], Path]) -> None:
    subject = Subject(Refusing(), Golden(save_golden(raw_recorded())))
    assert hardship.empty_faults(subject) == []
    assert hardship.refusal_faults(subject) == []


RECURRENT = """
import resource, sys
import numpy as np, onnxruntime
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, {"features": np.zeros((0, 3), np.float32)})
"""


@pytest.mark.parametrize(("operator", "gates"), [("GRU", 3), ("LSTM", 4)])
def test_recurrent_layers_are_spared_the_empty_batch(
    save_model: Callable[..., Path],
    smoke: Smoke,
    rows: Any,
    operator: str,
    gates: int,
) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Unsqueeze", ["features", "axis"], ["steps"]),
        helper.make_node(operator, ["steps", "W", "R"], ["", "last"], hidden_size=2),
        helper.make_node("Squeeze", ["last", "axis"], ["scores"]),
    ]
    constants = {
        "axis": np.array([0]),
        "W": rng.normal(size=(1, gates * 2, 3)).astype(np.float32),
        "R": rng.normal(size=(1, gates * 2, 2)).astype(np.float32),
    }
    model = save_model(nodes, constants=constants)
    scores = ReferenceEvaluator(str(model)).run(None, {"features": rows})[0]
    report = smoke(model, {"input/features": rows, "output/scores": scores}, atol=1e-5)
    assert report.not_tried == {"empty batch": f"onnxruntime aborts on {operator}"}
    # The day that this one ends well, the exemption has no reason any more.
    command = [sys.executable, "-c", RECURRENT, str(model)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGABRT
