"""What a verification costs: forwards and backwards on clean models, and memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Verdict

WIDTH, CLASSES, ROWS = 8, 3, 4


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # The bias before a batch norm shows in eval mode only.
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm_one, self.norm_two = (nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norm_one(self.one(x)))
        return functional.relu(x + self.norm_two(self.two(hidden)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(dim=1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def residual_net() -> nn.Module:
    stem = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(*stem, Residual(4), Residual(4), nn.Flatten(), nn.Linear(144, CLASSES))


def zero_initialised() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(WIDTH, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, CLASSES)
    )
    nn.init.zeros_(model[4].weight)
    return model


def relu_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (residual_net, (1, 6, 6)),
    "transformer": (Encoder, (5, WIDTH)),
    "lstm": (Recurrent, (5, WIDTH)),
    "zero-initialised": (zero_initialised, (WIDTH,)),
    "relu mlp": (relu_mlp, (WIDTH,)),
}


def batches(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(ROWS, *shape, generator=generator),
            torch.randint(CLASSES, (ROWS,), generator=generator),
        )
        for _ in range(3)
    ]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", MODELS)
def test_two_forwards_per_tensor_and_ten(name: str, seed: int) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(seed)
    model, calls = build(), 0

    def counted(copied: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return functional.cross_entropy(copied(batch[0]), batch[1])

    report = verify_gradients(model, counted, batches(shape), seed=seed)
    assert report.passed, report.reason
    assert {t.verdict for t in report.tensors} == {Verdict.PASS}
    assert report.forwards == calls <= 2 * len(report.tensors) + 10
    assert report.backwards <= 12


def test_hooks_and_an_optimizer_fit_into_the_budget() -> None:
    torch.manual_seed(0)
    model = Encoder()
    model.head.weight.register_hook(lambda gradient: gradient)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = verify_gradients(model, entropy, batches((5, WIDTH)), optimizer=optimizer)
    assert report.passed, report.reason
    assert report.forwards <= 2 * len(report.tensors) + 10


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


_CHILD = """
import json, sys
import torch
from torch import nn
from components.validate.gradients import verify_gradients

def memory(kind):
    for line in open("/proc/self/status"):
        if line.startswith(kind):
            return int(line.split()[1]) * 1024

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

def built(width, depth):
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(width, 3))

def data(width):
    return [(torch.randn(4, width), torch.randint(3, (4,))) for _ in range(3)]

torch.set_num_threads(1)
torch.manual_seed(0)
verify_gradients(built(8, 2), loss, data(8))
width, depth = int(sys.argv[1]), int(sys.argv[2])
model = built(width, depth)
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = memory("VmRSS")
report = verify_gradients(model, loss, data(width))
size = 8 * sum(p.numel() for p in model.parameters())
times = (memory("VmHWM") - before) / size
print(json.dumps({"passed": report.passed, "times": times, "size": size}))
"""


def measured(width: int, depth: int) -> Any:
    """Growth of the peak memory of a child process, in multiples of the float64 model."""
    command = [sys.executable, "-c", _CHILD, str(width), str(depth)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_at_most_four_times_the_float64_model() -> None:
    found = measured(400, 14)
    assert found["passed"]
    assert found["size"] > 17e6
    assert 1.0 < found["times"] <= 4.0
