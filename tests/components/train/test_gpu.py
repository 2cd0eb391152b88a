"""Training on a CUDA device; skipped, and said so, where there is none."""

import pytest
import torch
from torch import nn

from components.train.config import TrainConfig
from components.train.engine import reproducible, train_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(512, 12, generator=generator)
    return inputs, (inputs.sum(dim=1) > 0).long()


def _train(device: str):
    config = TrainConfig(epochs=3, batch_size=64, device=device, require_gpu=device == "cuda")
    inputs, labels = _rows()
    with reproducible(config):
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 2))
        return train_model(model, nn.functional.cross_entropy, [inputs], labels, config)


def test_two_runs_on_the_gpu_give_the_same_bytes():
    first, second = _train("cuda"), _train("cuda")
    assert first.device.startswith("cuda")
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)


def test_the_gpu_follows_the_cpu():
    on_gpu, on_cpu = _train("cuda"), _train("cpu")
    for left, right in zip(on_gpu.history, on_cpu.history, strict=True):
        assert left.validation_loss == pytest.approx(right.validation_loss, rel=1e-3)


def test_gradients_agree_per_tensor():
    inputs, labels = _rows()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 2))
    gradients = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        logits = model(inputs.to(device))
        nn.functional.cross_entropy(logits, labels.to(device)).backward()
        gradients.append({name: p.grad.cpu().clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
