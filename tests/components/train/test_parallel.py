"""Two real processes that train one model over gloo, on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_lab import PIPELINE, change, fit, make_rows, make_table, plain, snapshot_of
from torch import nn

Results = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def results(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of the two found."""
    folder = tmp_path_factory.mktemp("together")
    snapshot = snapshot_of(make_table(200), folder / "snapshots", PIPELINE)
    path = os.pathsep.join([str(checkout), str(checkout / "tests")])
    script = checkout / "tests" / "support" / "gloo_training.py"
    here = [folder / "meet", folder, folder / "snapshots", snapshot.fingerprint]
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), *map(str, here)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    one, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    return one, other


@pytest.mark.parametrize("kind", ["even", "weighted"])
def test_the_summed_gradient_is_that_of_the_whole_batch(results: Results, kind: str) -> None:
    weight = torch.tensor([0.5, 1.0, 3.0]) if kind == "weighted" else None
    inputs, labels = (tensor[:17] for tensor in make_rows())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plain()
    value = nn.functional.cross_entropy(model(inputs), labels, weight=weight)
    value.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for found_value, found in (result[kind] for result in results):
        assert found_value == pytest.approx(value.item(), rel=1e-6)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-7)
    assert results[0][kind] == results[1][kind]


def test_a_parameter_has_a_gradient_if_any_process_has_one(results: Results) -> None:
    for result in results:
        assert result["only one"] == [[2.0, 4.0], [6.0, 8.0]], "summed twice, for two flags"
        assert result["nobody"] is None


def test_a_flag_of_one_is_seen_by_all(results: Results) -> None:
    assert [result["flags"] for result in results] == [[True, False]] * 2


def test_tensors_are_shared_and_gathered(results: Results) -> None:
    for result in results:
        assert result["shared"] == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        assert result["gathered"] == [5, 6]


@pytest.mark.parametrize(("kind", "shards"), [("plain", 2), ("four shards", 4)])
def test_two_processes_train_as_one_does(results: Results, kind: str, shards: int) -> None:
    alone = fit(make_rows(), change(shards=shards), plain)
    for result in results:
        for name, tensor in alone.state.items():
            found = torch.tensor(result[kind]["state"][name])
            torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-6)
        for epoch, told in zip(alone.history, result[kind]["history"], strict=True):
            assert told == pytest.approx(epoch.model_dump(), rel=1e-5)


@pytest.mark.parametrize(
    "kind", ["plain", "first", "four shards", "pieces", "float16", "float16 pieces", "run"]
)
def test_both_processes_end_with_the_same_bytes_and_buffers(results: Results, kind: str) -> None:
    one, other = (result[kind] for result in results)
    assert one["sha256"] == other["sha256"]
    assert one["history"] == other["history"]


def test_two_runs_give_the_same_bytes(results: Results) -> None:
    for result in results:
        assert result["first"] == result["second"]


@pytest.mark.parametrize(("whole", "pieces"), [("first", "pieces"), ("float16", "float16 pieces")])
def test_pieces_come_to_the_bytes_and_losses_of_the_whole(
    results: Results, whole: str, pieces: str
) -> None:
    for result in results:
        assert result[pieces]["pieces"] >= 2
        assert result[pieces]["resumed"]
        assert result[pieces]["sha256"] == result[whole]["sha256"]
        assert result[pieces]["history"] == result[whole]["history"]


def test_a_checkpoint_that_one_process_wants_is_written_once(results: Results) -> None:
    assert [result["saved"] for result in results] == [5, 0], "four steps, and the end"


def test_processes_that_see_different_checkpoints_do_not_train_on(results: Results) -> None:
    for result in results:
        assert "must go on from the same checkpoint" in result["apart"]
        assert "(2, 0), (1, 0)" in result["apart"]
        assert "ASSAY_CHECKPOINT_ROOT" in result["apart"]


def test_every_process_has_dropout_of_its_own(results: Results) -> None:
    one, other = (result["drawn"] for result in results)
    assert len(one) == len(other) > 3
    assert not set(one) & set(other)
    seeds = [seed for result in results for seed in result["seeds"]]
    assert len(set(seeds)) == 2, "seeds that differ above 32 bits only are the same to the CPU"


def test_a_loss_that_is_not_finite_ends_both(results: Results) -> None:
    for result in results:
        assert "epoch 1, step 1 of 4" in result["not finite"]
