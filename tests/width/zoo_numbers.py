"""Random draws, norms with a bound, identity matrices, values repeated, complex numbers, products within one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from zoo_entry import Entry, features, tokens


class Drawn(nn.Module):
    """Noise of several kinds in training; a choice that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.spread = nn.Linear(12, 26), nn.Linear(26, 20), nn.Linear(26, 20)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(x))
        mean, spread = self.two(x), F.softplus(self.spread(x))
        if self.training:
            mean = torch.normal(mean, spread) + torch.empty_like(mean).uniform_(-0.1, 0.1)
            mean = mean * torch.poisson(spread) + torch.randint(3, (mean.size(0), 20)) * 0.1
            mean = mean + F.gumbel_softmax(mean.view(-1, 5, 4), hard=True).reshape(mean.shape)
        return self.head(torch.tanh(mean))


class Distributions(nn.Module):
    """Weights that are drawn (Bayes by backprop), and a latent variable, by torch.distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.randn(20, 12) / 3), nn.Parameter(torch.randn(20, 12) - 3)
        self.latent, self.scale = nn.Linear(20, 14), nn.Linear(20, 14)
        self.head = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = Normal(self.mean, F.softplus(self.spread))
        h = torch.tanh(F.linear(x, weight.rsample() if self.training else weight.mean))
        latent = Normal(self.latent(h), F.softplus(self.scale(h)) + 0.1)
        divergence = kl_divergence(latent, Normal(0.0, 1.0)).mean(1)
        return self.head(latent.rsample() if self.training else latent.mean), divergence


class Bounded(nn.Module):
    """EEGNet's bound on the rows of a weight, and nn.Embedding's on its vectors."""

    def __init__(self, order: float = 2.0) -> None:
        super().__init__()
        self.order = order
        self.embed = nn.Embedding(50, 18, max_norm=1.5, norm_type=order)
        self.one, self.head = nn.Linear(18, 22), nn.Linear(22, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            self.one.weight.copy_(torch.renorm(self.one.weight, self.order, 0, 0.5))
        return self.head(torch.tanh(self.one(self.embed(tokens))))


class ByIdentity(nn.Module):
    """PEFT's DoRA asks two layers for their product by the identity matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.base, self.head = nn.Linear(12, 26), nn.Linear(26, 20), nn.Linear(20, 10)
        self.lora_a, self.lora_b = nn.Linear(26, 4, bias=False), nn.Linear(4, 20, bias=False)
        self.magnitude = nn.Parameter(torch.rand(20) + 0.5)
        self.within = nn.Parameter(torch.randn(20, 20) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        low = self.lora_b(self.lora_a(torch.eye(26, dtype=x.dtype, device=x.device))).T
        norm = torch.linalg.norm(self.base.weight + 0.5 * low, dim=1)
        x = torch.tanh((self.magnitude / norm) * (self.base(x) + 0.5 * self.lora_b(self.lora_a(x))))
        alone = self.within * (1 - torch.eye(20, 20, dtype=x.dtype, device=x.device))
        return self.head(x + torch.tanh(x @ alone))


class Rotated(nn.Module):
    """PEFT's OFT: each block of features is turned by a matrix of its own, made from the identity repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.turn, self.head = (
            nn.Linear(12, 24),
            nn.Parameter(torch.randn(6, 4, 4) / 4),
            nn.Linear(24, 10),
        )
        self.gain = nn.Parameter(torch.randn(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)).view(-1, 6, 4)
        skew = self.turn - self.turn.transpose(1, 2)
        turned = torch.eye(4, dtype=x.dtype, device=x.device).repeat(6, 1, 1) + skew + torch.bmm(skew, skew)
        x = torch.einsum("bgi,gij->bgj", x, turned).reshape(-1, 24)
        return self.head(torch.tanh(x * self.gain.repeat_interleave(24, 1)))


class Complex(nn.Module):
    """Complex weights, between two real layers and their angles and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary = nn.Linear(12, 20), nn.Linear(12, 20)
        self.weight = nn.Parameter(torch.randn(20, 16, dtype=torch.cfloat))
        self.shift = nn.Parameter(torch.randn(16, dtype=torch.cfloat))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(self.real(x), self.imaginary(x))
        z = z @ self.weight.to(z.dtype) + self.shift.to(z.dtype)
        return self.head(torch.tanh(z.abs()) + torch.polar(torch.tanh(z.real), z.imag).real)


class Pairs(nn.Module):
    """DLRM: the products of all pairs of features, each a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(12, 16)
        self.vectors = nn.Parameter(torch.randn(3, 16))
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.dense(x))
        every = torch.stack([x, *(x * vector for vector in self.vectors)], 1)
        row, column = torch.tril_indices(4, 4, -1)
        return self.head(torch.bmm(every, every.transpose(1, 2))[:, row, column])


NUMBERS = (
    Entry("distributions", Distributions, features(12), 0.99, whole=(10, 12)),
    Entry("drawn", Drawn, features(12), 0.99, whole=(10, 12)),
    Entry("bounded", Bounded, tokens(50), 0.99, sequence=True, whole=(10, 50)),
    Entry("bounded_cubic", lambda: Bounded(3.0), tokens(50), 0.99, sequence=True, whole=(10, 50)),
    Entry("by_identity", ByIdentity, features(12), 0.98, whole=(10, 12)),
    Entry("rotated", Rotated, features(12), 0.98, whole=(10, 12), heads=((6, 4),)),
    Entry("complex", Complex, features(12), 0.99, whole=(10, 12)),
    Entry("pairs", Pairs, features(12), 0.6, whole=(4, 6, 10, 12)),
)
