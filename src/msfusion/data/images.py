"""Images as tensors."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor

from msfusion.data.spec import DataSpec
from msfusion.errors import DataError, MsfusionError
from msfusion.extras import needing
from msfusion.imports import in_one_line
from msfusion.memory import machine_memory

GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV")
PROGRAMS = ("EPS", "WMF")
"""Formats that are programs in a language of their own, which other software would have to run."""


def decode_images(
    cells: Sequence[dict[str, Any] | None],
    rows: Sequence[int],
    spec: DataSpec,
    holder: str,
    channels: int | None = None,
    mode: str | None = None,
) -> Num[Tensor, "examples channels height width"]:
    """Decode a column of images as `datasets` stores them: `bytes` of a file, or its `path`.

    Pixels are those that `datasets.Image(mode)` gives: the first frame, turned as its EXIF orientation says. Grey
    images have 1 channel and others 3, as the first one has it unless `channels` says; transparency is dropped, and a
    grey image among coloured ones has its value in all three. The result is uint8; for 16-bit grey images float32,
    where 1 is white. `rows` are the images' numbers in the split, for errors.
    Raises DataError, naming the first such image, when one is missing, cannot be read, is larger than Pillow deems
    safe, has another size than the first (and `spec.image_size` is None), another depth, or is coloured where the
    first is grey.
    """
    with needing("data", "reading images"):
        import PIL.Image
    pixels: np.ndarray | None = None
    for index, (cell, row) in enumerate(zip(cells, rows, strict=True)):
        label = f"image {row} of {holder}"
        try:
            with _bombs_are_errors(), PIL.Image.open(_source(cell, label)) as opened:
                image = _decoded(opened, mode, label)
                channels = channels or _channels(image, label)
                array = _array(image, channels, spec, label)
        except MsfusionError:
            raise
        except (
            Exception
        ) as error:  # Pillow raises many kinds: SyntaxError, struct.error and zlib.error among them
            raise DataError(f"{label} cannot be read: {in_one_line(error)}") from error
        if pixels is None:
            pixels = _room_for(len(cells), array, holder)
        _require_same(array, pixels, label)
        pixels[index] = array
    if pixels is None:
        raise DataError(f"{holder} has no examples.")
    tensor = torch.from_numpy(pixels)
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def mean_and_spread(
    images: Num[Tensor, "examples channels height width"],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel the mean and the standard deviation, of pixels in 0 ... 1, as float32 has them.

    uint8 images are divided by 255 first. The deviation of a constant channel is 1e-6.
    """
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    mean, deviation = [], []
    for channel in images.unbind(
        1
    ):  # one after the other: a float64 copy of all would be eight times the images
        values = channel.double() / scale
        mean.append(values.mean())
        deviation.append(values.std(correction=0))
    centre, spread = torch.stack(mean).float(), torch.stack(deviation).float().clamp(min=1e-6)
    return tuple(centre.tolist()), tuple(spread.tolist())


@contextmanager
def _bombs_are_errors() -> Iterator[None]:
    """A small file of an enormous image is refused; what else Pillow warns of changes no pixel."""
    from PIL.Image import DecompressionBombWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", DecompressionBombWarning)
        yield


def _source(cell: dict[str, Any] | None, label: str) -> Any:
    """What Pillow opens: the bytes, or the path of a regular file (a pipe or device might never end)."""
    content, path = (None, None) if cell is None else (cell.get("bytes"), cell.get("path"))
    if content is not None:
        return io.BytesIO(content)
    if path is None:
        raise DataError(f"{label} is missing: leave such rows out.")
    if not Path(path).is_file():
        raise DataError(f"{label} cannot be read: there is no file {path}.")
    return path


def _decoded(image: Any, mode: str | None, label: str) -> Any:
    """The image upright and in the mode of its column, as `datasets` decodes it."""
    from PIL import ExifTags, ImageOps

    if image.format in PROGRAMS:
        raise DataError(
            f"{label} is a program that draws ({image.format}), which is never run: save it as PNG."
        )
    if not (image.width and image.height):
        raise DataError(f"{label} has no pixels: it is {image.width}x{image.height}.")
    kind = image.format
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation) is not None:
        image = ImageOps.exif_transpose(image)
    if mode is not None and image.mode != mode:
        image = image.convert(mode)
    if image.mode == "I" and kind == "PNG":  # so Pillow below 11.3 calls 16 bits
        image = image.convert("I;16")
    return image


def _is_deep(image: Any) -> bool:
    """Whether it is grey with 16 bits a pixel, of which Pillow's conversions keep 8 at most."""
    return bool(image.mode.startswith("I;16"))


def _channels(image: Any, label: str) -> int:
    if image.mode in GREY_MODES or _is_deep(image):
        return 1
    if image.mode in COLOUR_MODES:
        return 3
    raise DataError(
        f"{label} has pixels of kind {image.mode}: only grey of 8 or 16 bits and 8-bit colour are read; use "
        "module:function."
    )


def _array(image: Any, channels: int, spec: DataSpec, label: str) -> np.ndarray:
    """The pixels of a PIL image with so many channels, and of the wished-for size."""
    if _channels(image, label) > channels and spec.channels is None:
        raise DataError(f"{label} is coloured and the first image is grey: set data.channels to 3 (or 1).")
    deep = _is_deep(image)
    wanted = "F" if deep else "L" if channels == 1 else "RGB"
    if image.mode != wanted:
        image = image.convert(wanted)
    if spec.image_size is not None and image.size != (spec.image_size, spec.image_size):
        image = image.resize((spec.image_size, spec.image_size))
    if not deep:
        return np.asarray(image)
    grey = np.asarray(image).clip(0, 65535) / np.float32(65535)  # resizing can overshoot
    return grey if channels == 1 else np.repeat(grey[:, :, None], 3, axis=2)


def _room_for(examples: int, array: np.ndarray, holder: str) -> np.ndarray:
    """Uninitialised pixels of so many images like this one. Raises DataError where this machine cannot hold them."""
    wanted = examples * array.nbytes
    if wanted > machine_memory():
        raise DataError(
            f"the {examples} images of {holder} with {array.shape[1]}x{array.shape[0]} pixels take "
            f"{wanted / 1e9:,.0f} GB, more than this machine has: lower data.image_size or data.max_train."
        )
    return np.empty((examples, *array.shape), dtype=array.dtype)


def _require_same(array: np.ndarray, pixels: np.ndarray, label: str) -> None:
    """Raise DataError where an image is not like the first."""
    if array.shape != pixels.shape[1:]:
        raise DataError(
            f"{label} is {array.shape[1]}x{array.shape[0]} pixels and the first is {pixels.shape[2]}x"
            f"{pixels.shape[1]}: set data.image_size to bring all to one size."
        )
    if array.dtype != pixels.dtype:
        depth = {"uint8": 8, "float32": 16}
        raise DataError(
            f"{label} has {depth[str(array.dtype)]} bits a pixel and the first {depth[str(pixels.dtype)]}: bring "
            "all to one depth."
        )
