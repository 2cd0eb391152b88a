"""Clean models with single awkward layers: parametrizations, kinks, casts, gates, frozen parts."""

import torch
from faults.clean_case import (
    ROWS,
    Clean,
    classify,
    labelled,
    labelled_words,
    regress,
    three,
    vectors,
    waive,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

TABLE = vectors((5,), (2,))


class Tabular(nn.Module):
    """Batch norm before dropout, one of them with statistics without momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(5, 10, bias=False),
            nn.BatchNorm1d(10, momentum=None),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(10, 8),
            nn.BatchNorm1d(8, affine=False),
            nn.CELU(),
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Bags(nn.Module):
    """Summed, averaged and maximal embeddings with sparse and dense gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = nn.EmbeddingBag(12, 4, mode="sum", sparse=True)
        self.means = nn.EmbeddingBag(12, 4, mode="mean", padding_idx=0)
        self.peaks = nn.EmbeddingBag(12, 4, mode="max")
        self.single = nn.Embedding(12, 4, sparse=True)
        self.head = nn.Linear(16, 3)

    def forward(self, codes: Tensor) -> Tensor:
        bags = [bag(codes) for bag in (self.sums, self.means, self.peaks)]
        return self.head(torch.cat([*bags, self.single(codes[:, 0])], -1))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class Parametrized(nn.Module):
    """Weight-normed, orthogonal and symmetric weights."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(5, 6))
        self.turned = parametrizations.orthogonal(nn.Linear(6, 6))
        self.cayley = parametrizations.orthogonal(nn.Linear(6, 4), orthogonal_map="cayley")
        self.mirrored = nn.Linear(4, 4)
        parametrize.register_parametrization(self.mirrored, "weight", Symmetric())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.normed, self.turned, self.cayley, self.mirrored):
            x = layer(x).sin()
        return self.head(x)


class Spectral(nn.Module):
    """A discriminator whose weights are divided by their largest singular value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(5, 8)),
            nn.LeakyReLU(0.2),
            nn.utils.spectral_norm(nn.Linear(8, 8)),
            nn.LeakyReLU(0.2),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Kinks(nn.Module):
    """Every usual function that has no derivative somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))
        self.first, self.head = nn.Linear(5, 8), nn.Linear(3, 2)
        self.slope = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        kinks = (
            functional.relu,
            functional.relu6,
            functional.hardtanh,
            functional.softshrink,
            torch.abs,
            self.slope,
            lambda y: y.sort(-1).values,
            lambda y: torch.maximum(y, y.roll(1, -1)),
            lambda y: y.clamp(-1, 1),
        )
        for layer, kink in zip(self.layers, kinks, strict=True):
            x = x + kink(layer(x))
        return self.head(torch.stack([x.median(-1).values, x.amax(-1), x.quantile(0.3, -1)], -1))


class InPlace(nn.Module):
    """Activations and sums that write over their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x).mul_(0.5).add_(x)
            y[:, 0] = x[:, 1] * x[:, 2]
            x = functional.elu(y, inplace=True)
        return self.head(x).mul_(2.0).sub_(0.5)


class HardFloat32(nn.Module):
    """A part computed in float32 whatever the precision of the rest, as norms of LLMs are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = y.float()
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)
        return self.head((self.scale * z.to(y.dtype)).tanh())


class Fourier(nn.Module):
    """Products of complex parameters in frequency space (Li 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.lower = nn.Linear(1, 4), nn.Linear(4, 1)
        self.modes = nn.ParameterList(
            0.3 * torch.randn(4, 4, 3, dtype=torch.cfloat) for _ in range(2)
        )
        self.phases = nn.Parameter(torch.randn(4, 3))
        self.local = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x.unsqueeze(-1)).mT
        for mode, local in zip(self.modes, self.local, strict=True):
            frequencies = torch.fft.rfft(x, norm="ortho")[..., :3]
            turned = frequencies * torch.polar(torch.ones_like(self.phases), self.phases)
            mixed = torch.einsum("bik,iok->bok", turned, mode.to(turned.dtype))
            x = functional.gelu(torch.fft.irfft(mixed, n=x.shape[-1], norm="ortho") + local(x))
        return self.lower(x.mT).squeeze(-1)


class ReZero(nn.Module):
    """Residual branches that start switched off (Bachlechner 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6)) for _ in range(4)
        )
        self.gates = nn.ParameterList(torch.zeros(()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for branch, gate in zip(self.branches, self.gates, strict=True):
            x = x + gate * branch(x)
        return self.head(x)


class Pretrained(nn.Module):
    """A frozen backbone with its batch norm kept in eval mode, and a projection of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.backbone.requires_grad_(requires_grad=False)
        self.pretraining_head = nn.Linear(8, 4)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.1), nn.GELU(), nn.Linear(6, 2))
        self.train()

    def train(self, mode: bool = True) -> "Pretrained":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Gumbel(nn.Module):
    """A discrete choice, relaxed or drawn hard with the relaxed gradient (Jang 2017)."""

    def __init__(self, *, hard: bool) -> None:
        super().__init__()
        self.hard = hard
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(functional.gumbel_softmax(self.encoder(x), tau=0.8, hard=self.hard))


class Checkpointed(nn.Module):
    """Activations recomputed in the backward pass, random masks included."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class RunningScale(nn.Module):
    """Inputs scaled by an average kept in buffers: one written in place, one replaced."""

    mean: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("spread", torch.ones(5))
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Softsign(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
                self.spread = 0.9 * self.spread + 0.1 * (x - self.mean).square().mean(0)
        return self.body((x - self.mean) / self.spread.sqrt())


class Quantised(nn.Module):
    """A codebook read through a straight-through gradient, with both of its losses (VQ-VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(4, 5)
        self.codes = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        code = self.codes[torch.cdist(z, self.codes).argmin(-1)]
        losses = functional.mse_loss(code, z.detach()) + 0.25 * functional.mse_loss(
            z, code.detach()
        )
        return self.decoder(z + (code - z).detach()), losses


def rebuild(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    rebuilt, loss = model(batch[0])
    return functional.mse_loss(rebuilt, batch[0]) + loss


def hinge(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.multi_margin_loss(model(batch[0]), batch[1])


def signals(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 8, generator=g), torch.randn(ROWS, 8, generator=g)


PRETRAINED = (
    waive("backbone.*", "frozen", "the backbone was trained before"),
    waive("backbone*", "mode", "its running statistics stay those of the pretraining"),
    waive("pretraining_head.*", "unused", "kept so that the pretrained weights load"),
)
STRAIGHT_THROUGH = waive("encoder.*", "surrogate", "drawn hard, trained by the relaxed gradient")
COPIED = waive("encoder.*", "surrogate", "the decoder's gradient is copied past the codebook")
STOPPED = waive("codes", "stop_gradient", "codes learn from their own loss only")

LAYERS = (
    Clean("tabular_batchnorm", Tabular, TABLE, regress),
    Clean("embedding_bags", Bags, labelled_words(12, 3, 5), classify),
    Clean("parametrized", Parametrized, TABLE, regress),
    Clean("spectral_norm", Spectral, labelled(2, 5), hinge),
    Clean("kinks", Kinks, TABLE, regress),
    Clean("in_place", InPlace, TABLE, regress),
    Clean("hard_float32", HardFloat32, TABLE, regress),
    Clean("fourier_operator", Fourier, three(signals), regress),
    Clean("rezero", ReZero, TABLE, regress),
    Clean("pretrained", Pretrained, TABLE, regress, PRETRAINED),
    Clean("gumbel_soft", lambda: Gumbel(hard=False), TABLE, regress),
    Clean("gumbel_hard", lambda: Gumbel(hard=True), TABLE, regress, (STRAIGHT_THROUGH,)),
    Clean("checkpoint", lambda: Checkpointed(reentrant=False), TABLE, regress),
    Clean("checkpoint_reentrant", lambda: Checkpointed(reentrant=True), TABLE, regress),
    Clean("running_scale", RunningScale, TABLE, regress),
    Clean("vector_quantised", Quantised, vectors((5,)), rebuild, (COPIED, STOPPED)),
)
