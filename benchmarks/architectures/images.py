"""Networks for images, written by hand as people write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from architectures.entry import Architecture, Inputs
from torch import Tensor, nn


def images(examples: int, length: int) -> Inputs:
    """Pictures of 16 pixels."""
    return (torch.randn(examples, 3, 16, 16),)


class PlainCNN(nn.Module):
    """Two convolutions, pooling, and a classifier on the flattened rest."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.fc1, self.fc2, self.drop = nn.Linear(24 * 4 * 4, 48), nn.Linear(48, 10), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 24 * 4 * 4)
        return F.log_softmax(self.fc2(self.drop(F.relu(self.fc1(x)))), dim=1)


def vgg() -> nn.Module:
    """Blocks of convolution, BatchNorm and ReLU, from a list as torchvision's."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, "pool", 24, 24, "pool", 32, "pool"):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * 4, 48), nn.ReLU(True), nn.Dropout(), nn.Linear(48, 10)
    )


class BasicBlock(nn.Module):
    """ResNet's block, with the shortcut of option B."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """The ResNet for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layers = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 32, 2))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.norm(self.stem(x))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class Bottleneck(nn.Module):
    """Pre-activation bottleneck with grouped convolution (ResNeXt)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 16, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=groups), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DenseNet(nn.Module):
    """Each layer reads all that came before it."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(16 + i * growth), nn.ReLU(), nn.Conv2d(16 + i * growth, growth, 3, padding=1)
            )
            for i in range(3)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(self.transition(torch.cat(features, dim=1)).mean((2, 3)))


class Inception(nn.Module):
    """Branches of several kernel sizes side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 1)
        self.three = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
        self.five = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 8, 1))
        self.aux, self.head = nn.Linear(40, 10), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([branch(x) for branch in (self.one, self.three, self.five, self.pool)], 1).relu()
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return (self.head(pooled), self.aux(pooled)) if self.training else self.head(pooled)


class UNet(nn.Module):
    """Down, up, and skip connections that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self.block(3, 8), self.block(8, 16), self.block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.left2, self.left1, self.head = self.block(32, 16), self.block(16, 8), nn.Conv2d(8, 4, 1)

    @staticmethod
    def block(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.SiLU(),
            nn.Conv2d(outer, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.SiLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.up2(self.bottom(F.max_pool2d(two, 2)))
        x = self.left2(torch.cat([two, x], dim=1))
        return self.head(self.left1(torch.cat([one, self.up1(x)], dim=1)))


class InvertedResidual(nn.Module):
    """MobileNet's block: wide, one channel at a time, narrow; with squeeze and excitation as in version 3."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        hidden = inner * 3
        self.same = stride == 1 and inner == outer
        self.expand = nn.Sequential(
            nn.Conv2d(inner, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(hidden, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, hidden, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outer, 1, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if self.same else y


def mobilenet() -> nn.Module:
    """Three inverted residuals and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(), InvertedResidual(8, 8, 1),
        InvertedResidual(8, 16, 2), InvertedResidual(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 32), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(32, 10),
    )  # fmt: skip


class ShuffleUnit(nn.Module):
    """ShuffleNet's unit: half of the channels pass, the rest is convolved, then both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, half, 3, 1, 1, groups=half),
            nn.BatchNorm2d(half), nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        out = torch.cat((left, self.branch(right)), dim=1)
        examples, channels, height, width = out.size()
        out = out.view(examples, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return out.view(examples, -1, height, width)


class SEBlock(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = x.mean((2, 3)).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1).expand_as(x)


class CBAM(nn.Module):
    """Attention over channels and over places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * weight[:, :, None, None]
        place = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.conv(place))


class ConvNeXtBlock(nn.Module):
    """ConvNeXt's block: channels last for the norm and the MLP, and a scale for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.narrow(F.gelu(self.wide(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ChannelsFirstNorm(nn.Module):
    """LayerNorm over channels that come first, by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def convnext() -> nn.Module:
    """Patches, two blocks, a norm between."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), ChannelsFirstNorm(16), ConvNeXtBlock(16), ChannelsFirstNorm(16),
        nn.Conv2d(16, 24, 2, 2), ConvNeXtBlock(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(24),
        nn.Linear(24, 10),
    )  # fmt: skip


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


def resnext() -> nn.Module:
    """Grouped convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), Bottleneck(24, 4), Bottleneck(24, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 10),
    )  # fmt: skip


def shufflenet() -> nn.Module:
    """Two units that shuffle."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), ShuffleUnit(16), ShuffleUnit(16), nn.Conv2d(16, 32, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def attended(block: nn.Module) -> nn.Module:
    """A convolution whose channels are weighted by a block."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), block, nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, 10),
    )  # fmt: skip


def _image(name: str, style: str, model: Any) -> Architecture:
    return Architecture(name, "hand-written", style, model, images)


IMAGES = [
    _image("cnn", "the tutorial's network: view(-1, ...), log_softmax", PlainCNN),
    _image("vgg", "Sequential from a list, BatchNorm, in-place ReLU", vgg),
    _image("cifar-resnet", "residuals added in place, shortcuts", ResNet),
    _image("resnext", "grouped convolutions, pre-activation", resnext),
    _image("densenet", "growing concatenation", DenseNet),
    _image("inception", "branches side by side, an auxiliary head in training", Inception),
    _image("u-net", "skip connections, GroupNorm, transposed convolutions", UNet),
    _image("mobilenet", "depthwise convolutions, inverted residuals", mobilenet),
    _image("shufflenet", "channel split and shuffle", shufflenet),
    _image("squeeze-excite", "channel attention with view and expand_as", lambda: attended(SEBlock(16))),
    _image("cbam", "attention over channels and places", lambda: attended(CBAM(16))),
    _image("convnext-by-hand", "channels last, a norm by hand, layer scale", convnext),
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
