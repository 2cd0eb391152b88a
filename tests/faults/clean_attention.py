"""Clean models built on attention."""

import math
from typing import Any

import torch
from faults.clean_case import (
    ROWS,
    Clean,
    classify,
    next_word,
    regress,
    three,
    vectors,
    waive,
    words,
)
from torch import Tensor, nn
from torch.nn import functional

WIDTH, COUNT, LENGTH = 8, 10, 5


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, T, D) by angles in a fixed float32 table."""
    half = x.shape[-1] // 2
    speed = 100.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * speed
    even, odd = x[..., :half], x[..., half:]
    return torch.cat(
        [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1
    )


class RotaryBlock(nn.Module):
    """RMS norms, grouped queries, rotary positions, a gated feed-forward: a small LLaMA."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key, self.value = nn.Linear(WIDTH, 4, bias=False), nn.Linear(WIDTH, 4, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 12, bias=False), nn.Linear(WIDTH, 12, bias=False)
        self.down = nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query = rotate(self.query(y).unflatten(-1, (2, 4)).transpose(1, 2))
        key = rotate(self.key(y).unflatten(-1, (1, 4)).transpose(1, 2))
        value = self.value(y).unflatten(-1, (1, 4)).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(COUNT, WIDTH)
        self.blocks = nn.ModuleList(RotaryBlock() for _ in range(3))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, sentence: Tensor) -> Tensor:
        x = self.words(sentence)
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.words.weight)


class MaskedEncoder(nn.Module):
    """Padded sentences through torch's encoder, and a mean over the words that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(COUNT, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, sentence: Tensor) -> Tensor:
        missing = sentence == 0
        states = self.encoder(self.words(sentence), src_key_padding_mask=missing)
        known = (~missing).unsqueeze(-1)
        return self.head((states * known).sum(1) / known.sum(1))


class Translator(nn.Module):
    """torch's encoder and decoder layers in their time-first layout, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(COUNT, WIDTH), nn.Embedding(COUNT, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 10, dropout=0.1)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 2, 10, dropout=0.1, activation="gelu")
        self.out = nn.Linear(WIDTH, COUNT)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        memory = self.encoder(self.source(source).transpose(0, 1))
        states = self.decoder(self.target(target).transpose(0, 1), memory, tgt_mask=mask)
        return self.out(states.transpose(0, 1))


class Distances(nn.Module):
    """Scaled-dot-product attention under a learnt additive mask of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.1]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        place = torch.arange(x.shape[1], device=x.device)
        distance = (place[:, None] - place).abs()
        mask = -self.slopes[:, None, None] * distance
        for mix in self.mixes:
            query, key, value = (
                part.unflatten(-1, (2, -1)).transpose(1, 2) for part in mix(x).chunk(3, -1)
            )
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=0.1 if self.training else 0.0
            )
            x = x + mixed.transpose(1, 2).flatten(2)
        return self.leave(x.mean(1))


class Perceiver(nn.Module):
    """Latent vectors read a set through `nn.MultiheadAttention` with its own key sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(0.3 * torch.randn(3, WIDTH))
        self.read = nn.MultiheadAttention(
            WIDTH, 2, kdim=4, vdim=4, add_bias_kv=True, batch_first=True
        )
        self.think = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1)
        latents = self.norm1(latents + self.read(latents, x, x)[0])
        latents = self.norm2(latents + self.think(latents, latents, latents)[0])
        return self.head(latents.mean(1))


class LinearAttention(nn.Module):
    """Kernel features in place of the softmax, summed along time (Katharopoulos 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(COUNT, WIDTH)
        self.query, self.key = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, COUNT)

    def forward(self, sentence: Tensor) -> Tensor:
        x = self.words(sentence)
        query, key = functional.elu(self.query(x)) + 1, functional.elu(self.key(x)) + 1
        memory = (key.unsqueeze(-1) * self.value(x).unsqueeze(-2)).cumsum(1)
        weight = (query * key.cumsum(1)).sum(-1, keepdim=True)
        return self.out(x + (query.unsqueeze(-2) @ memory).squeeze(-2) / weight)


class TopKExperts(nn.Module):
    """Each row goes to the two experts with the highest scores (Shazeer 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 5, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)) for _ in range(5)
        )
        self.everyone = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate(x).topk(2, -1)
        shares = scores.softmax(-1)
        out = self.everyone(x)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, row, expert(x[row]) * shares[row, place].unsqueeze(-1))
        return out


class LoraAttention(nn.Module):
    """Frozen projections with low-rank additions whose second factor starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleDict({k: nn.Linear(WIDTH, WIDTH) for k in ("q", "k", "v")})
        self.base.requires_grad_(requires_grad=False)
        self.down = nn.ParameterDict({k: 0.3 * torch.randn(2, WIDTH) for k in self.base})
        self.up = nn.ParameterDict({k: torch.zeros(WIDTH, 2) for k in self.base})
        self.head = nn.Linear(WIDTH, 2)

    def project(self, name: str, x: Tensor) -> Tensor:
        return self.base[name](x) + x @ self.down[name].mT @ self.up[name].mT

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.project(name, x) for name in self.base)
        weights = (query @ key.mT / math.sqrt(WIDTH)).softmax(-1)
        return self.head((weights @ value).mean(1))


def padded(g: torch.Generator) -> tuple[Tensor, Tensor]:
    sentence = torch.randint(1, COUNT, (ROWS, LENGTH), generator=g)
    length = torch.randint(2, LENGTH + 1, (ROWS, 1), generator=g)
    return sentence * (torch.arange(LENGTH) < length), torch.randint(3, (ROWS,), generator=g)


def translate(model: nn.Module, batch: Any) -> Tensor:
    source, target = batch
    logits = model(source, target[:, :-1])
    return functional.cross_entropy(logits.mT, target[:, 1:], label_smoothing=0.1)


def two_sentences(g: torch.Generator) -> list[Tensor]:
    return [torch.randint(COUNT, (ROWS, LENGTH), generator=g) for _ in range(2)]


ATTENTION = (
    Clean("llama", Llama, words(COUNT, LENGTH + 1), next_word),
    Clean("masked_encoder", MaskedEncoder, three(padded), classify),
    Clean("translator", Translator, three(two_sentences), translate),
    Clean("distance_mask", Distances, vectors((LENGTH, 4), (2,)), regress),
    Clean("perceiver", Perceiver, vectors((LENGTH, 4), (2,)), regress),
    Clean("linear_attention", LinearAttention, words(COUNT, LENGTH + 1), next_word),
    Clean("top_k_experts", TopKExperts, vectors((4,), (3,)), regress),
    Clean(
        "lora_attention",
        LoraAttention,
        vectors((LENGTH, WIDTH), (2,)),
        regress,
        (waive("base.*", "frozen", "only the low-rank additions are trained"),),
    ),
)
