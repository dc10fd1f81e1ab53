"""Vision models with unusual plumbing: channels-last, concatenation, shuffles, patches, generated weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from zoo_entry import Entry, images


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand, self.reduce = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = self.gamma * self.reduce(F.gelu(self.expand(x)))
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < 0.9 if self.training else 1.0
        return shortcut + x.permute(0, 3, 1, 2) * keep


class ConvNeXt(nn.Module):
    """Channels-last LayerNorm and MLP, layer scale, stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.first = nn.Sequential(ConvNeXtBlock(12), ConvNeXtBlock(12))
        self.weight, self.bias = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12))
        self.down = nn.Conv2d(12, 18, 2, 2)
        self.second = ConvNeXtBlock(18)
        self.norm, self.head = nn.LayerNorm(18), nn.Linear(18, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        centred = x - x.mean(
            1, keepdim=True
        )  # LayerNorm over the channels of an image, as ConvNeXt writes it
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        x = self.second(self.down(self.weight[:, None, None] * x + self.bias[:, None, None]))
        return self.head(self.norm(x.mean([-2, -1])))


def double_conv(inside: int, outside: int) -> nn.Sequential:
    """Two convolutions with batch normalisation, as in every U-Net."""
    first = nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    return nn.Sequential(
        *first, nn.Conv2d(outside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(True)
    )


class UNet(nn.Module):
    """Transposed convolutions going up, skip connections by concatenation, a mask per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = double_conv(3, 6), double_conv(6, 10), double_conv(10, 14)
        self.up2, self.merge2 = nn.ConvTranspose2d(14, 9, 2, 2), double_conv(19, 10)
        self.up1, self.merge1 = nn.ConvTranspose2d(10, 7, 2, 2), double_conv(13, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.middle(F.max_pool2d(two, 2))
        x = self.merge2(torch.cat([self.up2(x), two], dim=1))
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.out(self.merge1(torch.cat([one, self.up1(x)], dim=1)))


class Inception(nn.Module):
    """Parallel branches of different widths, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.one = nn.Conv2d(12, 8, 1)
        self.three = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 10, 3, padding=1))
        self.five = nn.Sequential(nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 7, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(12, 5, 1))
        self.norm = nn.BatchNorm2d(30)
        self.last = nn.Conv2d(30, 16, 3, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([branch(x) for branch in (self.one, self.three, self.five, self.pool)], 1)
        x = F.relu(self.last(F.relu(self.norm(x))))
        return self.head(x.amax((2, 3)))


class ShuffleUnit(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.reduce = nn.Conv2d(width, width, 1, groups=groups)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand = nn.Conv2d(width, width, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.reduce(x))
        batch, channels, height, width = out.size()
        out = out.view(batch, self.groups, channels // self.groups, height, width)
        out = torch.transpose(out, 1, 2).contiguous().view(batch, -1, height, width)
        return F.relu(x + self.expand(self.depthwise(out)))


class ShuffleNet(nn.Module):
    """Grouped convolutions and channel shuffles: little can be narrowed, and the map must say so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = nn.Conv2d(3, 12, 3, 2), nn.Sequential(ShuffleUnit(12, 3), ShuffleUnit(12, 3))
        self.hidden, self.head = nn.Linear(12, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.units(F.relu(self.stem(x)))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


class Mixer(nn.Module):
    """MLP-Mixer: an MLP over the patches, one over the channels. The number of patches stays."""

    def __init__(self, width: int = 14, patches: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.tokens = nn.Sequential(nn.Linear(patches, 22), nn.GELU(), nn.Linear(22, patches))
        self.channels = nn.Sequential(nn.Linear(width, 30), nn.GELU(), nn.Dropout(0.1), nn.Linear(30, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(self.norm(x).mean(1))


class PatchTransformer(nn.Module):
    """A vision transformer with a class token, learned positions, attention by einsum over split heads."""

    def __init__(self, width: int = 24, heads: int = 3, patches: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Linear(48, width)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, patches + 1, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
        self.head = nn.Linear(width, 10)

    def attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).reshape(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = torch.einsum("bhid,bhjd->bhij", query, key) * (width // self.heads) ** -0.5
        mixed = torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), value)
        return self.project(mixed.transpose(1, 2).reshape(batch, time, width))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = x.reshape(batch, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(batch, 16, 48)
        x = torch.cat((self.cls.expand(batch, -1, -1), self.patch(x)), dim=1) + self.positions
        x = x + self.attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class SpatialAttention(nn.Module):
    """CBAM: a map of where to look, from the mean and the maximum over all channels; PReLU slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.slope, self.two = nn.Conv2d(3, 12, 3), nn.PReLU(12), nn.Conv2d(12, 16, 3)
        self.look = nn.Conv2d(2, 1, 7, padding=3)
        self.norm = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)
        self.drop, self.head = nn.Dropout2d(0.2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.one(x))
        where = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        x = self.drop(self.norm(self.two(x * torch.sigmoid(self.look(where)))))
        return self.head(F.adaptive_max_pool2d(F.leaky_relu(x), 1).squeeze(-1).squeeze(-1))


class SuperResolution(nn.Module):
    """Pixel shuffle: the last convolution's channels become pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 16, 5, padding=2), nn.Conv2d(16, 40, 3, padding=1)
        self.three, self.out = nn.Conv2d(10, 12, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(torch.tanh(self.two(torch.tanh(self.one(x)))), 2)
        return F.pixel_shuffle(self.out(torch.tanh(self.three(x))), 2)


class Normalised(nn.Module):
    """Weight normalisation (a parametrisation), weights standardised in forward, and a cosine classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one = weight_norm(nn.Conv2d(3, 12, 3))
        self.two = nn.Conv2d(12, 18, 3)
        self.hidden = weight_norm(nn.Linear(18, 26))
        self.classes = nn.Parameter(torch.randn(10, 26))
        self.temperature = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        weight = self.two.weight
        weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)
        x = F.relu(F.conv2d(x, weight, self.two.bias, stride=2)).mean((-1, -2))
        x = F.normalize(F.relu(self.hidden(x)), dim=-1)
        return self.temperature * F.linear(x, F.normalize(self.classes, dim=-1))


class Autoencoder(nn.Module):
    """A variational autoencoder: noise on the latent variables, the decoder starts by unflattening."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.Flatten()
        )
        self.mean, self.spread = nn.Linear(192, 9), nn.Linear(192, 9)
        self.start = nn.Linear(9, 14 * 16)
        up = (
            nn.ConvTranspose2d(14, 10, 4, 2, 1),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.ConvTranspose2d(10, 1, 4, 2, 1),
        )
        self.decoder = nn.Sequential(nn.Unflatten(1, (14, 4, 4)), nn.ReLU(), *up)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(self.encoder(x))
        mean, spread = self.mean(hidden), self.spread(hidden)
        latent = mean + torch.randn_like(mean) * torch.exp(0.5 * spread) if self.training else mean
        return self.decoder(self.start(latent)), mean, spread


class LocalNorm(nn.Module):
    """AlexNet's normalisation over neighbouring channels: their order matters, so these channels stay."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 12, 3, 2), nn.LocalResponseNorm(3)
        self.two, self.three, self.head = nn.Conv2d(12, 16, 3), nn.Conv2d(16, 20, 3), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(self.norm(F.relu(self.one(x)))))
        return self.head(F.relu(self.three(x)).mean((2, 3)))


VISION = (
    Entry("convnext", ConvNeXt, images(3, 32), 0.99, whole=(3, 10)),
    Entry("unet", UNet, images(3, 16), 0.99, whole=(2, 3), ablates=True),
    Entry("inception", Inception, images(3, 8), 0.99, whole=(3,), ablates=True),
    Entry("shufflenet", ShuffleNet, images(3, 8), 0.2, whole=(3, 10), ablates=True, reasons=("conv2d",)),
    Entry("mixer", Mixer, images(3, 16), 0.98, whole=(3, 10, 16)),
    Entry(
        "patch_transformer", PatchTransformer, images(3, 16), 0.99, whole=(10, 16, 17, 48, 8), heads=((3, 8),)
    ),
    Entry("spatial_attention", SpatialAttention, images(3, 12), 0.8, whole=(3, 10)),
    Entry("super_resolution", SuperResolution, images(1, 8), 0.95, whole=(1, 4), ablates=True),
    Entry("normalised", Normalised, images(3, 12), 0.95, whole=(3, 10)),
    Entry("autoencoder", Autoencoder, images(1, 16), 0.9, whole=(1, 9)),
    Entry("local_norm", LocalNorm, images(3, 16), 0.6, whole=(3, 10), ablates=True, reasons=("conv",)),
)
