"""Small convolutional networks for images: a residual network and a plain one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from msfusion.errors import ConfigError


def normalisation(kind: str, channels: int, channels_per_norm_group: int) -> nn.Module:
    """A normalisation of that kind over some channels.

    `group`: GroupNorm over groups of a few channels each. A norm group is then one unit of the width map:
    nothing is pooled across units, so a narrow model computes for the units that it holds the very statistics
    of the full one. Many small groups keep the units fine. `layer`: one group of all channels (a unit is one
    channel, but its statistics change with what else is held). `none`: nothing. There is no `batch`: running
    statistics of narrow models are not those of the fused one. Raises ConfigError when the groups do not
    divide the channels.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "layer":
        return nn.GroupNorm(1, channels)
    if kind != "group":
        raise ConfigError(f"model.options.norm = '{kind}' must be one of group, layer, none.")
    if channels_per_norm_group < 1 or channels % channels_per_norm_group:
        raise ConfigError(
            f"model.options.channels_per_norm_group = {channels_per_norm_group} must divide every width; "
            f"it does not divide {channels}."
        )
    return nn.GroupNorm(channels // channels_per_norm_group, channels)


def channels_last(
    images: Float[Tensor, "examples channels height width"],
) -> Float[Tensor, "examples channels height width"]:
    """The same images with the channels of a pixel side by side in memory, as will be all that follows.

    On CPUs pooling is then vectorised: narrow networks train 1.2 to 1.3 times, and evaluate twice as fast.
    """
    return images.contiguous(memory_format=torch.channels_last)


def _convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = False
) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., arXiv 1512.03385, figure 2), with GroupNorm."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, norm: str, channels_per_norm_group: int
    ) -> None:
        super().__init__()
        self.convolution1 = _convolution(in_channels, channels, 3, stride)
        self.norm1 = normalisation(norm, channels, channels_per_norm_group)
        self.convolution2 = _convolution(channels, channels, 3)
        self.norm2 = normalisation(norm, channels, channels_per_norm_group)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                _convolution(in_channels, channels, 1, stride),
                normalisation(norm, channels, channels_per_norm_group),
            )

    def forward(
        self, images: Float[Tensor, "examples in_channels height width"]
    ) -> Float[Tensor, "examples channels smaller_height smaller_width"]:
        """Height and width are divided by the stride, rounded up."""
        inside = functional.relu(self.norm1(self.convolution1(images)))
        return functional.relu(self.norm2(self.convolution2(inside)) + self.shortcut(images))


class ResNet(nn.Module):
    """A residual network for small images: each stage after the first halves height and width."""

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int | Sequence[int] = 1,
        norm: str = "group",
        channels_per_norm_group: int = 4,
        stem_stride: int = 1,
    ) -> None:
        """widths: channels of each stage. blocks: residual blocks of each stage (one number for all).

        stem_stride: 2 or 4 for images much larger than 64 pixels. Raises ConfigError for sizes that do not
        fit.
        """
        super().__init__()
        counts = [blocks] * len(widths) if isinstance(blocks, int) else list(blocks)
        require_positive(
            in_channels=in_channels, classes=classes, widths=widths, blocks=counts, stem_stride=stem_stride
        )
        if len(counts) != len(widths):
            raise ConfigError(f"model.options.blocks has {len(counts)} stages and widths has {len(widths)}.")
        self.stem = _convolution(in_channels, widths[0], 3, stem_stride)
        self.stem_norm = normalisation(norm, widths[0], channels_per_norm_group)
        stages, channels = [], widths[0]
        for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(ResidualBlock(channels, width, stride, norm, channels_per_norm_group))
                channels = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(
        self, images: Float[Tensor, "examples in_channels height width"]
    ) -> Float[Tensor, "examples classes"]:
        """Images to logits."""
        features = self.blocks(functional.relu(self.stem_norm(self.stem(channels_last(images)))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class ConvNet(nn.Module):
    """Plain 3x3 convolutions in stages, each followed by 2x2 pooling; a linear head over all channels and positions.

    With widths (64, 128, 256, 512, 512) and convolutions (1, 1, 2, 2, 2) it has the shape of VGG-11 (Simonyan &
    Zisserman, ICLR 2015) without its hidden linear layers, as is usual for small images.

    Without shortcuts it learns slowly from the mean over positions (Fashion-MNIST, 6,000 images, one epoch of
    AdamW: 0.55 against 0.80), so the head keeps them.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        image_size: int | tuple[int, int] = (28, 28),
        widths: Sequence[int] = (64, 128, 128),
        convolutions: int | Sequence[int] = 1,
        norm: str = "group",
        channels_per_norm_group: int = 4,
    ) -> None:
        """image_size: height and width in pixels. widths: channels of each stage. convolutions: how many each
        stage has (one number for all).

        Raises ConfigError for sizes that do not fit.
        """
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        counts = [convolutions] * len(widths) if isinstance(convolutions, int) else list(convolutions)
        require_positive(
            in_channels=in_channels,
            classes=classes,
            widths=widths,
            convolutions=counts,
            image_size=(height, width),
        )
        if len(counts) != len(widths):
            raise ConfigError(
                f"model.options.convolutions has {len(counts)} stages and widths has {len(widths)}."
            )
        layers: list[nn.Module] = []
        before = in_channels
        for channels, count in zip(widths, counts, strict=True):
            for _ in range(count):
                layers += [
                    _convolution(before, channels, 3, bias=norm == "none"),
                    normalisation(norm, channels, channels_per_norm_group),
                    nn.ReLU(),
                ]
                before = channels
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * height * width, classes)

    def forward(
        self, images: Float[Tensor, "examples in_channels height width"]
    ) -> Float[Tensor, "examples classes"]:
        """Images to logits."""
        logits: Tensor = self.head(self.layers(channels_last(images)).flatten(1))
        return logits


def require_positive(**sizes: int | Sequence[int]) -> None:
    """Raise ConfigError, naming the option, when a size, or any of several, is not at least 1."""
    for name, size in sizes.items():
        every = [size] if isinstance(size, int) else list(size)
        if not every or min(every) < 1:
            raise ConfigError(f"model.options.{name} = {size} must be at least 1.")
