"""Small models, one idea each: odd inputs and outputs, shared and generated weights, loops, routing."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import Entry, Inputs, features, images, sequences


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 30), nn.ReLU(), nn.Dropout(0.1), nn.Linear(30, 26), nn.ReLU()
        )
        self.head = nn.Linear(26, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.view(x.size(0), -1)))


class LowRank(nn.Module):
    """Weights that are products of two factors: the rank is a width of parameters only."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(30, 5)), nn.Parameter(torch.randn(5, 12))
        self.base, self.scale = nn.Linear(30, 22), nn.Parameter(torch.tensor(0.5))
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(4, 30)), nn.Parameter(torch.randn(22, 4))
        self.head = nn.Linear(22, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.left @ self.right))
        x = self.base(x) + self.scale * (x @ self.lora_a.T @ self.lora_b.T)
        return self.head(torch.tanh(x))


class FiLM(nn.Module):
    """A condition scales and shifts the channels of an image: two inputs, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(6, 20)
        self.film = nn.Linear(20, 2 * 12)
        self.one, self.two = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head, self.extra = nn.Linear(12, 10), nn.Linear(20, 2)

    def forward(self, image: Tensor, condition: Tensor) -> dict[str, Tensor]:
        condition = F.relu(self.condition(condition))
        gamma, beta = torch.chunk(self.film(condition), 2, dim=1)
        x = self.two(F.relu(self.one(image)))
        x = F.relu((1 + gamma[:, :, None, None]) * x + beta[:, :, None, None])
        return {"classes": self.head(x.mean((2, 3))), "extra": self.extra(condition)}


class TwoOutputs(NamedTuple):
    mean: Tensor
    spread: Tensor


class TwoTowers(nn.Module):
    """Two inputs through one shared encoder, compared feature by feature; a named tuple comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(9, 24), nn.Tanh(), nn.Linear(24, 18))
        self.compare, self.head = nn.Linear(4 * 18, 20), nn.Linear(20, 4)

    def forward(self, one: Tensor, two: Tensor) -> TwoOutputs:
        one, two = self.encode(one), self.encode(two)
        x = torch.tanh(self.compare(torch.cat([one, two, torch.abs(one - two), one * two], dim=1)))
        mean, spread = self.head(x).chunk(2, dim=1)
        return TwoOutputs(mean, F.softplus(spread))


class Contrast(nn.Module):
    """CLIP's head: the inner product of two towers' normalised embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(9, 24), nn.GELU(), nn.Linear(24, 16, bias=False))
        self.two = nn.Sequential(nn.Linear(7, 22), nn.GELU(), nn.Linear(22, 16, bias=False))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        one, two = F.normalize(self.one(one), dim=-1), F.normalize(self.two(two), dim=-1)
        return self.scale.exp() * one @ two.T


class DenseExperts(nn.Module):
    """A soft mixture: every expert runs, a softmax gate mixes them. Experts are stacked in one tensor."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(12, 20), nn.Linear(20, experts)
        self.up, self.down = (
            nn.Parameter(torch.randn(experts, 20, 28)),
            nn.Parameter(torch.randn(experts, 28, 20)),
        )
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        hidden = F.gelu(torch.einsum("bd,edf->bef", x, self.up) / 8)
        out = torch.einsum("bef,efd->bed", hidden, self.down) / 8
        return self.head(x + (self.gate(x).softmax(-1).unsqueeze(-1) * out).sum(1))


class InPlace(nn.Module):
    """Fills a buffer of zeros slice by slice, by hidden sizes that are numbers in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(12, 20), nn.Linear(12, 14), nn.Linear(34, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 34, dtype=x.dtype, device=x.device)
        out[:, :20] = F.relu(self.one(x))
        out[:, 20:] = torch.tanh(self.two(x))
        out.mul_(2.0).add_(0.1)
        return self.head(out)


class Unused(nn.Module):
    """Parameters and a whole layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(12, 30), nn.Linear(30, 10)
        self.forgotten, self.spare = nn.Linear(30, 7), nn.Parameter(torch.randn(5))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.one(x)))


class GatedLoop(nn.Module):
    """A recurrent loop in Python over a fixed number of frames, its state made by the hidden size."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 16
        self.reset, self.update, self.new = (nn.Linear(6 + 16, 16) for _ in range(3))
        self.cell, self.head = nn.GRUCell(16, 14), nn.Linear(14, 4)

    def forward(self, frames: Tensor) -> Tensor:
        state, second = frames.new_zeros(frames.shape[0], self.hidden), None
        for t in range(3):
            both = torch.cat([frames[:, t], state], dim=-1)
            reset, update = torch.sigmoid(self.reset(both)), torch.sigmoid(self.update(both))
            new = torch.tanh(self.new(torch.cat([frames[:, t], reset * state], dim=-1)))
            state = torch.lerp(state, new, update)
            second = self.cell(state, second)
        return self.head(second)


class HyperNetwork(nn.Module):
    """Weights of a layer written by another: the target's width is a factor of the writer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.write = nn.Parameter(torch.randn(6)), nn.Linear(6, 18 * 12)
        self.head = nn.Linear(18, 10)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.write(torch.tanh(self.code)).view(18, 12)
        return self.head(torch.tanh(F.linear(x, weight)))


class Maxout(nn.Module):
    """Units of three linear pieces each, in groups by `view`; a highway gate around the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces, self.gate, self.layer = nn.Linear(12, 20 * 3), nn.Linear(20, 20), nn.Linear(20, 20)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pieces(x).view(-1, 20, 3).max(dim=2).values
        gate = torch.sigmoid(self.gate(x))
        return self.head(gate * F.relu(self.layer(x)) + (1 - gate) * x)


class GraphNetwork(nn.Module):
    """Two graph convolutions with a dense adjacency matrix, then the mean over the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(7, 20), nn.Linear(20, 24), nn.Linear(24, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        edges = torch.softmax(edges, dim=-1)
        x = F.relu(edges @ self.one(nodes))
        x = F.relu(torch.bmm(edges, self.two(x)))
        return self.head(x.mean(dim=1))


class Latents(nn.Module):
    """Perceiver: a few learned queries, which are exchangeable, read the input by cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, 20))
        self.q, self.kv, self.out = nn.Linear(20, 4 * 5), nn.Linear(9, 2 * 4 * 5), nn.Linear(4 * 5, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        key, value = self.kv(x).view(batch, time, 2, 4, 5).permute(2, 0, 3, 1, 4)
        query = self.q(self.latents).view(1, 6, 4, 5).transpose(1, 2).expand(batch, -1, -1, -1)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, 6, 20)
        return self.head((self.latents + self.out(mixed)).mean(1))


class Ordered(nn.Module):
    """Operations that see the order of channels: cumsum, sort, top-k, argmax, roll, flip, index, conv1d."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = operation
        self.one, self.two, self.three = nn.Linear(12, 20), nn.Linear(20, 24), nn.Linear(24, 30)
        self.register_buffer("order", torch.randperm(24), persistent=False)
        self.slide = nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.tanh(self.one(x)))
        match self.operation:
            case "cumsum":
                x = x.cumsum(-1)
            case "sort":
                x = x.sort(dim=-1).values
            case "topk":
                best = x.topk(6, dim=-1).indices
                x = x * torch.zeros_like(x).scatter(-1, best, 1.0)
            case "argmax":
                x = x + x.argmax(dim=-1, keepdim=True)
            case "roll":
                x = x.roll(1, dims=-1)
            case "flip":
                x = x.flip(-1)
            case "index":
                x = x[:, self.order]
            case "conv1d":
                x = self.slide(x.unsqueeze(1)).squeeze(1)
        return self.head(F.relu(self.three(x)))


def _images_and_features(batch: int, time: int) -> Inputs:
    return (*images(3, 8)(batch, time), *features(6)(batch, time))


def _nodes_and_edges(batch: int, time: int) -> Inputs:
    nodes, edges = (
        sequences(7)(batch, time),
        torch.randn(batch, time, time, generator=torch.Generator().manual_seed(9)),
    )
    return (*nodes, edges)


def _ordered(operation: str, reason: str) -> Entry:
    make = lambda: Ordered(operation)  # noqa: E731
    return Entry(f"ordered_{operation}", make, features(12), 0.3, whole=(10, 12, 24), reasons=(reason,))


SMALL = (
    Entry("mlp", MLP, features(12), 0.99, whole=(10, 12), ablates=True),
    Entry("low_rank", LowRank, features(12), 0.99, whole=(10, 12), ablates=True),
    Entry("film", FiLM, _images_and_features, 0.99, whole=(3, 6, 10), ablates=True),
    Entry("two_towers", TwoTowers, features(9, 9), 0.99, whole=(4, 9), ablates=True),
    Entry("contrast", Contrast, features(9, 7), 0.99, whole=(7, 9)),
    Entry("dense_experts", DenseExperts, features(12), 0.99, whole=(10, 12)),
    Entry("in_place", InPlace, features(12), 0.98, whole=(10, 12, 34), ablates=True),
    Entry("unused", Unused, features(12), 0.6, whole=(10, 12), ablates=True),
    Entry(
        "gated_loop",
        GatedLoop,
        lambda batch, time: sequences(6)(batch, 3),
        0.99,
        whole=(3, 4, 6),
        ablates=True,
    ),
    Entry("hyper_network", HyperNetwork, features(12), 0.9, whole=(10, 12), ablates=True),
    Entry("maxout", Maxout, features(12), 0.99, whole=(3, 10, 12), ablates=True),
    Entry("graph_network", GraphNetwork, _nodes_and_edges, 0.99, whole=(3, 7), ablates=True),
    Entry("latents", Latents, sequences(9), 0.9, sequence=True, whole=(9,), heads=((4, 5),)),
    _ordered("cumsum", "cumsum"),
    _ordered("sort", "sort"),
    _ordered("topk", "topk"),
    _ordered("argmax", "argmax"),
    _ordered("roll", "roll"),
    _ordered("flip", "flip"),
    _ordered("index", "index"),
    _ordered("conv1d", "conv"),
)
