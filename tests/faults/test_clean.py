"""No false alarm: correct models, however awkward, pass."""

import pytest
import torch
from faults.architectures import ARCHITECTURES, Architecture
from faults.clean import CLEAN, Clean, count_tensors

from components.validate.gradient_report import Verdict
from components.validate.gradients import verify_gradients

# The most awkward ones. benchmarks/gradients.py goes through all of them at three seeds.
SAMPLE = (
    "resnet18",
    "convnext_layer_scale",
    "packed_lstm",
    "temporal_convnet",
    "top_k_experts",
    "lora_attention",
    "embedding_bags",
    "spectral_norm",
    "kinks",
    "in_place",
    "hard_float32",
    "fourier_operator",
    "rezero",
    "pretrained",
    "gumbel_hard",
    "checkpoint_reentrant",
    "vector_quantised",
    "contrastive_towers",
    "graph_network",
    "meta_learning",
)


@pytest.mark.parametrize("case", [c for c in CLEAN if c.name in SAMPLE], ids=lambda c: c.name)
def test_a_clean_model_passes(case: Clean) -> None:
    torch.manual_seed(0)
    report = verify_gradients(case.build(), case.loss, case.batches(0), waivers=case.waivers)
    bad = [check for check in report.checks if not check.passed]
    assert report.passed, (report.reason, bad)


@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda c: c.name)
def test_an_architecture_is_clean_and_small(case: Architecture) -> None:
    torch.manual_seed(1)
    model = case.build()
    assert 10 <= len(list(model.parameters())) <= 40
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000
    report = verify_gradients(model, case.loss, case.batches(1), seed=1)
    assert report.passed, report.reason
    assert {tensor.verdict for tensor in report.tensors} == {Verdict.PASS}


def test_there_are_enough_of_them() -> None:
    names = [case.name for case in CLEAN]
    assert len(set(names)) == len(names) >= 40
    assert set(SAMPLE) <= set(names)
    assert count_tensors() >= 1_000
    assert len({case.name for case in ARCHITECTURES}) >= 8


def test_batches_follow_the_seed() -> None:
    for case in (*CLEAN, *ARCHITECTURES):
        one, two, other = (str(case.batches(seed)) for seed in (5, 5, 6))
        assert one == two != other
