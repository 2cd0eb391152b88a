"""The floor of a step: its bytes and operations against hand counts, and what a device can do."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

B, F, H, C = 8, 5, 7, 3


@pytest.fixture(scope="module")
def floor() -> Iterator[Any]:
    """The module, which belongs to no package."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "floor.py"
    spec = importlib.util.spec_from_file_location("benchmark_floor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_perceptron_is_counted_as_by_hand(floor: Any) -> None:
    model = nn.Sequential(nn.Linear(F, H), nn.ReLU(), nn.Linear(H, C))
    work = floor.count_step(
        model, nn.functional.cross_entropy, [torch.randn(B, F)], torch.zeros(B, dtype=torch.long)
    )
    size = F * H + H + H * C + C
    assert work.parameters == 2 * 4 * size
    assert work.gradients == 4 * size
    assert work.optimizer == 7 * 4 * size
    assert work.inputs == 4 * B * F + 8 * B
    assert work.activations == 5 * 4 * (B * H + B * H + B * C)
    # Forward once, backward once for each layer's weights, and once to the input of the second.
    assert work.operations == 2 * B * (2 * F * H + 3 * H * C)
    assert work.traffic == 4 * (10 * size + B * F + 5 * B * (2 * H + C)) + 8 * B
    assert all(parameter.grad is None for parameter in model.parameters())


def test_embeddings_are_not_read_whole_and_frozen_weights_not_updated(floor: Any) -> None:
    table, head = nn.Embedding(1000, 4), nn.Linear(4, 1)
    head.weight.requires_grad_(False)
    model = nn.Sequential(table, head)
    work = floor.count_step(
        model,
        lambda logits, labels: (logits.squeeze(1) - labels).square().mean(),
        [torch.zeros(B, dtype=torch.long)],
        torch.zeros(B),
    )
    assert work.parameters == 2 * 4 * 5
    assert work.gradients == 4 * (4000 + 1)
    assert work.optimizer == 7 * work.gradients


def test_the_greater_floor_counts(floor: Any) -> None:
    work = floor.Work(10, 10, 10, 10, 10, operations=600)
    slow_memory = floor.step_floor(work, floor.Capability(bandwidth=5.0, throughput=100.0))
    assert (slow_memory.traffic, slow_memory.arithmetic, slow_memory.seconds) == (10.0, 6.0, 10.0)
    slow_cores = floor.step_floor(work, floor.Capability(bandwidth=50.0, throughput=100.0))
    assert slow_cores.seconds == 6.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_is_measured(floor: Any, dtype: torch.dtype) -> None:
    able = floor.measure_device(torch.device("cpu"), dtype, quick=True)
    assert 1e8 < able.bandwidth < 1e13
    assert 1e7 < able.throughput < 1e14


@pytest.mark.gpu
def test_a_gpu_is_measured(floor: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    able = floor.measure_device(torch.device("cuda"), quick=True)
    assert able.bandwidth > 1e9
    assert able.throughput > 1e9
