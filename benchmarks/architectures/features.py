"""Networks for tables, sets, graphs, points and users, written by hand as people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.entry import Architecture, Inputs, MakeInputs


def table(examples: int, length: int) -> Inputs:
    """Ten numbers."""
    return (torch.randn(examples, 10),)


def cloud(examples: int, length: int) -> Inputs:
    """Points in space."""
    return (torch.randn(examples, length, 3),)


def rays(examples: int, length: int) -> Inputs:
    """Positions and directions along rays."""
    return (torch.rand(examples, length, 3), F.normalize(torch.randn(examples, length, 3), dim=-1))


def graph(examples: int, length: int) -> Inputs:
    """Features of nodes, and who is whose neighbour."""
    edges = (torch.rand(examples, length, length) < 0.4).float()
    return (torch.randn(examples, length, 6), ((edges + edges.transpose(1, 2)) > 0).float())


def timed(examples: int, length: int) -> Inputs:
    """Noisy points and the time of diffusion."""
    return (torch.randn(examples, 6), torch.rand(examples))


class DeepSets(nn.Module):
    """A sum over the members of a set."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 24), nn.ELU(), nn.Linear(24, 32), nn.ELU())
        self.rho = nn.Sequential(nn.Linear(32, 24), nn.ELU(), nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).sum(dim=1))


class PointNet(nn.Module):
    """Points turned by a learned matrix, then a maximum over them."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.matrix = nn.Linear(16, 9)
        self.body = nn.Sequential(
            nn.Conv1d(3, 16, 1),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 32, 1),
            nn.BatchNorm1d(32),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(2, 1)
        matrix = self.matrix(torch.max(self.turn(x), 2)[0]).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        x = torch.bmm(x.transpose(2, 1), matrix).transpose(2, 1)
        return self.head(torch.max(self.body(x), 2, keepdim=True)[0].view(-1, 32))


class NeRF(nn.Module):
    """A radiance field: frequencies, a skip connection, colour by direction."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(27, 32), nn.Linear(32, 32)])
        self.second = nn.ModuleList([nn.Linear(59, 32), nn.Linear(32, 32)])
        self.density, self.feature, self.colour = nn.Linear(32, 1), nn.Linear(32, 32), nn.Linear(59, 16)
        self.rgb = nn.Linear(16, 3)

    @staticmethod
    def frequencies(x: Tensor) -> Tensor:
        parts = [x]
        for power in range(4):
            parts += [torch.sin(2.0**power * x), torch.cos(2.0**power * x)]
        return torch.cat(parts, -1)

    def forward(self, positions: Tensor, directions: Tensor) -> Tensor:
        x = h = self.frequencies(positions)
        for layer in self.first:
            h = F.relu(layer(h))
        h = torch.cat([x, h], -1)
        for layer in self.second:
            h = F.relu(layer(h))
        density = F.softplus(self.density(h))
        h = F.relu(self.colour(torch.cat([self.feature(h), self.frequencies(directions)], -1)))
        return torch.cat([torch.sigmoid(self.rgb(h)), density], -1)


class Siren(nn.Module):
    """Sines as activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 24), nn.Linear(24, 24), nn.Linear(24, 2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x)


class GCN(nn.Module):
    """Graph convolutions with a dense, normalised adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 24), nn.Linear(24, 24, bias=False), nn.Linear(24, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        a = adjacency + torch.eye(adjacency.size(-1), dtype=adjacency.dtype)
        d = a.sum(-1).pow(-0.5)
        a = d.unsqueeze(-1) * a * d.unsqueeze(-2)
        return self.head(F.relu(a @ self.two(F.relu(a @ self.one(x)))))


class GAT(nn.Module):
    """Attention over neighbours, several heads, LeakyReLU of a sum of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Linear(6, 32, bias=False), nn.Linear(32, 3)
        self.left, self.right = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.w(x).view(x.size(0), x.size(1), 4, 8)
        score = (h * self.left).sum(-1).unsqueeze(2) + (h * self.right).sum(-1).unsqueeze(1)
        allowed = (adjacency + torch.eye(adjacency.size(-1), dtype=adjacency.dtype)).unsqueeze(-1) > 0
        weights = F.leaky_relu(score, 0.2).masked_fill(~allowed, -1e9).softmax(2)
        return self.head(F.elu(torch.einsum("bijh,bjhd->bihd", weights, h).flatten(2)))


class MessagePassing(nn.Module):
    """Messages from pairs of nodes, a GRU cell for the update, and a global sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.update, self.head = nn.Linear(6, 16), nn.GRUCell(20, 16), nn.Linear(16, 3)
        self.message = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 20))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        b, n, _ = x.shape
        h = self.first(x)
        for _ in range(2):
            pairs = torch.cat([h.unsqueeze(2).expand(b, n, n, 16), h.unsqueeze(1).expand(b, n, n, 16)], -1)
            received = (self.message(pairs) * adjacency.unsqueeze(-1)).sum(2)
            h = self.update(received.reshape(b * n, -1), h.reshape(b * n, -1)).view(b, n, -1)
        return self.head(h.sum(1))


class SoftExperts(nn.Module):
    """A mixture of experts by hand: all are run, their answers are weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(10, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        every = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.head((weights.unsqueeze(-1) * every).sum(1))


class TopExperts(nn.Module):
    """The two best experts, by a mask; weights of all experts in one tensor; the balance is a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(10, 16), nn.Linear(16, 4, bias=False), nn.Linear(16, 3)
        self.w1, self.w2 = (
            nn.Parameter(0.2 * torch.randn(4, 16, 24)),
            nn.Parameter(0.2 * torch.randn(4, 24, 16)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.stem(x))
        probability = self.gate(x).softmax(-1)
        best, index = probability.topk(2, dim=-1)
        weights = torch.zeros_like(probability).scatter(-1, index, best / best.sum(-1, keepdim=True))
        hidden = F.gelu(torch.einsum("bd,edh->beh", x, self.w1))
        y = torch.einsum("beh,ehd,be->bd", hidden, self.w2, weights)
        return self.head(x + y), 4 * (probability.mean(0) * (weights > 0).to(x.dtype).mean(0)).sum()


class HyperNetwork(nn.Module):
    """A network that makes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.head = (
            nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6 * 12 + 12)),
            nn.Linear(12, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(x[:, :4])
        weight, bias = made[:, : 6 * 12].view(-1, 12, 6), made[:, 6 * 12 :]
        return self.head(torch.tanh(torch.bmm(weight, x[:, 4:, None]).squeeze(-1) + bias))


class Coupling(nn.Module):
    """RealNVP: half is scaled and shifted by the other half; the log of the determinant is returned, too."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 10)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.size(0))
        for net in self.nets:
            one, two = x[:, :5], x[:, 5:]
            scale, shift = net(one).chunk(2, dim=1)
            scale = torch.tanh(scale)
            x = torch.cat([two * scale.exp() + shift, one], dim=1)
            log_det = log_det + scale.sum(1)
        return x, log_det


class Denoiser(nn.Module):
    """Diffusion with a sine embedding of time and FiLM."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 64))
        self.one, self.two, self.out = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 6)
        self.norm = nn.LayerNorm(32, elementwise_affine=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(8, device=t.device) * 0.9).to(t.dtype)
        angles = t[:, None] * frequencies
        scale, shift = self.time(torch.cat([angles.sin(), angles.cos()], -1)).chunk(2, -1)
        h = F.silu(self.one(x))
        h = self.norm(h) * (1 + scale) + shift
        return self.out(h + F.silu(self.two(h)))


class MetricLearning(nn.Module):
    """Prototypes, squared distances, an angular margin (ArcFace)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 24), nn.PReLU(24), nn.Linear(24, 16))
        self.prototypes, self.classes = nn.Parameter(torch.randn(5, 16)), nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.body(x)
        near = -torch.cdist(z, self.prototypes).pow(2)
        cosine = F.linear(F.normalize(z), F.normalize(self.classes)).clamp(-1 + 1e-4, 1 - 1e-4)
        return near, 30 * torch.cos(torch.acos(cosine) + 0.2)


class ComplexLayers(nn.Module):
    """Weights that are complex, and the size of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary = nn.Linear(10, 24), nn.Linear(10, 24)
        self.weight = nn.Parameter(0.2 * torch.randn(24, 16, dtype=torch.cfloat))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(self.real(x), self.imaginary(x))
        return self.head(torch.abs(z @ self.weight.to(z.dtype)))


class Highway(nn.Module):
    """Gates on the residual path, and Maxout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.value, self.max = (
            nn.Linear(10, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 32),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        gate = torch.sigmoid(self.gate(x))
        x = gate * torch.relu(self.value(x)) + (1 - gate) * x
        return self.head(self.max(x).view(x.size(0), 16, 2).max(-1).values)


class MultiTask(nn.Module):
    """One trunk and a head for each task, in a dictionary of names that are no identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU())
        self.heads = nn.ModuleDict(
            {"age in years": nn.Linear(24, 1), "class": nn.Linear(24, 4), "2nd": nn.Linear(24, 2)}
        )

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.trunk(x)
        return {
            "tasks": {name: head(x) for name, head in self.heads.items()},
            "norm": x.detach().norm(dim=-1),
        }


class Bilinear(nn.Module):
    """A bilinear layer and low-rank products of three modalities."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.meet = nn.Linear(5, 16), nn.Linear(5, 12), nn.Bilinear(16, 12, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        return self.head(torch.tanh(self.meet(torch.tanh(self.one(one)), torch.tanh(self.two(two)))))


class KAN(nn.Module):
    """Learned functions on the edges: radial basis functions instead of splines."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, 6))
        self.grid: Tensor
        self.one, self.two = (
            nn.Parameter(0.2 * torch.randn(16, 10, 6)),
            nn.Parameter(0.2 * torch.randn(3, 16, 6)),
        )

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.one, self.two):
            basis = torch.exp(-((x.unsqueeze(-1) - self.grid) ** 2))
            x = torch.einsum("big,oig->bo", basis, weight)
        return x


def _features(
    name: str,
    style: str,
    model: Callable[[], nn.Module],
    inputs: MakeInputs = table,
    lengths: tuple[int, ...] = (),
) -> Architecture:
    return Architecture(name, "hand-written", style, model, inputs, 8, lengths)


FEATURES = [
    _features("deep-sets", "sum over members", DeepSets, cloud, (5, 12)),
    _features("pointnet", "learned matrix, maximum over points", PointNet, cloud, (5, 12)),
    _features("nerf", "frequencies, skip connection, two inputs", NeRF, rays, (5, 12)),
    _features("siren", "sines", Siren, cloud, (5, 12)),
    _features("gcn", "dense normalised adjacency", GCN, graph, (5, 12)),
    _features("gat", "attention over neighbours", GAT, graph, (5, 12)),
    _features("message-passing", "messages of pairs, GRU cell", MessagePassing, graph, (5, 12)),
    _features("moe-soft", "all experts weighted", SoftExperts),
    _features("moe-top-two", "topk and scatter, stacked experts", TopExperts),
    _features("hypernetwork", "weights made by a network", HyperNetwork),
    _features("normalising-flow", "coupling layers, halves exchanged", Coupling),
    _features("diffusion-mlp", "time embedding, FiLM", Denoiser, timed),
    _features("metric-learning", "cdist, normalised prototypes, angular margin", MetricLearning),
    _features("complex-layers", "complex weights", ComplexLayers),
    _features("highway-maxout", "gates, maximum of pairs", Highway),
    _features("multi-task", "nested dictionary of outputs, odd names", MultiTask),
    _features("bilinear", "nn.Bilinear", Bilinear),
    _features("kan", "functions on edges, a grid in a buffer", KAN),
]  # fmt: skip
