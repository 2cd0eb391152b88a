"""Clean models that are awkward about rows, modes, hooks and memory."""

import copy
from typing import Any, NamedTuple

import torch
from faults.clean_case import (
    ROWS,
    Clean,
    classify,
    labelled,
    next_word,
    regress,
    three,
    vectors,
    waive,
    words,
)
from faults.clean_losses import perceptron
from faults.clean_sequences import TimeFirstRnn
from torch import Tensor, nn
from torch.nn import functional

TABLE = vectors((5,), (2,))


class Tagger(nn.Module):
    """Logits for every word of a padded sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 8, 3, padding="same")
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, sentence: Tensor) -> Tensor:
        return self.head(self.norm(functional.silu(self.conv(self.words(sentence).mT)).mT))


class DenseGraph(nn.Module):
    """Two graph convolutions with the adjacency matrix itself (Kipf 2017): rows are nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency / adjacency.sum(-1, keepdim=True)
        return self.second(adjacency @ functional.softplus(self.first(adjacency @ nodes)))


class OneSet(nn.Module):
    """A batch is one set, whose members look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, members: Tensor) -> Tensor:
        x = self.enter(members)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class BatchStatistics(nn.Module):
    """Norms over the batch in both modes, for test-time adaptation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.enter(x)).tanh())


class EarlyHead(nn.Module):
    """Gives the answer of an auxiliary head as well, but only in training (Szegedy 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = perceptron(5, 8, 6), perceptron(6, 8, 2)
        self.early = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        middle = self.first(x).sigmoid()
        answer = self.second(middle)
        return (answer, self.early(middle)) if self.training else answer


class DropPath(nn.Module):
    """Rows skip a branch at random (Huang 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, dtype=x.dtype, device=x.device) > self.rate
        return x * kept / (1 - self.rate)


class StochasticDepth(nn.Module):
    """Residual branches that single rows skip, and a last one that all skip half of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), DropPath(0.25))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for branch in self.branches[:2]:
            x = x + branch(x)
        if not self.training or torch.rand(()) > 0.5:
            x = x + self.branches[2](x)
        return self.head(x)


class Latents(NamedTuple):
    code: Tensor
    sharpness: Tensor


class Methods(nn.Module):
    """Used through methods of its own; `forward` is for prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(5, 8, 4), perceptron(2, 8, 5)

    def encode(self, x: Tensor) -> Latents:
        code, sharpness = self.encoder(x).chunk(2, -1)
        return Latents(code, sharpness.sigmoid())

    def decode(self, latents: Latents) -> Tensor:
        return self.decoder(latents.code * latents.sharpness)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def halved(gradient: Tensor) -> Tensor:
    return gradient / 2


def looked_at(gradient: Tensor) -> None:
    assert gradient.isfinite().all()


class Hooked(nn.Module):
    """One hook that only looks, on a tensor and a module, and one that slows a layer down."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Linear(5, 8), nn.Linear(8, 2)
        self.slow.weight.register_hook(halved)
        self.fast.weight.register_hook(looked_at)
        self.fast.register_forward_hook(self.remember)

    @staticmethod
    def remember(module: nn.Module, inputs: object, output: Tensor) -> None:
        assert output.isfinite().all()

    def forward(self, x: Tensor) -> Tensor:
        return self.fast(self.slow(x).tanh())


class Bootstrapped(nn.Module):
    """Predicts what a copy of itself sees, which only its trainer changes (BYOL)."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.predictor = perceptron(5, 10, 6), perceptron(6, 8, 6)
        self.target = copy.deepcopy(self.online).requires_grad_(requires_grad=False)

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.target(two)
        return self.predictor(self.online(one)), wanted.detach()


class Stateful(nn.Module):
    """Goes on from the last batch's state, cut off from its gradient (truncated BPTT)."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(5, 6), nn.Linear(6, 2)
        self.register_buffer("state", torch.zeros(1, ROWS, 6))

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.gru(x.transpose(0, 1), self.state)
        self.state = last.detach()
        return self.head(states[-1])


class Warm(nn.Module):
    """An output layer that starts as the embedding and then goes its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.output = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.output.weight.data.copy_(self.words.weight.data)

    def forward(self, sentence: Tensor) -> Tensor:
        return self.output(self.mix(self.words(sentence).cumsum(1)).tanh())


class Nested(nn.Module):
    """Reads a nest of tensors, numbers, words and holes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(3, 4)
        self.kinds = nn.ModuleDict({"near": nn.Linear(4, 2), "far": nn.Linear(4, 2)})

    def forward(self, batch: dict[str, Any]) -> Tensor:
        (left,), (right, weight) = batch["inputs"]
        x = self.left(left) + weight * self.right(right)
        if batch["context"] is not None:
            x = x + batch["context"]
        return sum(self.kinds[name](x.cos()) for name in batch["kinds"])


def token_mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over all words of the batch that are there: neither mean nor sum over rows."""
    sentence, tags = batch
    return functional.cross_entropy(model(sentence).mT, tags, ignore_index=-100)


def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1], reduction="sum")


def early_too(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    if not model.training:
        return functional.mse_loss(model(x), target)
    answer, early = model(x)
    return functional.mse_loss(answer, target) + 0.3 * functional.mse_loss(early, target)


def rebuilt_by_methods(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    assert isinstance(model, Methods)
    latents = model.encode(batch[0])
    noisy = latents._replace(code=latents.code + 0.1 * torch.randn_like(latents.code))
    return functional.mse_loss(model.decode(noisy), batch[0]) + 0.1 * latents.code.abs().mean()


def alike(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    one, two = batch
    pairs = (model(one, two), model(two, one))
    return sum(2 - 2 * functional.cosine_similarity(a, b) for a, b in pairs).mean()


def nested_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return (model(batch) - batch["target"]).square().mean() * batch["scale"]


def tagged(g: torch.Generator) -> tuple[Tensor, Tensor]:
    known = torch.arange(6) < torch.randint(2, 7, (ROWS, 1), generator=g)
    tags = torch.randint(4, (ROWS, 6), generator=g)
    return torch.randint(1, 9, (ROWS, 6), generator=g) * known, tags.masked_fill(~known, -100)


def square_graph(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    links = (torch.rand(6, 6, generator=g) > 0.6).float()
    adjacency = ((links + links.mT + torch.eye(6)) > 0).float()
    return torch.randn(6, 5, generator=g), adjacency, torch.randn(6, 2, generator=g)


def square_sequence(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, ROWS, 4, generator=g), torch.randint(3, (ROWS,), generator=g)


def nest(g: torch.Generator) -> dict[str, Any]:
    left, right = torch.randn(ROWS, 5, generator=g), torch.randn(ROWS, 3, generator=g)
    return {
        "inputs": [(left,), [right, 0.5]],
        "context": None,
        "kinds": ("near", "far"),
        "scale": 2,
        "target": torch.randn(ROWS, 2, generator=g),
    }


def one_row(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 5, generator=g), torch.randn(1, 2, generator=g)


TOGETHER = (waive("attention", "rows", "a batch is one set"),)
BATCH_NORM = (waive("norm", "rows", "adapts to the batch at test time"),)
SLOW = (waive("slow.weight", "hook", "learns at half the speed"),)
TARGET = (waive("target.*", "frozen", "an average of the online network"),)
KEPT = (waive("gru", "rows", "every row has its own state"),)
WARM = (waive("output.weight", "copy", "starts where the embedding does"),)

CLEAN_ROWS = (
    Clean("token_mean", Tagger, three(tagged), token_mean),
    Clean("summed_loss", lambda: perceptron(5, 8, 8, 2), TABLE, summed),
    Clean("one_row", lambda: perceptron(5, 8, 8, 2), three(one_row), regress),
    Clean("dense_graph", DenseGraph, three(square_graph), regress),
    Clean("square_sequence", TimeFirstRnn, three(square_sequence), classify),
    Clean("one_set", OneSet, TABLE, regress, TOGETHER),
    Clean("batch_statistics", BatchStatistics, TABLE, regress, BATCH_NORM),
    Clean("early_head", EarlyHead, TABLE, early_too),
    Clean("stochastic_depth", StochasticDepth, TABLE, regress),
    Clean("own_methods", Methods, vectors((5,)), rebuilt_by_methods),
    Clean("hooked", Hooked, TABLE, regress, SLOW),
    Clean("bootstrapped", Bootstrapped, vectors((5,), (5,)), alike, TARGET),
    Clean("stateful_gru", Stateful, vectors((3, 5), (2,)), regress, KEPT),
    Clean("warm_start", Warm, words(9, 6), next_word, WARM),
    Clean("nested_batch", Nested, three(nest), nested_loss),
    Clean("single_output", lambda: nn.Linear(5, 3), labelled(3, 5), classify),
)
