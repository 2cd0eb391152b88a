"""What a target names, which rows it gets, and what is said when there are none."""

import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from support import broken_components as given
from torch import nn

from components.data.encoding import Features
from components.errors import ConfigError, ContractError
from components.pipeline import load_pipeline
from components.validate.component import ComponentReport, verify_component
from components.validate.component_load import load_component
from components.validate.component_rows import examples_of, synthetic_encoding
from components.validate.gradients.report import Verdict

HERE = "support.broken_components"


def test_a_report_is_frozen_json() -> None:
    report = verify_component(f"{HERE}:Right")
    assert report.passed
    assert report.culprit is None
    assert ComponentReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError, match="must follow from the three reports"):
        ComponentReport.model_validate({**report.model_dump(), "passed": False})
    with pytest.raises(ValidationError):
        report.passed = False


@pytest.mark.parametrize("name", ["Right", "build", "instance"])
def test_kinds_of_targets(name: str) -> None:
    component = load_component(f"{HERE}:{name}")
    assert component.pipeline is None
    assert component.modules[0] == HERE
    first, second = component.build(), component.build()
    assert isinstance(first, given.Right)
    assert (first is second) == component.shared == (name == "instance")


def test_a_pipeline_is_found_by_itself_and_by_the_class_that_it_trains() -> None:
    for name in ("pipeline", "Encoded"):
        component = load_component(f"{HERE}:{name}")
        assert component.pipeline is given.pipeline
        report = verify_component(f"{HERE}:{name}")
        assert report.passed, report
        assert report.gradients is not None
        verdicts = {t.name: t.verdict for t in report.gradients.tensors}
        assert {n for n, v in verdicts.items() if v is Verdict.WAIVED} == {
            "first.weight",
            "first.bias",
        }


@pytest.mark.parametrize("name", ["digits", "flights"])
def test_registered_pipelines_pass(name: str) -> None:
    report = verify_component(name)
    assert report.passed, report
    assert report.target == name
    assert report.source.files


def test_a_pipeline_that_does_not_fit_its_model() -> None:
    report = verify_component(f"{HERE}:unfit")
    assert not report.passed
    assert report.contract is not None
    assert "nothing.*" in report.contract.failures[0]
    assert report.gradients is None


def test_a_plain_module_lacks_members_but_its_gradients_are_verified() -> None:
    report = verify_component(f"{HERE}:Plain")
    assert not report.passed
    assert report.contract is not None
    conformance = report.contract.checks[0]
    assert "got a Plain" in conformance.detail
    assert "missing: get_model_metadata, predict" in conformance.detail
    assert report.gradients is not None
    assert report.gradients.passed
    report = verify_component(f"{HERE}:PlainDetached")
    assert report.gradients is not None
    assert not report.gradients.passed


def test_without_example_inputs() -> None:
    report = verify_component(f"{HERE}:Silent")
    assert report.contract is not None
    assert "missing: forward, get_model_metadata, predict" in report.contract.failures[0]
    assert report.gradients is None
    assert "Define example_inputs(rows)" in report.trouble[0]


def test_example_inputs_that_are_none() -> None:
    report = verify_component(f"{HERE}:WrongExamples")
    assert "example_inputs(8) must return a tuple of tensors with 8 rows" in report.trouble[0]


def test_example_inputs_come_before_the_metadata() -> None:
    report = verify_component(f"{HERE}:Fed")
    assert report.passed, report
    model = given.Fed()
    examples = examples_of(model, None)
    assert examples is not None
    torch.manual_seed(0)
    assert int(examples(50)[0].max()) == 2  # metadata alone would give 0 and 1


def test_rows_of_an_encoding() -> None:
    encoding = synthetic_encoding(
        Features(label="y", classes=2, categorical=("c",), numeric=("n",), tensors={"t": (1, 2)})
    )
    assert [spec.name for spec in encoding.specs()] == ["categorical", "numeric", "t"]
    quantiles = encoding.numeric[0].quantiles
    assert list(quantiles) == sorted(set(quantiles))
    examples = examples_of(nn.Linear(1, 1), load_pipeline("flights"))
    assert examples is not None
    codes, numbers = examples(40)
    assert (codes.shape, codes.dtype) == ((40, 7), torch.int64)
    assert (int(codes.min()), int(codes.max())) == (0, 4)
    assert numbers.dtype == torch.float32
    assert examples_of(nn.Linear(1, 1), None) is None


def test_random_state_and_threads_are_left_alone() -> None:
    before = torch.get_rng_state()
    first = verify_component(f"{HERE}:Right")
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again = verify_component(f"{HERE}:Right")
    assert first.gradients is not None
    assert again.gradients is not None
    assert first.gradients.tensors == again.gradients.tensors


def test_network_at_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "calling_home.py").write_text(
        "import socket\n"
        "from support.broken_components import Right\n"
        "class Own(Right): pass\n"
        "try: socket.create_connection(('127.0.0.1', 9))\n"
        "except OSError: pass\n"
    )
    (tmp_path / "insisting.py").write_text("import socket\nsocket.gethostbyname('host.invalid')\n")
    report = verify_component("calling_home:Own")
    assert next((f.rule, f.file, f.line) for f in report.source.findings) == (
        "network",
        "calling_home.py",
        4,
    )
    assert not report.passed
    with pytest.raises(ConfigError, match=r"insisting\.py:2"):
        verify_component("insisting:Own")
    for name in ("calling_home", "insisting"):
        sys.modules.pop(name, None)


def test_refused_classes_are_verdicts() -> None:
    component = load_component(f"{HERE}:Incomplete")
    with pytest.raises(ContractError, match="missing: get_model_metadata, predict"):
        component.build()
    report = verify_component(f"{HERE}:Incomplete")
    assert not report.passed
    assert report.culprit == ""


def test_waivers_of_a_class_without_a_pipeline() -> None:
    declared = verify_component(f"{HERE}:Frozen")
    assert declared.passed
    assert declared.gradients is not None
    assert [t.name for t in declared.gradients.tensors if t.verdict is Verdict.WAIVED] == [
        "first.weight",
        "first.bias",
    ]
    undeclared = verify_component(f"{HERE}:Undeclared")
    assert not undeclared.passed
    assert undeclared.culprit == "first"
    wrong = verify_component(f"{HERE}:Misdeclared")
    assert not wrong.passed
    assert wrong.contract is not None
    assert "Misdeclared.waivers must be a tuple of Waiver" in wrong.contract.failures[0]
