"""The flow in this process, on small pipelines: candidate against champion."""

import re
from collections.abc import Callable
from typing import Any


def test_better_candidate_is_promoted_and_worse_one_is_kept_out(lab: Any) -> None:
    first = lab.retrain("rivals", "learning_rate=0.02", "epochs=1")
    assert (first.decision, first.champion, first.champion_score) == ("promoted", 1, None)

    better = lab.retrain("rivals")
    assert (better.decision, better.champion) == ("promoted", 2)
    assert better.candidate_score > better.champion_score == first.candidate_score
    assert lab.aliases("rivals") == {"champion": 2}

    worse = lab.retrain("rivals", "learning_rate=0.01", "epochs=1")
    assert (worse.decision, worse.champion) == ("kept_champion", 2)
    assert worse.champion_score == better.candidate_score > worse.candidate_score
    assert lab.aliases("rivals") == {"champion": 2}
    tags = lab.versions("rivals")[3]
    assert tags["decision"] == "kept_champion"
    assert tags["reason"] == worse.reason
    scores = re.findall(r"\d\.\d{4}\b", worse.reason)
    assert re.search(
        r"confidence interval \[-0\.\d{4}, -0\.\d{4}\] from 1,000 paired", worse.reason
    )
    assert [f"{worse.candidate_score:.4f}", f"{worse.champion_score:.4f}"] == scores[:2]
    run = lab.client.get_run(worse.tested.registered.exported.validated.trained.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["assay.decision"] == "kept_champion"


def test_seed_and_settings_make_a_new_version(lab: Any) -> None:
    def run(*settings: str, **parameters: Any) -> tuple[int, str]:
        registered = lab.retrain("tiny", *settings, **parameters).tested.registered
        return registered.version, registered.exported.onnx.sha256

    first = run()
    assert run() == first
    seeded, longer = run(seed=1), run("epochs=3")
    assert len({first, seeded, longer}) == 3
    assert len({version for version, _ in (first, seeded, longer)}) == 3
    assert {first[0], seeded[0], longer[0]} <= set(lab.versions("tiny"))


def test_force_trains_anew_and_gives_the_same_version(
    lab: Any, command: Callable[..., Any]
) -> None:
    first, cached = (command("run", "again", "--json").json for _ in range(2))
    forced = command("run", "again", "--json", "--force").json
    for name in ("train", "validate", "export"):
        assert cached["stages"][name] == {"seconds": 0.0, "cached": True}
        assert forced["stages"][name]["cached"] is False
    assert cached["mlflow_run_id"] == first["mlflow_run_id"] != forced["mlflow_run_id"]
    assert (first["decision"], forced["decision"]) == ("promoted", "kept_champion")
    for name in ("version", "champion", "onnx_sha256", "metrics"):
        assert forced[name] == cached[name] == first[name]
    assert list(lab.versions("again")) == [1]
    assert lab.aliases("again") == {"champion": 1}
    statuses = {run.info.run_id: run.info.status for run in lab.runs("again")}
    assert statuses == {run["mlflow_run_id"]: "FINISHED" for run in (first, forced)}


def test_settings_and_seed_of_the_command_reach_training(
    lab: Any, command: Callable[..., Any]
) -> None:
    arguments = ("--set", "epochs=3", "--set", "learning_rate=0.02", "--seed", "5")
    summary = command("run", "again", "--json", *arguments).json
    params = lab.client.get_run(summary["mlflow_run_id"]).data.params
    assert (params["epochs"], params["learning_rate"], params["seed"]) == ("3", "0.02", "5")
    tags = lab.versions("again")[summary["version"]]
    assert tags["seed"] == "5"


def test_summary_for_people(lab: Any, command: Callable[..., Any]) -> None:
    command("run", "tiny")
    outcome = command("run", "tiny")
    assert outcome.code == 0
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert lines["champion"].startswith("version ")
    assert "train cached, validate cached, export cached" in lines["stages"]
    assert "--force" in lines["cached"]
    assert "accuracy 0." in lines["metrics"]
    assert {"model", "reason", "mlflow", "prefect", "state"} <= set(lines)
    assert lines["state"] == str(lab.home)
