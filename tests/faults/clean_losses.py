"""Clean models whose losses are the awkward part: coupled rows, densities, several outputs."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from faults.clean_case import ROWS, Clean, labelled, three, vectors, waive, words
from torch import Tensor, nn
from torch.nn import functional


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with smooth activations between them."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Towers(nn.Module):
    """Two encoders and a learnt temperature, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = perceptron(5, 8, 4), perceptron(6, 8, 4)
        self.log_scale = nn.Parameter(torch.tensor(math.log(5.0)))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left = functional.normalize(self.left(left), dim=-1)
        return left, functional.normalize(self.right(right), dim=-1), self.log_scale.exp()


class Siamese(nn.Module):
    """One encoder for all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = perceptron(5, 10, 8, 4)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encoder(x) for x in inputs)


class Vae(nn.Module):
    """Draws from its posterior by reparametrisation (Kingma 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(6, 10, 6), perceptron(3, 10, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(drawn), mean, log_variance


class Coupling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(2, 8, 4)
        self.log_scale, self.shift = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * self.log_scale.exp() + self.shift
        kept, changed = x.chunk(2, -1)
        scale, shift = self.net(kept).chunk(2, -1)
        scale = scale.tanh()
        logdet = scale.sum(-1) + self.log_scale.sum()
        return torch.cat([changed * scale.exp() + shift, kept], -1), logdet


class Flow(nn.Module):
    """Affine couplings and an invertible matrix (Dinh 2017, Kingma 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling() for _ in range(4))
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(4, 4)).Q.clone())

    def forward(self, x: Tensor) -> Tensor:
        total = torch.linalg.slogdet(self.mix).logabsdet.expand(len(x))
        x = x @ self.mix.mT
        for layer in self.layers:
            x, logdet = layer(x)
            total = total + logdet
        return total - (x.square() + math.log(2 * math.pi)).sum(-1) / 2


class Densities(NamedTuple):
    weights: Tensor
    means: Tensor
    scales: Tensor


class MixtureDensity(nn.Module):
    """A mixture of normals for every row (Bishop 1994)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron(5, 10, 8)
        self.weights, self.means, self.scales = (nn.Linear(8, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Densities:
        x = self.body(x).tanh()
        scales = functional.softplus(self.scales(x)) + 1e-3
        return Densities(self.weights(x).log_softmax(-1), self.means(x), scales)


class Tasks(nn.Module):
    """Three heads, weighted by learnt uncertainties (Kendall 2018), and an auxiliary one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron(5, 10, 8)
        self.value, self.kind, self.count = nn.Linear(8, 1), nn.Linear(8, 3), nn.Linear(8, 1)
        self.early = nn.Linear(10, 3)
        self.log_variances = nn.Parameter(torch.zeros(3))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        middle = self.body[1](self.body[0](features))
        x = self.body[2](middle)
        return {
            "value": self.value(x)[:, 0],
            "kind": self.kind(x),
            "log_rate": self.count(x)[:, 0],
            "early": self.early(middle),
        }


class Ordinal(nn.Module):
    """One score and increasing thresholds between five grades."""

    def __init__(self) -> None:
        super().__init__()
        self.score = perceptron(5, 8, 1)
        self.first, self.gaps = nn.Parameter(torch.tensor(-1.0)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        gaps = functional.pad(functional.softplus(self.gaps).cumsum(0), (1, 0))
        return self.score(x) - (self.first + gaps)


class Distilled(nn.Module):
    """A student that copies a frozen teacher's softened answers."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = perceptron(5, 12, 3), perceptron(5, 6, 3)
        self.teacher.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.student(x), wanted


class Recommender(nn.Module):
    """Factors of users and items with biases of items, all gradients sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = (nn.Embedding(7, 4, sparse=True) for _ in range(2))
        self.item_bias = nn.Embedding(7, 1, sparse=True)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        likeness = functional.cosine_similarity(self.users(user), self.items(item))
        return likeness + self.item_bias(item)[:, 0]


def info_nce(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    left, right, scale = model(*batch)
    logits, own = scale * left @ right.mT, torch.arange(len(left), device=left.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.mT, own)) / 2


def triplet(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return functional.triplet_margin_loss(*model(*batch), margin=1.0)


def same_or_not(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    left, right, same = batch
    return functional.cosine_embedding_loss(*model(left, right), 2 * same - 1, margin=0.2)


def evidence(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    rebuilt, mean, log_variance = model(batch[0])
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
    return (functional.mse_loss(rebuilt, batch[0], reduction="none").sum(-1) + divergence).mean()


def likelihood(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return -model(batch[0]).mean()


def mixture_likelihood(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    found = model(batch[0])
    each = torch.distributions.Normal(found.means, found.scales).log_prob(batch[1])
    return -(found.weights + each).logsumexp(-1).mean()


def tasks(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = model(batch["features"])
    losses = torch.stack(
        [
            functional.huber_loss(found["value"], batch["value"]),
            functional.cross_entropy(found["kind"], batch["kind"], label_smoothing=0.1),
            functional.poisson_nll_loss(found["log_rate"], batch["count"]),
        ]
    )
    log_variances = model.get_parameter("log_variances")
    early = functional.cross_entropy(found["early"], batch["kind"])
    return (losses * (-log_variances).exp() + log_variances).sum() + 0.3 * early


def focal(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, label = batch
    log_share = model(x)[0].log_softmax(-1).gather(1, label[:, None])
    return -((1 - log_share.exp()).square() * log_share).mean()


def quantiles(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    gap = target - model(x)[0]
    levels = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=gap.dtype, device=gap.device)
    return torch.maximum(levels * gap, (levels - 1) * gap).mean()


def ordinal(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, grade = batch
    above = (grade[:, None] > torch.arange(4, device=grade.device)).to(x.dtype)
    return functional.binary_cross_entropy_with_logits(model(x), above)


def distil(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    student, teacher = ((logits / 2).log_softmax(-1) for logits in model(batch[0]))
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def rank(model: nn.Module, triples: Tensor) -> Tensor:
    user, good, bad = triples.unbind(-1)
    return -functional.logsigmoid(model(user, good) - model(user, bad)).mean()


def survival(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cox's partial likelihood: the risk of a row is compared with all that lived longer."""
    x, time, seen = batch
    risk = model(x)[0][:, 0][time.argsort(descending=True)]
    seen = seen[time.argsort(descending=True)]
    return -((risk - risk.logcumsumexp(0)) * seen).sum() / seen.sum()


def many_tasks(g: torch.Generator) -> dict[str, Tensor]:
    return {
        "features": torch.randn(ROWS, 5, generator=g),
        "value": torch.randn(ROWS, generator=g),
        "kind": torch.randint(3, (ROWS,), generator=g),
        "count": torch.randint(6, (ROWS,), generator=g).float(),
    }


def survivors(g: torch.Generator) -> tuple[Any, ...]:
    seen = torch.tensor([1.0, 0.0, 1.0, 1.0])
    return torch.randn(ROWS, 5, generator=g), torch.rand(ROWS, generator=g), seen


def pairs(g: torch.Generator) -> tuple[Any, ...]:
    left, right = (torch.randn(ROWS, 5, generator=g) for _ in range(2))
    return left, right, torch.randint(2, (ROWS,), generator=g)


FROZEN = (waive("teacher.*", "frozen", "a teacher does not learn from its student"),)

LOSSES = (
    Clean("contrastive_towers", Towers, vectors((5,), (6,)), info_nce),
    Clean("triplet", Siamese, vectors((5,), (5,), (5,)), triplet),
    Clean("siamese_cosine", Siamese, three(pairs), same_or_not),
    Clean("vae", Vae, vectors((6,)), evidence),
    Clean("normalising_flow", Flow, vectors((4,)), likelihood),
    Clean("mixture_density", MixtureDensity, vectors((5,), (1,)), mixture_likelihood),
    Clean("uncertain_tasks", Tasks, three(many_tasks), tasks),
    Clean("focal", Siamese, labelled(4, 5), focal),
    Clean("quantiles", Siamese, vectors((5,), (1,)), quantiles),
    Clean("ordinal", Ordinal, labelled(5, 5), ordinal),
    Clean("distilled", Distilled, vectors((5,)), distil, FROZEN),
    Clean("recommender", Recommender, words(7, 3), rank),
    Clean("cox_survival", Siamese, three(survivors), survival),
)
