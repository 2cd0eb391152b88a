"""Small correct models of the usual kinds, into which faults are injected.

Each has 10 to 40 parameter tensors and fewer than 2,000 parameters, so that an exhaustive
gradient check of it is affordable. Losses are means over rows, which do not interact in eval mode.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS, CLASSES, WORDS, TOKENS = 4, 3, 12, 5


@dataclass(frozen=True)
class Architecture:
    """A model, three small batches for it, and the loss that it is trained with."""

    name: str
    build: Callable[[], nn.Module]  # uses torch's global random state: the caller seeds it
    batches: Callable[[int], list[Any]]  # seed -> three small batches
    loss: Callable[[nn.Module, Any], Tensor]  # calls the model; a mean over rows


class Mlp(nn.Module):
    """A classifier of table rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 12)])
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.hidden:
            x = self.drop(layer(x).relu())
        return self.head(x)


class ConvBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class ConvBatchNorm(nn.Module):
    """A classifier of small pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBlock(1, 4)
        self.stages = nn.Sequential(ConvBlock(4, 6, stride=2), nn.MaxPool2d(2), ConvBlock(6, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(functional.gelu(self.inner(self.norm(x))))


class Residual(nn.Module):
    """A regression by residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(ResidualBlock(8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Lstm(nn.Module):
    """A classifier of sentences by a bidirectional LSTM of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 5)
        self.recurrent = nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.recurrent(self.words(words))
        return self.head(self.norm(states.mean(1)))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        mixed = self.drop(scores.softmax(-1)) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.feedforward(self.norm2(x)))


class Transformer(nn.Module):
    """A classifier of sentences by two encoder blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.positions = nn.Parameter(0.1 * torch.randn(TOKENS, 8))
        self.blocks = nn.ModuleList(TransformerBlock(8, 2) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class TiedEmbedding(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.positions = nn.Embedding(TOKENS, 8)
        self.block = TransformerBlock(8, 2, causal=True)
        self.norm = nn.LayerNorm(8)
        self.output = nn.Linear(8, WORDS)
        self.output.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        x = self.words(words) + self.positions(places)
        return self.output(self.norm(self.block(x)))


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 10)
        self.outer = nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh())


class Mixture(nn.Module):
    """A mixture of experts, weighted by a softmax gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(Expert(8) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        shares = self.gate(x).softmax(-1)
        answers = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return self.head(x + (answers * shares.unsqueeze(-2)).sum(-1))


class UnetBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm = nn.GroupNorm(2, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.norm(self.conv(x)))


class Unet(nn.Module):
    """A segmentation with skips between resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = UnetBlock(1, 4)
        self.down2 = UnetBlock(4, 6)
        self.middle = UnetBlock(6, 6)
        self.rise = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.up = UnetBlock(8, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(functional.avg_pool2d(fine, 2))
        risen = self.rise(self.middle(coarse))
        return self.head(self.up(torch.cat([fine, risen], dim=1)))


class Seq2Seq(nn.Module):
    """A translation by GRUs with dot-product attention, fed the right words."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(WORDS, 6)
        self.target = nn.Embedding(WORDS, 6)
        self.encoder = nn.GRU(6, 7, batch_first=True)
        self.decoder = nn.GRU(6, 7, batch_first=True)
        self.mix = nn.Linear(14, 10)
        self.output = nn.Linear(10, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, last = self.encoder(self.source(source))
        states, _ = self.decoder(self.target(target), last)
        weights = (states @ memory.transpose(1, 2)).softmax(-1)
        return self.output(self.mix(torch.cat([states, weights @ memory], -1)).tanh())


class CrossAttention(nn.Module):
    """A regression from two sets of vectors by `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 8)
        self.right = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Linear(8, 12)
        self.head = nn.Linear(12, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        queries, memory = self.left(left), self.right(right)
        mixed, _ = self.attention(queries, memory, memory, need_weights=False)
        return self.head(functional.softplus(self.inner(self.norm(queries + mixed))).mean(1))


def three(make: Callable[[torch.Generator], Any]) -> Callable[[int], list[Any]]:
    """Three batches drawn one after the other from one seed."""

    def batches(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        return [make(generator) for _ in range(3)]

    return batches


def rows_and_classes(*shape: int) -> Callable[[int], list[Any]]:
    return three(
        lambda g: (
            torch.randn(ROWS, *shape, generator=g),
            torch.randint(CLASSES, (ROWS,), generator=g),
        )
    )


def sentences_and_classes(g: torch.Generator) -> dict[str, Tensor]:
    return {
        "words": torch.randint(WORDS, (ROWS, TOKENS), generator=g),
        "label": torch.randint(CLASSES, (ROWS,), generator=g),
    }


def classify(model: nn.Module, batch: Any) -> Tensor:
    x, label = batch
    return functional.cross_entropy(model(x), label)


def classify_words(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch["words"]), batch["label"])


def regress(model: nn.Module, batch: Any) -> Tensor:
    *inputs, target = batch
    return functional.mse_loss(model(*inputs), target)


def predict_words(model: nn.Module, words: Tensor) -> Tensor:
    logits = model(words[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


def translate(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["source"], batch["target"][:, :-1])
    return functional.cross_entropy(logits.transpose(1, 2), batch["target"][:, 1:])


def vectors(*shapes: tuple[int, ...]) -> Callable[[int], list[Any]]:
    return three(lambda g: tuple(torch.randn(ROWS, *shape, generator=g) for shape in shapes))


def pair_of_sentences(g: torch.Generator) -> dict[str, Tensor]:
    return {
        side: torch.randint(WORDS, (ROWS, TOKENS), generator=g) for side in ("source", "target")
    }


def segmented(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 1, 6, 6, generator=g), torch.randint(2, (ROWS, 6, 6), generator=g)


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("mlp", Mlp, rows_and_classes(6), classify),
    Architecture("conv_batchnorm", ConvBatchNorm, rows_and_classes(1, 8, 8), classify),
    Architecture("residual", Residual, vectors((6,), (2,)), regress),
    Architecture("lstm", Lstm, three(sentences_and_classes), classify_words),
    Architecture("transformer", Transformer, three(sentences_and_classes), classify_words),
    Architecture(
        "tied_embedding",
        TiedEmbedding,
        three(lambda g: torch.randint(WORDS, (ROWS, TOKENS + 1), generator=g)),
        predict_words,
    ),
    Architecture("mixture", Mixture, vectors((6,), (2,)), regress),
    Architecture("unet", Unet, three(segmented), classify),
    Architecture("seq2seq", Seq2Seq, three(pair_of_sentences), translate),
    Architecture("cross_attention", CrossAttention, vectors((TOKENS, 4), (6, 3), (1,)), regress),
)
