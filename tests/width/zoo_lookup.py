"""Models that look up, pick and write at positions: masks, bags, relative positions, experts chosen by number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import Entry, images, tokens


class PickedByMask(nn.Module):
    """A boolean mask picks tokens; what is worked out for them is written back where they stood."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(50, 18), nn.Linear(18, 26), nn.Linear(26, 18)
        self.head = nn.Linear(18, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        picked = tokens > 20
        written = torch.zeros_like(x)
        written[picked] = self.down(torch.relu(self.up(x[picked])))
        return self.head(x + written)


class Bags(nn.Module):
    """Sums, means and maxima of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(50, 14, mode=mode) for mode in ("sum", "mean", "max"))
        self.hidden, self.head = nn.Linear(14, 22), nn.Linear(22, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(sum(bag(tokens) for bag in self.bags))))


class ScatteredAndGathered(nn.Module):
    """Features are added up in numbered bins, and read from them again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(50, 18), nn.Linear(18, 24), nn.Linear(24, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embed(tokens)))
        bins = (tokens % 4).unsqueeze(-1).expand_as(x)
        sums = x.new_zeros(x.shape[0], 4, x.shape[2]).scatter_add(1, bins, x)
        return self.head(x + torch.gather(sums, 1, bins))


class AddedAtPositions(nn.Module):
    """Whole rows are added at numbered positions, and rows replace those that a mask points to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.other, self.head = nn.Embedding(50, 18), nn.Embedding(50, 18), nn.Linear(18, 10)
        self.inner = nn.Linear(18, 18)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x.masked_scatter((tokens < 9).unsqueeze(-1).expand_as(x), self.other(tokens))
        counts = torch.zeros(50, 18).index_add(0, tokens.flatten(), self.inner(x).flatten(0, 1))
        return self.head(torch.tanh(counts[tokens]) + x)


class RepeatedTo(nn.Module):
    """Few features are repeated to many, with the size of the result told (Mamba2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.few = nn.Embedding(50, 18), nn.Linear(18, 8)
        self.gain, self.head = nn.Parameter(torch.randn(16)), nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.few(self.embed(tokens)).repeat_interleave(2, dim=-1, output_size=16)
        return self.head(torch.relu(x * self.gain))


class DottedEinsum(nn.Module):
    """Attention with `...` in its equations (LongT5), masked by a slice of a tensor of ones (GIT)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(50, 18), nn.Parameter(torch.randn(3, 18, 4, 6) / 4)
        self.out, self.head = nn.Parameter(torch.randn(4, 6, 18)), nn.Linear(18, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = torch.einsum("...te,zehd->z...thd", x, self.qkv)
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) / 6**0.5
        scores = scores + torch.ones_like(x)[:, :, 0][:, None, None, :]
        mixed = torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)
        return self.head(x + torch.einsum("...hd,hde->...e", mixed, self.out))


class Windows(nn.Module):
    """Windows of an image as columns, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 9, 6 * 9)
        self.head = nn.Linear(6, 10)

    def forward(self, image: Tensor) -> Tensor:
        columns = F.unfold(F.relu(self.one(image)), 3, padding=1).transpose(1, 2)
        columns = F.relu(self.two(columns)).transpose(1, 2)
        return self.head(F.fold(columns, image.shape[-2:], 3, padding=1).mean((2, 3)))


LOOKUP = (
    Entry("picked_by_mask", PickedByMask, tokens(50), 0.99, sequence=True, whole=(10, 50), ablates=True),
    Entry("bags", Bags, tokens(50), 0.99, sequence=True, whole=(10, 50), ablates=True),
    Entry(
        "scattered", ScatteredAndGathered, tokens(50), 0.99, sequence=True, whole=(4, 10, 50), ablates=True
    ),
    Entry(
        "added_at_positions", AddedAtPositions, tokens(50), 0.99, sequence=True, whole=(10, 50), ablates=True
    ),
    Entry("repeated_to", RepeatedTo, tokens(50), 0.99, sequence=True, whole=(10, 16, 50), ablates=True),
    Entry("dotted_einsum", DottedEinsum, tokens(50), 0.99, sequence=True, whole=(6, 10, 50), heads=((4, 1),)),
    Entry("windows", Windows, images(3, 6), 0.97, whole=(3, 9, 10), ablates=True),
)
