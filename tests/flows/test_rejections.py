"""Pipelines that a gate rejects: named, recorded, and nowhere near the registry."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("detached", ["gradients", "2 of 4 tensors fail", "(Detached) is at fault"]),
        ("bypassing", ["contract", "'first'"]),
        ("poor", ["quality", "accuracy must be at least 1.01"]),
    ],
)
def test_gate_says_no(
    lab: Any, command: Callable[..., Any], name: str, words: list[str], tmp_path: Path
) -> None:
    outcome = command("run", name, "--json")
    assert outcome.code == 3, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    summary = outcome.json
    assert len(outcome.out.splitlines()) == 1
    assert (summary["decision"], summary["version"], summary["champion"]) == (
        "rejected",
        None,
        None,
    )
    assert summary["onnx_sha256"] is None
    assert list(summary["stages"]) == ["train", "validate"]
    assert summary["reason"].startswith("validate: ")
    for word in words:
        assert word in summary["reason"]
    assert lab.versions(name) == {}
    assert lab.aliases(name) == {}
    (run,) = lab.runs(name)
    assert run.info.run_id == summary["mlflow_run_id"]
    assert run.info.status == "FAILED"
    assert run.data.tags["assay.decision"] == "rejected"
    for word in words:
        assert word in run.data.tags["assay.reason"]
    kept = {item.path for item in lab.client.list_artifacts(run.info.run_id, "validate")}
    reports = ("contract", "gradient", "gates", "leakage", "source")
    pictures = ("gradients", "curves", "loss")
    assert kept == {
        "validate/report.md",
        *(f"validate/{report}_report.json" for report in reports),
        *(f"validate/{picture}.png" for picture in pictures),
    }
    page = Path(
        lab.client.download_artifacts(run.info.run_id, "validate/report.md", str(tmp_path))
    ).read_text()
    assert re.match(rf"# {name}: rejected by validate\n\n\d failures?:\n\n- {words[0]}: ", page)
    assert all(f"({picture}.png)" in page for picture in pictures)


def test_report_names_the_tensors_without_a_gradient(
    lab: Any, command: Callable[..., Any], tmp_path: Path
) -> None:
    run_id = command("run", "detached", "--json").json["mlflow_run_id"]
    report = lab.client.download_artifacts(run_id, "validate/gradient_report.json", str(tmp_path))
    tensors = json.loads(Path(report).read_text())["tensors"]
    failed = [tensor["name"] for tensor in tensors if tensor["verdict"] == "FAIL"]
    assert failed == ["first.weight", "first.bias"]


def test_rejection_is_read_by_people_too(lab: Any, command: Callable[..., Any]) -> None:
    outcome = command("run", "poor")
    assert outcome.code == 3
    assert "poor: rejected" in outcome.out
    assert "accuracy must be at least 1.01" in outcome.out


def test_rejected_candidate_is_judged_again_and_leaves_other_models_alone(
    lab: Any, command: Callable[..., Any]
) -> None:
    first, second = (command("run", "poor", "--json") for _ in range(2))
    assert (first.code, second.code) == (3, 3)
    assert second.json["stages"]["train"]["cached"] is True
    assert second.json["stages"]["validate"]["cached"] is False
    assert all(run.info.status == "FAILED" for run in lab.runs("poor"))
    good = command("run", "tiny", "--json")
    assert good.code == 0, good.err
    assert good.json["decision"] in ("promoted", "kept_champion")
