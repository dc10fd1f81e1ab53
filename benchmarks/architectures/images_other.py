"""Networks for images that are more than convolutions and a classifier, written by hand as people write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.entry import Architecture
from architectures.images import images


class MixerBlock(nn.Module):
    """MLP-Mixer's block: an MLP over the places, then one over the channels."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(places, 24), nn.GELU(), nn.Linear(24, places))
        self.channels = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer on 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = (
            nn.Conv2d(3, 32, 4, 4),
            nn.Sequential(MixerBlock(16, 32), MixerBlock(16, 32)),
        )
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x).flatten(2).transpose(1, 2))).mean(1))


class PatchAttention(nn.Module):
    """Self-attention as timm writes it: one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """A pre-norm block of a transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = (
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            PatchAttention(width, heads),
        )
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, 32))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, 32))
        self.blocks, self.norm, self.head = (
            nn.Sequential(Block(32, 4), Block(32, 4)),
            nn.LayerNorm(32),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowBlock(nn.Module):
    """Swin's block: attention within windows, shifted by a roll, with a table of relative positions."""

    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.heads, self.shift, self.norm = heads, shift, nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(0.02 * torch.randn(49, heads))
        place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = (place[:, :, None] - place[:, None, :]).permute(1, 2, 0) + 3
        self.register_buffer("index", apart[..., 0] * 7 + apart[..., 1])
        self.index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5 + bias.unsqueeze(0)).softmax(-1)
        y = self.proj((weights @ v).transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return x + torch.roll(y, (self.shift, self.shift), (1, 2))


class Swin(nn.Module):
    """Two stages with patch merging by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Conv2d(3, 16, 2, 2), WindowBlock(16, 4, 0), WindowBlock(16, 4, 2)
        self.norm, self.merge, self.three = (
            nn.LayerNorm(64),
            nn.Linear(64, 32, bias=False),
            WindowBlock(32, 4, 0),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.embed(x).permute(0, 2, 3, 1)))
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        x = self.three(self.merge(self.norm(torch.cat(parts, -1))))
        return self.head(x.mean((1, 2)))


class VAE(nn.Module):
    """A variational autoencoder that returns what its loss needs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 4, 2, 1), nn.ReLU()
        )
        self.mean, self.logvar, self.back = nn.Linear(384, 8), nn.Linear(384, 8), nn.Linear(8, 384)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.flatten(self.encoder(x), start_dim=1)
        mean, logvar = self.mean(h), self.logvar(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar) if self.training else mean
        return self.decoder(self.back(z).view(-1, 24, 4, 4)), mean, logvar


class Discriminator(nn.Module):
    """DCGAN's discriminator with the standard deviation over the mini-batch as a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2, inplace=True),
        )  # fmt: skip
        self.last = nn.Conv2d(33, 1, 4, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        spread = x.var(0, unbiased=False).add(1e-8).sqrt().mean().view(1, 1, 1, 1)
        x = torch.cat([x, spread.expand(x.size(0), 1, x.size(2), x.size(3))], 1)
        return self.last(x).view(-1)


class Capsules(nn.Module):
    """Capsules with routing by agreement."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.primary = nn.Conv2d(3, 16, 5, 2), nn.Conv2d(16, 4 * 8, 3, 2)
        self.weight = nn.Parameter(0.05 * torch.randn(16, 5, 12, 8))

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        square = (x**2).sum(-1, keepdim=True)
        return square / (1 + square) * x / torch.sqrt(square + 1e-8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(F.relu(self.conv(x)))
        u = self.squash(x.view(x.size(0), 4, 8, 4).transpose(2, 3).reshape(x.size(0), 16, 8))
        votes = torch.einsum("pcok,bpk->bpco", self.weight, u)
        logits = torch.zeros(x.size(0), 16, 5, device=x.device, dtype=x.dtype)
        for turn in range(3):
            v = self.squash((logits.softmax(-1).unsqueeze(-1) * votes).sum(1))
            if turn < 2:
                logits = logits + (votes * v.unsqueeze(1)).sum(-1)
        return v.norm(dim=-1)


class FourierMixer(nn.Module):
    """A Fourier neural operator's layer: complex weights on the low frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)
        self.weight = nn.Parameter(0.1 * torch.randn(16, 16, 4, 4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        found = torch.fft.rfft2(x)
        out = torch.zeros_like(found)
        out[:, :, :4, :4] = torch.einsum("bixy,ioxy->boxy", found[:, :, :4, :4], self.weight.to(found.dtype))
        return self.head(F.gelu(torch.fft.irfft2(out, s=(16, 16)) + self.skip(x)))


class SpatialTransformer(nn.Module):
    """A network that turns its picture before it reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.find = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 6))
        self.read = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.find(x).view(-1, 2, 3), list(x.size()), align_corners=False)
        return self.read(F.grid_sample(x, grid, align_corners=False))


class Pyramid(nn.Module):
    """A detector's feature pyramid: several scales are returned by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.in1, self.in2, self.smooth = (
            nn.Conv2d(16, 12, 1),
            nn.Conv2d(24, 12, 1),
            nn.Conv2d(12, 12, 3, 1, 1),
        )
        self.boxes, self.classes = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.one(x).relu()
        coarse = self.two(fine).relu()
        top = self.in2(coarse)
        middle = self.smooth(self.in1(fine) + F.interpolate(top, scale_factor=2, mode="nearest"))
        flat = [h.flatten(2) for h in (middle, top)]
        return {
            "boxes": self.boxes(middle), "classes": self.classes(top), "all": torch.cat(flat, 2).amax(2).mean(1)
        }  # fmt: skip


class PixelShuffle(nn.Module):
    """Super-resolution by a sub-pixel convolution (ESPCN)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (
            nn.Conv2d(3, 24, 5, 1, 2),
            nn.Conv2d(24, 16, 3, 1, 1),
            nn.Conv2d(16, 12, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.three(torch.tanh(self.two(torch.tanh(self.one(x))))), 2)


def _image(name: str, style: str, model: Any) -> Architecture:
    return Architecture(name, "hand-written", style, model, images)


OTHER_IMAGES = [
    _image("mlp-mixer", "an MLP over places", Mixer),
    _image("vit-by-hand", "class token, one projection for q, k and v", ViT),
    _image("swin-like", "shifted windows, relative positions, patch merging", Swin),
    _image("vae", "draws noise in training; several outputs", VAE),
    _image("gan-discriminator", "standard deviation over the mini-batch", Discriminator),
    _image("capsules", "routing by agreement, einsum", Capsules),
    _image("fourier-operator", "complex weights, FFT, assignment to a slice", FourierMixer),
    _image("spatial-transformer", "grid_sample", SpatialTransformer),
    _image("feature-pyramid", "dictionary of outputs, interpolation by a factor", Pyramid),
    _image("super-resolution", "pixel_shuffle", PixelShuffle),
]
