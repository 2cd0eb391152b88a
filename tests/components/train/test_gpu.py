"""Training on a CUDA device; skipped, and said so, where there is none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from support.training_lab import Stop, change, in_pieces, make_rows, network, order_of, plain
from torch import nn

from components.storage import Storage
from components.train import loop
from components.train.checkpoint import Checkpoints
from components.train.config import TrainConfig
from components.train.device import choose_device, reproducible
from components.train.feed import resident_feed
from components.train.loop import Reports, Trained, train_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

ROWS = make_rows(512)
CONFIG = change(batch_size=64, device="cuda", require_gpu=True)


def train(config: TrainConfig = CONFIG, build: object = plain, **more: object) -> Trained:
    with reproducible(config):
        device = choose_device(config)
        feed = resident_feed(ROWS, order_of(512, config), device, range(config.parts))
        return train_model(build(), nn.functional.cross_entropy, feed, config, **more)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_two_runs_on_the_gpu_give_the_same_bytes(precision: str) -> None:
    config = CONFIG.model_copy(update={"precision": precision})
    first, second = train(config, network), train(config, network)
    assert first.device.startswith("cuda")
    assert save(first.state) == save(second.state)
    assert first.history == second.history


def test_the_gpu_follows_the_cpu() -> None:
    on_cpu = train(CONFIG.model_copy(update={"device": "cpu", "require_gpu": False}))
    for left, right in zip(train().history, on_cpu.history, strict=True):
        assert left.validation_loss == pytest.approx(right.validation_loss, rel=1e-3)
        assert left.gradient_norm == pytest.approx(right.gradient_norm, rel=1e-2)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_pieces_come_to_the_bytes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(loop, "_LOOK_S", 0.0)
    config = CONFIG.model_copy(update={"precision": precision})

    def run(stop: Stop) -> Trained:
        kept = Checkpoints(Storage(tmp_path), "key", print)
        return train(config, network, checkpoints=kept, reports=Reports(stop=stop))

    trained, pieces = in_pieces(run, 0)
    assert pieces >= 2
    assert save(trained.state) == save(train(config, network).state)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_follows_the_plain_one(mode: str) -> None:
    compiled = train(CONFIG.model_copy(update={"compile": mode}))
    for left, right in zip(compiled.history, train().history, strict=True):
        assert left.validation_loss == pytest.approx(right.validation_loss, rel=1e-3)


def test_gradients_agree_per_tensor() -> None:
    inputs, labels = ROWS
    torch.manual_seed(0)
    model = plain()
    gradients = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        logits = model(inputs.to(device))
        nn.functional.cross_entropy(logits, labels.to(device)).backward()
        gradients.append({name: p.grad.cpu().clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
