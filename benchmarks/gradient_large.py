"""Seconds and peak memory of a detector on a transformer of five million parameters."""

import gc
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from faults.campaign import Detector, Subject
from torch import Tensor, nn
from torch.nn import functional

WORDS, WIDTH, LAYERS, TOKENS, ROWS, THREADS = 1_000, 256, 6, 16, 2, 2


class Large(NamedTuple):
    """What one detector took; memory above what the process held before, in bytes."""

    detector: str
    elements: int
    tensors: int
    alarm: bool
    reason: str
    forwards: int
    backwards: int
    seconds: float
    memory: int

    @property
    def ratio(self) -> float:
        """Peak memory over that of the model in float64."""
        return self.memory / (8 * self.elements)


class Encoder(nn.Module):
    """A language model of six encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, batch_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, words: Tensor) -> Tensor:
        """Scores (rows, 10) of words (rows, tokens)."""
        x = self.words(words)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, the mean over rows."""
    words, label = batch
    return functional.cross_entropy(model(words), label)


def measure(name: str, detector: Detector) -> Large:
    """Run a detector on the large model in a process of its own."""
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(name, detector, sending))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    finally:
        process.join()


def _run(name: str, judge: Detector, sending: Any) -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    small = nn.Sequential(nn.Embedding(WORDS, 8), nn.Flatten(), nn.Linear(8 * TOKENS, 10))
    judge(Subject(small, loss, _batches()))  # whatever is imported on the way is not counted
    model = Encoder()
    subject = Subject(model, loss, _batches())
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: proc(5)
    started = time.perf_counter()
    answer = judge(subject)
    assert answer is not None
    seconds = time.perf_counter() - started
    sending.send(
        Large(
            name,
            sum(p.numel() for p in model.parameters()),
            len(list(model.parameters())),
            answer.alarm,
            answer.reason,
            answer.forwards,
            answer.backwards,
            seconds,
            _status("VmHWM") - before,
        )
    )


def _batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(WORDS, (ROWS, TOKENS)), torch.randint(10, (ROWS,))) for _ in range(3)]


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
