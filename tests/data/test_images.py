"""Images are those that `datasets` decodes, value by value; what cannot be read is named."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msfusion.data import DataSpec, load_data
from msfusion.data.images import decode_images
from msfusion.errors import DataError

datasets = pytest.importorskip("datasets", reason="needs datasets")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

RAW = {"normalise": False, "partition": "contiguous", "participants": 1}
WriteHub = Callable[..., Path]
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
ORIENTATION = 0x0112


def encoded(image: Any, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(Image.fromarray(PIXELS[:, :, :3]), kind, exif=exif)


def palette(transparent: bool) -> bytes:
    image = Image.fromarray(PIXELS[:, :, :3]).quantize(16)
    # transparency in bytes is what Pillow warns of
    return encoded(image, transparency=bytes(range(16))) if transparent else encoded(image)


def write(write_hub: WriteHub, cells: list[Any], mode: str | None = None) -> Path:
    features = {"image": datasets.Image(mode=mode), "label": datasets.Value("int64")}
    given = [{"bytes": cell, "path": None} if isinstance(cell, bytes) else cell for cell in cells]
    rows = {"image": given, "label": [row % 2 for row in range(len(cells))]}
    return write_hub(features, train=rows, test=rows)


def theirs(folder: Path, mode: str) -> np.ndarray:
    """What `datasets` itself decodes, in the mode that was asked of it."""
    rows = datasets.load_dataset(str(folder), split="test").cast_column("image", datasets.Image(mode=mode))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = np.stack([np.asarray(row["image"]) for row in rows])
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


RGBA = Image.fromarray(PIXELS)
KINDS = {
    "1": (encoded(RGBA.convert("1")), "L"),
    "L": (encoded(RGBA.convert("L")), "L"),
    "LA": (encoded(RGBA.convert("LA")), "L"),
    "P": (palette(False), "RGB"),
    "P with transparency": (palette(True), "RGB"),
    "RGB": (encoded(RGBA.convert("RGB")), "RGB"),
    "RGBA": (encoded(RGBA), "RGB"),
    "CMYK": (encoded(RGBA.convert("RGB").convert("CMYK"), "JPEG"), "RGB"),
    "YCbCr": (encoded(RGBA.convert("RGB").convert("YCbCr"), "TIFF"), "RGB"),
    "GIF": (
        encoded(RGBA.convert("RGB").quantize(8), "GIF", save_all=True, append_images=[RGBA.rotate(90)]),
        "RGB",
    ),
    "WebP": (encoded(RGBA, "WEBP"), "RGB"),
    **{f"JPEG turned {way}": (turned(way, "JPEG"), "RGB") for way in range(1, 9)},
    "PNG turned": (turned(6, "PNG"), "RGB"),
    "TIFF turned": (turned(3, "TIFF"), "RGB"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_datasets(write_hub: WriteHub, kind: str) -> None:
    content, mode = KINDS[kind]
    folder = write(write_hub, [content, content])
    found = load_data(DataSpec(str(folder), **RAW)).test.inputs[0]
    assert torch.equal((found * 255).round().to(torch.uint8), torch.tensor(theirs(folder, mode)))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_mode_that_a_column_declares_is_kept(write_hub: WriteHub, mode: str) -> None:
    folder = write(write_hub, [encoded(RGBA), encoded(RGBA.convert("L"))], mode)
    found = load_data(DataSpec(str(folder), **RAW)).test.inputs[0]
    assert torch.equal((found * 255).round().to(torch.uint8), torch.tensor(theirs(folder, mode)))


def test_an_image_on_its_side_is_turned_before_it_is_resized(write_hub: WriteHub) -> None:
    folder = write(write_hub, [turned(6, "PNG")] * 2)
    found = load_data(DataSpec(str(folder), image_size=3, **RAW)).test.inputs[0][0]
    upright = Image.fromarray(np.rot90(PIXELS[:, :, :3], -1)).resize((3, 3))
    assert torch.equal(
        (found * 255).round().to(torch.uint8), torch.tensor(np.asarray(upright)).permute(2, 0, 1)
    )


DEEP = np.array([[0, 1, 300], [40_000, 65_534, 65_535]], dtype=np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [None, 3])
def test_grey_of_16_bits_keeps_them(write_hub: WriteHub, kind: str, channels: int | None) -> None:
    folder = write(write_hub, [encoded(Image.fromarray(DEEP), kind)] * 2)
    found = load_data(DataSpec(str(folder), channels=channels, **RAW)).test.inputs[0]
    assert found.shape == (2, channels or 1, 2, 3)
    for channel in found.flatten(0, 1):
        assert np.array_equal((channel.double().numpy() * 65535).round(), DEEP)
    small = load_data(DataSpec(str(folder), image_size=4, **RAW)).test.inputs[0]
    assert 0 <= float(small.min()) < 0.01
    assert 0.99 < float(small.max()) <= 1


def test_depths_do_not_mix(write_hub: WriteHub) -> None:
    deep, grey = encoded(Image.fromarray(DEEP)), encoded(Image.new("L", (3, 2)))
    with pytest.raises(DataError, match="image 1 of the training split has 8 bits a pixel and the first 16"):
        load_data(DataSpec(str(write(write_hub, [deep, grey])), **RAW))


def png(width: int, height: int) -> bytes:
    return encoded(Image.new("1", (width, height)))


GOOD = encoded(RGBA)
BROKEN: dict[str, tuple[Any, str]] = {
    "a bomb": (png(20_000, 10_000), "cannot be read: .*pixels"),
    "what Pillow warns of": (png(10_000, 10_000), "cannot be read: .*pixels"),
    "cut off": (encoded(RGBA.resize((50, 50)))[:300], "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "no image": (b"<svg/>", "cannot be read"),
    "no pixels": (GOOD[:16] + bytes(4) + GOOD[20:], "cannot be read|no pixels"),
    "missing": (None, "is missing"),
    "32 bits": (encoded(Image.new("I", (5, 6)), "TIFF"), "pixels of kind I"),
    "real numbers": (encoded(Image.new("F", (5, 6)), "TIFF"), "pixels of kind F"),
    "a program": (encoded(Image.new("L", (5, 6)), "EPS"), "is a program that draws"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_image_that_cannot_be_read_is_named(write_hub: WriteHub, kind: str) -> None:
    broken, words = BROKEN[kind]
    folder = write(write_hub, [*[GOOD] * 5, broken, GOOD])
    with pytest.raises(DataError, match=f"image 5 of the training split .*({words})") as caught:
        load_data(DataSpec(str(folder), image_size=4, **RAW))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "is missing"),
        ("https://example.org/a.png", "no file"),
        ("/dev/zero", "no file"),
        ("pipe", "no file"),
    ],
)
def test_a_path_must_be_that_of_a_file(tmp_path: Path, path: str | None, words: str) -> None:
    if path == "pipe":
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
    cells = [{"bytes": GOOD, "path": None}, {"bytes": None, "path": path}]
    with pytest.raises(DataError, match=f"image 8 of a split .*{words}"):
        decode_images(cells, [7, 8], DataSpec(), "a split")


def test_images_that_no_memory_holds_are_refused(
    write_hub: WriteHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msfusion.data.images.machine_memory", lambda: 100)
    with pytest.raises(
        DataError, match=r"the 2 images of the training split with 5x6 pixels .* data.image_size"
    ):
        load_data(DataSpec(str(write(write_hub, [GOOD, GOOD])), **RAW))
