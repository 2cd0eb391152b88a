"""Clean models whose computation is unusual: graphs, sets, solvers, derivatives inside the loss."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from faults.clean_case import ROWS, Clean, regress, three, vectors
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional


class GraphNet(nn.Module):
    """Messages along edges, summed by `index_add`; nodes, edges and graphs differ in number."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.messages = nn.ModuleList(nn.Linear(12, 6) for _ in range(3))
        self.updates = nn.ModuleList(nn.GRUCell(6, 6) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.head = nn.Linear(6, 1)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, graphs: int) -> Tensor:
        x = self.enter(nodes).tanh()
        source, target = edges
        for message, update, norm in zip(self.messages, self.updates, self.norms, strict=True):
            sent = functional.gelu(message(torch.cat([x[source], x[target]], -1)))
            received = torch.zeros_like(x).index_add(0, target, sent)
            x = norm(update(received, x))
        pooled = x.new_zeros(graphs, x.shape[1]).index_add_(0, graph, x)
        return self.head(pooled)[:, 0]


class GraphAttention(nn.Module):
    """A softmax over each node's incoming edges by scatter (Velickovic 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6)])
        self.scores = nn.ModuleList(nn.Linear(12, 1, bias=False) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        for project, score in zip(self.project, self.scores, strict=True):
            x = project(x)
            pair = torch.cat([x[source], x[target]], -1)
            raw = functional.leaky_relu(score(pair)[:, 0], 0.2).exp()
            total = raw.new_zeros(len(x)).scatter_add(0, target, raw)
            weight = (raw / total[target]).unsqueeze(-1)
            x = functional.elu(torch.zeros_like(x).index_add(0, target, weight * x[source]) + x)
        return self.head(x)


class DeepSets(nn.Module):
    """Sums and maxima over members of a set, some of which are missing (Zaheer 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.member = nn.Sequential(nn.Linear(3, 8), nn.Hardswish(), nn.Linear(8, 6))
        self.whole = nn.Sequential(nn.Linear(12, 8), nn.LogSigmoid(), nn.Linear(8, 2))

    def forward(self, members: Tensor, known: Tensor) -> Tensor:
        x = self.member(members)
        absent = ~known.unsqueeze(-1)
        total = x.masked_fill(absent, 0.0).sum(1)
        return self.whole(torch.cat([total, x.masked_fill(absent, -math.inf).amax(1)], -1))


class NeuralOde(nn.Module):
    """Steps of the classical Runge-Kutta method and of Euler's through one learnt field."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))
        self.log_time = nn.Parameter(torch.tensor(-0.3))

    def slope(self, state: Tensor, time: Tensor) -> Tensor:
        return self.field(torch.cat([state, time.expand(len(state), 1)], -1))

    def forward(self, state: Tensor) -> Tensor:
        step = self.log_time.exp() / 6
        for i in range(6):
            time = i * step
            one = self.slope(state, time)
            if i % 2:
                state = state + step * one
                continue
            two = self.slope(state + step / 2 * one, time + step / 2)
            three_ = self.slope(state + step / 2 * two, time + step / 2)
            four = self.slope(state + step * three_, time + step)
            state = state + step / 6 * (one + 2 * two + 2 * three_ + four)
        return state


class HyperNetwork(nn.Module):
    """One network writes the weights with which another, without any, reads each row."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.weights, self.biases = nn.Linear(8, 4 * 5), nn.Linear(8, 5)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        code = self.context(context)
        weight = self.weights(code).unflatten(-1, (5, 4)) / 2
        y = torch.einsum("boi,bi->bo", weight, x) + self.biases(code)
        return self.head(self.norm(y).cos())


class Adapted(nn.Module):
    """Takes two gradient steps on each row's own examples before it answers (MAML)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)
        self.log_rate = nn.Parameter(torch.tensor(-2.0))

    def forward(self, x: Tensor, y: Tensor, question: Tensor) -> Tensor:
        answers = []
        for row in range(len(x)):
            weights = dict(self.head.named_parameters())
            for _ in range(2):
                out = functional_call(self.head, weights, (self.net(x[row]),))
                loss = functional.mse_loss(out, y[row])
                slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                moves = zip(weights.items(), slopes, strict=True)
                weights = {k: w - self.log_rate.exp() * g for (k, w), g in moves}
            answers.append(functional_call(self.head, weights, (self.net(question[row]),)))
        return torch.stack(answers)


class Potential(nn.Module):
    """A scalar field whose gradient is the answer, as for forces from an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(
            nn.Linear(3, 10), nn.Softplus(), nn.Linear(10, 8), nn.Softplus(), nn.Linear(8, 1, False)
        )

    def forward(self, place: Tensor) -> Tensor:
        place = place.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.energy(place).sum()
            return -torch.autograd.grad(energy, place, create_graph=True)[0]


class CubeRoot(torch.autograd.Function):
    """Solves y + y^3 = x by Newton's method; differentiated implicitly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for _ in range(60):
            y = y - (y + y**3 - x) / (1 + 3 * y**2)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return slopes[0] / (1 + 3 * y**2)


class VeryDeep(nn.Module):
    """More than 500 parameter tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(5, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()) for _ in range(130)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x) / 4
        return self.head(x)


class Implicit(nn.Module):
    """A right custom function between layers, with the step from x of a fixed-point layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + CubeRoot.apply(self.inner(CubeRoot.apply(x))))


class GaussianProcess(nn.Module):
    """Learnt kernel and inducing points through a Cholesky factor and a triangular solve."""

    def __init__(self) -> None:
        super().__init__()
        self.warp = nn.Linear(3, 2)
        self.points = nn.Parameter(torch.randn(5, 2))
        self.values = nn.Parameter(torch.randn(5, 1))
        self.log_lengths, self.log_noise = (
            nn.Parameter(torch.zeros(2)),
            nn.Parameter(torch.zeros(())),
        )

    def kernel(self, one: Tensor, two: Tensor) -> Tensor:
        gap = (one.unsqueeze(-2) - two) * self.log_lengths.exp()
        return (-gap.square().sum(-1) / 2).exp()

    def forward(self, x: Tensor) -> Tensor:
        noise = self.log_noise.exp() * torch.eye(5, dtype=x.dtype, device=x.device)
        factor = torch.linalg.cholesky(self.kernel(self.points, self.points) + noise)
        return self.kernel(self.warp(x), self.points) @ torch.cholesky_solve(self.values, factor)


class Crosses(nn.Module):
    """Pairwise products of embedded columns and of numbers (factorisation machine, DLRM)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({k: nn.Embedding(6, 4) for k in ("city", "day", "kind")})
        self.linear = nn.ModuleDict({k: nn.Embedding(6, 1) for k in self.tables})
        self.numbers = nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 4))
        self.top = nn.Sequential(nn.Linear(10, 6), nn.GLU(), nn.Linear(3, 1))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        columns = [table(batch[name]) for name, table in self.tables.items()]
        columns.append(self.numbers(batch["numbers"]))
        products = [(a * b).sum(-1) for a, b in itertools.combinations(columns, 2)]
        first = sum(table(batch[name]) for name, table in self.linear.items())
        joined = torch.cat([torch.stack(products, -1), columns[-1]], -1)
        return (self.top(joined) + first)[:, 0]


class FourierFeatures(nn.Module):
    """Fixed random frequencies in a buffer, sines with learnt speeds (NeRF, SIREN)."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, 6))
        self.layers = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(20, 8)])
        self.speeds = nn.ParameterList(torch.full((8,), 3.0) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, place: Tensor) -> Tensor:
        angle = 2 * math.pi * place @ self.frequencies
        waves = x = torch.cat([angle.sin(), angle.cos()], -1)
        for i, (layer, speed) in enumerate(zip(self.layers, self.speeds, strict=True)):
            x = (speed * layer(torch.cat([x, waves], -1) if i == 2 else x)).sin()
        return self.head(x).sigmoid()


class Sinkhorn(nn.Module):
    """Soft matching of two sets by alternating normalisation of log-weights (Cuturi 2013)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 6), nn.Linear(3, 6)
        self.cost, self.head = nn.Bilinear(6, 6, 1), nn.Linear(1, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        one, two = self.left(left).tanh(), self.right(right).tanh()
        pairs = [t.expand(-1, 4, 4, -1).contiguous() for t in (one.unsqueeze(2), two.unsqueeze(1))]
        scores = cost = self.cost(*pairs)[..., 0]
        for _ in range(8):
            scores = scores - scores.logsumexp(-1, keepdim=True)
            scores = scores - scores.logsumexp(-2, keepdim=True)
        return self.head((scores.exp() * cost).sum((1, 2)).unsqueeze(-1))


def graph_values(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    target = batch["target"]
    found = model(batch["nodes"], batch["edges"], batch["graph"], len(target))
    return functional.l1_loss(found, target)


def node_values(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    nodes, edges, target = batch
    return functional.mse_loss(model(nodes, edges), target)


def clicks(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return functional.binary_cross_entropy_with_logits(model(batch), batch["clicked"])


def graphs(g: torch.Generator) -> dict[str, Tensor]:
    return {
        "nodes": torch.randn(9, 4, generator=g),
        "edges": torch.randint(9, (2, 14), generator=g),
        "graph": torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]),
        "target": torch.randn(3, generator=g),
    }


def one_graph(g: torch.Generator) -> list[Tensor]:
    ring = torch.stack([torch.arange(6), torch.arange(1, 7) % 6])
    edges = torch.cat([ring, torch.randint(6, (2, 4), generator=g)], 1)
    return [torch.randn(6, 4, generator=g), edges, torch.randn(6, 2, generator=g)]


def sets(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    known = torch.rand(ROWS, 5, generator=g) > 0.4
    known[:, 0] = True
    return torch.randn(ROWS, 5, 3, generator=g), known, torch.randn(ROWS, 2, generator=g)


def clicked(g: torch.Generator) -> dict[str, Tensor]:
    columns = {k: torch.randint(6, (ROWS,), generator=g) for k in ("city", "day", "kind")}
    numbers = torch.randn(ROWS, 3, generator=g)
    return {
        **columns,
        "numbers": numbers,
        "clicked": torch.randint(2, (ROWS,), generator=g).float(),
    }


STRUCTURES = (
    Clean("graph_network", GraphNet, three(graphs), graph_values),
    Clean("graph_attention", GraphAttention, three(one_graph), node_values),
    Clean("deep_sets", DeepSets, three(sets), regress),
    Clean("neural_ode", NeuralOde, vectors((3,), (3,)), regress),
    Clean("hypernetwork", HyperNetwork, vectors((3,), (4,), (2,)), regress),
    Clean("meta_learning", Adapted, vectors((3, 1), (3, 1), (1,), (1,)), regress),
    Clean("potential", Potential, vectors((3,), (3,)), regress),
    Clean("implicit_function", Implicit, vectors((5,), (2,)), regress),
    Clean("very_deep", VeryDeep, vectors((5,), (2,)), regress),
    Clean("gaussian_process", GaussianProcess, vectors((3,), (1,)), regress),
    Clean("feature_crosses", Crosses, three(clicked), clicks),
    Clean("fourier_features", FourierFeatures, vectors((2,), (3,)), regress),
    Clean("sinkhorn", Sinkhorn, vectors((4, 3), (4, 3), (1,)), regress),
)
