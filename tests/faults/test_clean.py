"""No false alarm: correct models, however awkward, pass."""

import pytest
import torch
from faults.architectures import ARCHITECTURES, Architecture
from faults.clean import CLEAN, count_tensors

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Verdict

# The most awkward ones, each with a seed at which it once was hard to judge.
# benchmarks/gradients.py goes through all models at three seeds.
SAMPLE = {
    "resnet18": 0,
    "convnext_layer_scale": 2,
    "packed_lstm": 0,
    "temporal_convnet": 2,
    "masked_encoder": 0,
    "top_k_experts": 1,
    "lora_attention": 0,
    "embedding_bags": 0,
    "spectral_norm": 0,
    "kinks": 0,
    "in_place": 5,
    "hard_float32": 0,
    "fourier_operator": 0,
    "rezero": 0,
    "pretrained": 0,
    "gumbel_hard": 0,
    "checkpoint_reentrant": 0,
    "vector_quantised": 0,
    "contrastive_towers": 0,
    "cox_survival": 1,
    "triplet": 1,
    "graph_network": 0,
    "meta_learning": 0,
    "very_deep": 0,
    "token_mean": 0,
    "dense_graph": 0,
    "one_set": 0,
    "batch_statistics": 0,
    "stochastic_depth": 0,
    "hooked": 0,
    "stateful_gru": 0,
    "warm_start": 0,
    "nested_batch": 0,
}
BY_NAME = {case.name: case for case in CLEAN}


@pytest.mark.parametrize(("name", "seed"), SAMPLE.items())
def test_a_clean_model_passes(name: str, seed: int) -> None:
    case = BY_NAME[name]
    torch.manual_seed(seed)
    batches = case.batches(seed)
    report = verify_gradients(case.build(), case.loss, batches, seed=seed, waivers=case.waivers)
    bad = [check for check in report.checks if not check.passed]
    assert report.passed, (report.reason, bad)


@pytest.mark.parametrize("name", [case.name for case in CLEAN if case.waivers])
def test_what_is_declared_would_be_found(name: str) -> None:
    case = BY_NAME[name]
    torch.manual_seed(0)
    undeclared = verify_gradients(case.build(), case.loss, case.batches(0))
    assert not undeclared.passed


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
    assert len(BY_NAME) == len(CLEAN) >= 40
    assert set(SAMPLE) <= set(BY_NAME)
    assert count_tensors() >= 1_000
    assert len({case.name for case in ARCHITECTURES}) >= 8


def test_batches_follow_the_seed() -> None:
    for case in (*CLEAN[::4], *ARCHITECTURES):
        one, two, other = (str(case.batches(seed)) for seed in (5, 5, 6))
        assert one == two != other
