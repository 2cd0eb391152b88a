"""Correct models raise no alarm, whatever awkward but legitimate things they do."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from components.validate.gradients import verify_gradients
from components.validate.gradients.report import Verdict

ROWS, CLASSES, WORDS, WIDTH = 4, 3, 20, 8


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # The biases before a batch norm have a gradient that is zero but for rounding.
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.two(functional.relu(self.norm(self.one(x)), inplace=True)))


class Words(nn.Module):
    """Embeds words, mixes them with `body` and scores the mean; padding is word 0."""

    def __init__(self, body: nn.Module, out: int = WIDTH, **table: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH, **table)
        self.body = body
        self.head = nn.Linear(out, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.body(self.table(x))
        states = mixed[0] if isinstance(mixed, tuple) else mixed
        return self.head(states.mean(dim=1))


class TiedWords(nn.Module):
    """A next-word model whose decoder is its embedding, plus an own-storage double of the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.Linear(WIDTH, WORDS, bias=False)
        self.decoder.weight = self.table.weight
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.shift_again = nn.Parameter(self.shift.data)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.table(x)) + self.shift)
        return self.decoder(hidden * self.shift_again).mean(dim=1)[:, :CLASSES]


class LowRank(nn.Module):
    """An adapter whose second factor starts at zero, so that the first has no gradient yet."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, CLASSES, bias=False)
        nn.init.zeros_(self.up.weight)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.base(x))) + self.up(self.down(x))


class Spectrum(nn.Module):
    """A complex filter on the spectrum of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=WIDTH))


class Halving(nn.Module):
    """Scales its input in place, which must not reach the batch that is used again."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


class KeyedAttention(nn.Module):
    """Hand-made attention: the key bias shifts all scores alike, so its true gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return torch.softmax(scores, dim=-1) @ self.v(x)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        Residual(4),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def transformer(activation: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 16, dropout=0.1, activation=activation, batch_first=True
    )
    return Words(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), padding_idx=0)


def layered(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), *middle, nn.Linear(16, CLASSES))


def constant_start() -> nn.Module:
    model = layered(nn.ReLU())
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    return model


def lstm() -> nn.Module:
    body = nn.LSTM(WIDTH, 6, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)
    return Words(body, out=12, sparse=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp gelu": (lambda: layered(nn.GELU()), "rows"),
    "relu": (lambda: layered(nn.ReLU(inplace=True)), "rows"),
    "dropout": (lambda: layered(nn.Dropout(0.5), nn.LayerNorm(16)), "rows"),
    "leading in-place": (lambda: nn.Sequential(Halving(), layered()), "rows"),
    "zero-initialised relu": (constant_start, "rows"),
    "low-rank adapter": (LowRank, "rows"),
    "complex": (Spectrum, "rows"),
    "weight norm": (
        lambda: layered(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))),
        "rows",
    ),
    "conv": (convolutional, "images"),
    "lstm, sparse table": (lstm, "words"),
    "gru": (lambda: Words(nn.GRU(WIDTH, WIDTH, batch_first=True)), "words"),
    "transformer relu": (lambda: transformer("relu"), "words"),
    "transformer gelu": (lambda: transformer("gelu"), "words"),
    "attention key bias": (lambda: Words(KeyedAttention()), "words"),
    "tied": (TiedWords, "words"),
}


def batches_of(kind: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: torch.randn(ROWS, WIDTH, generator=generator),
        "images": lambda: torch.randn(ROWS, 1, 8, 8, generator=generator),
        "words": lambda: torch.randint(0, WORDS, (ROWS, 5), generator=generator),
    }
    labels = [torch.randint(0, CLASSES, (ROWS,), generator=generator) for _ in range(3)]
    return [(inputs[kind](), label) for label in labels]


def entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_clean_model_raises_no_alarm(name: str, seed: int) -> None:
    build, kind = MODELS[name]
    torch.manual_seed(seed)
    report = verify_gradients(build(), entropy, batches_of(kind, seed), seed=seed)
    alarms = [t for t in report.tensors if t.verdict is not Verdict.PASS]
    assert not alarms
    assert report.passed, report.reason
    assert report.culprit is None


def test_modes_are_both_examined_only_where_they_differ() -> None:
    torch.manual_seed(0)
    both = verify_gradients(layered(nn.Dropout(0.5)), entropy, batches_of("rows", 0))
    one = verify_gradients(layered(nn.GELU()), entropy, batches_of("rows", 0))
    assert (both.modes, one.modes) == (("train", "eval"), ("train",))


def test_tied_tensors_are_verified_once() -> None:
    torch.manual_seed(0)
    report = verify_gradients(TiedWords(), entropy, batches_of("words", 0))
    aliases = {t.name: t.aliases for t in report.tensors}
    assert aliases["table.weight"] == ("decoder.weight",)
    assert aliases["shift"] == ("shift_again",)
    assert set(aliases) == {"table.weight", "shift", "body.weight", "body.bias"}


def test_a_trained_optimum_is_still_verified() -> None:
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1, bias=False).double()
    teacher = model.weight.detach().clone()
    inputs = [x.double() for x, _ in batches_of("rows", 0)]
    batches = [(x, x @ teacher.T) for x in inputs]

    def loss(fitted: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.mse_loss(fitted(batch[0]), batch[1])

    report = verify_gradients(model, loss, batches)
    assert report.passed, report.reason
    assert report.tensors[0].relative_error is not None
    assert report.tensors[0].relative_error < 1e-6


def test_a_wide_net_with_many_kinks_raises_no_alarm() -> None:
    torch.manual_seed(3)
    widths = [20, 512, 512, 512]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(512, CLASSES))
    batches = [(torch.randn(256, 20), torch.randint(0, CLASSES, (256,))) for _ in range(3)]
    assert verify_gradients(model, entropy, batches).passed


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_cancels_to_nothing_raises_no_alarm(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.BatchNorm1d(32, affine=False))

    def centred(fitted: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        # Batch norm makes the mean zero whatever the weights: only rounding is left.
        return fitted(batch[0]).mean() if fitted.training else fitted(batch[0]).pow(2).mean()

    assert verify_gradients(model, centred, batches_of("rows", seed), seed=seed).passed
