"""The flow in this process, on small pipelines: candidate against champion."""

import re
from typing import Any


def test_better_candidate_is_promoted_and_worse_one_is_kept_out(lab: Any) -> None:
    weak = ("learning_rate=1e-6", "epochs=1")
    first = lab.retrain("rivals", *weak)
    assert (first.decision, first.champion, first.champion_score) == ("promoted", 1, None)

    better = lab.retrain("rivals")
    assert (better.decision, better.champion) == ("promoted", 2)
    assert better.candidate_score > better.champion_score == first.candidate_score
    assert lab.aliases("rivals") == {"champion": 2}

    worse = lab.retrain("rivals", *weak, seed=1)
    assert (worse.decision, worse.champion) == ("kept_champion", 2)
    assert worse.champion_score == better.candidate_score > worse.candidate_score
    assert lab.aliases("rivals") == {"champion": 2}
    tags = lab.versions("rivals")[3]
    assert tags["decision"] == "kept_champion"
    assert tags["reason"] == worse.reason
    scores = re.findall(r"\d\.\d{4}\b", worse.reason)
    assert [f"{worse.candidate_score:.4f}", f"{worse.champion_score:.4f}"] == scores[:2]
    run = lab.client.get_run(worse.tested.registered.exported.validated.trained.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["assay.decision"] == "kept_champion"


def test_seed_and_settings_make_a_new_version_and_force_does_not(lab: Any) -> None:
    def run(*settings: str, **parameters: Any) -> tuple[int, str]:
        registered = lab.retrain("tiny", *settings, **parameters).tested.registered
        return registered.version, registered.exported.onnx.sha256

    first = run()
    assert run() == first
    assert run(force=True) == first
    seeded, longer = run(seed=1), run("epochs=3")
    assert len({first, seeded, longer}) == 3
    assert len({version for version, _ in (first, seeded, longer)}) == 3
    assert set(lab.versions("tiny")) == {1, 2, 3}
