"""Images as tensors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, DataError

GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV")


def decode_images(
    cells: Sequence[dict[str, Any]],
    rows: Sequence[int],
    spec: DataSpec,
    holder: str,
    channels: int | None = None,
) -> UInt8[Tensor, "examples channels height width"]:
    """Decode a column of images as `datasets` stores them: `bytes` of a file, or its `path`.

    `rows` are their numbers in the split, for errors. Grey images have 1 channel and others 3, as the first
    one has it unless `channels` says; transparency is dropped.
    Raises DataError, naming the first such image, when one cannot be read, has another size than the first
    (and `spec.image_size` is None), or is coloured where the first is grey.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("reading images needs Pillow: pip install 'msfusion[data]'.") from error
    pixels: np.ndarray | None = None
    for index, (cell, row) in enumerate(zip(cells, rows, strict=True)):
        label = f"image {row} of {holder}"
        try:
            source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
            with Image.open(source) as image:
                channels = channels or _channels(image.mode, label)
                array = np.asarray(_converted(image, channels, spec, label))
        except (OSError, TypeError) as error:
            raise DataError(f"{label} cannot be read: {error}") from error
        if pixels is None:
            pixels = np.empty((len(cells), *array.shape), dtype=np.uint8)
        if array.shape != pixels.shape[1:]:
            raise DataError(
                f"{label} is {array.shape[1]}x{array.shape[0]} pixels and the first is {pixels.shape[2]}x"
                f"{pixels.shape[1]}: set data.image_size to bring all to one size."
            )
        pixels[index] = array
    if pixels is None:
        raise DataError(f"{holder} has no examples.")
    tensor = torch.from_numpy(pixels)
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def normalised(
    train: Num[Tensor, "train channels height width"],
    test: Num[Tensor, "test channels height width"],
    spec: DataSpec,
) -> tuple[Float[Tensor, "train channels height width"], Float[Tensor, "test channels height width"]]:
    """Both as float32 with mean 0 and variance 1 in each channel of the training set; or just in 0 ... 1.

    uint8 images are divided by 255 first. Raises nothing: a constant channel becomes 0.
    """
    scale = 255.0 if train.dtype == torch.uint8 else 1.0
    if not spec.normalise:
        return train.float() / scale, test.float() / scale
    mean, deviation = [], []
    for channel in train.unbind(
        1
    ):  # one after the other: a float64 copy of all would be eight times the images
        values = channel.double() / scale
        mean.append(values.mean())
        deviation.append(values.std(correction=0))
    centre = torch.stack(mean).float()[:, None, None]
    spread = torch.stack(deviation).float().clamp(min=1e-6)[:, None, None]
    return (
        train.float().div_(scale).sub_(centre).div_(spread),
        test.float().div_(scale).sub_(centre).div_(spread),
    )


def _channels(mode: str, label: str) -> int:
    if mode in GREY_MODES:
        return 1
    if mode in COLOUR_MODES:
        return 3
    raise DataError(
        f"{label} has pixels of kind {mode}: only 8-bit grey and colour are read; use module:function."
    )


def _converted(image: Any, channels: int, spec: DataSpec, label: str) -> Any:
    """A PIL image with so many channels, and of the wished-for size."""
    if _channels(image.mode, label) > channels and spec.channels is None:
        raise DataError(f"{label} is coloured and the first image is grey: set data.channels to 3 (or 1).")
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if spec.image_size is not None and image.size != (spec.image_size, spec.image_size):
        image = image.resize((spec.image_size, spec.image_size))
    return image
