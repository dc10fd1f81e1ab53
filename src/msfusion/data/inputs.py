"""How rows of a data set become a model's inputs: fitted to the training examples once, then the same for all others.

What is fitted is an encoding: the size of images, their mean and spread; a vocabulary; the columns of a table. It reads
the test set, and, exported with the model, whatever that is to predict (`data.preprocessing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64, Num
from torch import Tensor

from msfusion.data.columns import Columns, column_values, image_mode, text_values
from msfusion.data.images import decode_images, mean_and_spread
from msfusion.data.spec import DataSpec
from msfusion.data.text import Encoder, encode_texts, padded
from msfusion.errors import DataError

Pixels = Num[Tensor, "examples channels height width"]


@dataclass(frozen=True)
class Chosen:
    """Rows of a split, and what that is called in messages."""

    split: Any
    rows: Tensor
    holder: str

    @classmethod
    def all_of(cls, split: Any, holder: str) -> Chosen:
        """Every row, in order."""
        return cls(split, torch.arange(len(split)), holder)

    def in_file_order(self) -> tuple[Any, Tensor, list[int]]:
        """The split of these rows alone in the file's order (fast), how to bring them back, sorted rows."""
        ordered, position = self.rows.sort()
        wanted = ordered.tolist()
        whole = len(wanted) == len(self.split)
        return self.split if whole else self.split.select(wanted), position.argsort(), wanted


@runtime_checkable
class InputEncoding(Protocol):
    """How some columns become a model's inputs."""

    kind: ClassVar[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """Which columns it reads."""

    @property
    def known(self) -> Mapping[str, Any]:
        """What it says of the data, by the names of `FederatedData`'s fields."""

    def read(self, chosen: Chosen) -> Tensor:
        """The inputs of some rows, examples on axis 0. Raises DataError for what cannot be read."""


@dataclass(frozen=True)
class OneColumn:
    """What is read from one column alone."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """That one."""
        return (self.column,)

    @property
    def known(self) -> Mapping[str, Any]:
        """Nothing that the inputs do not show."""
        return {}


@dataclass(frozen=True)
class Tokens(OneColumn):
    """Texts as ids of tokens: what they are made with, and how many an example has."""

    encoder: Encoder
    length: int

    @property
    def known(self) -> Mapping[str, Any]:
        """The vocabulary."""
        return {
            "vocabulary_size": self.encoder.size,
            "padding": self.encoder.padding,
            "tokens": self.encoder.tokens,
            "tokenizer": self.encoder.name,
        }


@dataclass(frozen=True)
class ImageEncoding(OneColumn):
    """Images of so many channels and pixels, brought to 0 ... 1, then to mean 0 and variance 1 of the training set.

    mode: the Pillow mode to which the column says that they are converted. image_size: all are resized to it.
    converted: colours may be made grey (`DataSpec.channels`). centre, spread: of each channel; None leaves 0 ... 1.
    """

    kind: ClassVar[str] = "image"

    channels: int
    height: int
    width: int
    bits: int = 8
    mode: str | None = None
    image_size: int | None = None
    converted: bool = False
    centre: tuple[float, ...] | None = None
    spread: tuple[float, ...] | None = None

    @classmethod
    def fitted(
        cls, pixels: Pixels, column: str, spec: DataSpec, mode: str | None = None, bits: int | None = None
    ) -> ImageEncoding:
        """To the training images, as `decode_images` gives them."""
        bits = bits or _bits(pixels)
        centre, spread = mean_and_spread(pixels) if spec.normalise else (None, None)
        _, channels, height, width = pixels.shape
        converted = spec.channels is not None
        return cls(column, channels, height, width, bits, mode, spec.image_size, converted, centre, spread)

    def read(self, chosen: Chosen) -> Float32[Tensor, "examples channels height width"]:
        """As `InputEncoding.read`; images of another size or depth than those of the training set are refused."""
        asked = DataSpec(
            image_size=self.image_size, channels=self.channels if self.converted else None
        )  # as far as images go
        pixels = _decoded(chosen, self.column, asked, self.channels)
        if self.bits != _bits(pixels):
            raise DataError(
                f"the images of the training split have {self.bits} bits a pixel and those of {chosen.holder} "
                f"{_bits(pixels)}: bring all to one depth."
            )
        if (self.height, self.width) != tuple(pixels.shape[2:]):
            raise DataError(
                f"the images of the training split are {self.width}x{self.height} pixels and those of {chosen.holder} "
                f"{pixels.shape[3]}x{pixels.shape[2]}: set data.image_size to bring all to one size."
            )
        return self.encode(pixels)

    def encode(self, pixels: Pixels) -> Float32[Tensor, "examples channels height width"]:
        """What the model gets for these pixels, uint8 or float32 in 0 ... 1."""
        images = pixels.to(torch.float32, copy=True)
        if pixels.dtype == torch.uint8:
            images.div_(255.0)
        if self.centre is None or self.spread is None:
            return images
        centre, spread = (torch.tensor(each)[:, None, None] for each in (self.centre, self.spread))
        return images.sub_(centre).div_(spread)


@dataclass(frozen=True)
class TextEncoding(Tokens):
    """Texts to be classified, as `length` token ids each: cut, or filled up with padding."""

    kind: ClassVar[str] = "text"

    def read(self, chosen: Chosen) -> Int64[Tensor, "examples length"]:
        """As `InputEncoding.read`."""
        return self.encode(_texts(chosen, self.column))

    def encode(self, texts: Sequence[str]) -> Int64[Tensor, "examples length"]:
        """The ids of these texts."""
        return padded(self.encoder.encode(texts, self.length), self.length, self.encoder)


@dataclass(frozen=True)
class RunningTextEncoding(Tokens):
    """Running text as token ids, one after the other: what `data.text.blocks` cuts into examples of `length` tokens."""

    kind: ClassVar[str] = "running text"

    def read(self, chosen: Chosen) -> Int64[Tensor, " tokens"]:
        """The ids of all rows' tokens, in order."""
        return self.encode(_texts(chosen, self.column))

    def encode(self, texts: Sequence[str]) -> Int64[Tensor, " tokens"]:
        """The ids of these texts, one after the other."""
        return torch.tensor([*chain.from_iterable(self.encoder.encode(texts))], dtype=torch.int64)


@dataclass(frozen=True)
class NumbersEncoding(OneColumn):
    """A column of lists of numbers, as they are."""

    kind: ClassVar[str] = "numbers"

    def read(self, chosen: Chosen) -> Float32[Tensor, "examples ..."]:
        """As `InputEncoding.read`."""
        rows, back, _ = chosen.in_file_order()
        values = column_values(rows, self.column)
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is found when the inputs are checked
                return torch.from_numpy(np.array(values, dtype=np.float32))[back]
        except (ValueError, TypeError) as error:
            raise DataError(
                f"the column '{self.column}' holds no lists of numbers of one length ({error})."
            ) from error


def encoded(
    train: Chosen, test: Chosen, columns: Columns, spec: DataSpec
) -> tuple[Tensor, Tensor, InputEncoding]:
    """The input columns of both splits as tensors, by an encoding that is fitted to the first."""
    from msfusion.data.table import TableEncoding

    if test.split is train.split and columns.kind == "text":  # a share of it is held out
        test = replace(test, holder=train.holder)
    encoding: InputEncoding
    if columns.kind == "image":
        pixels = _decoded(train, columns.input, spec, spec.channels)
        encoding = ImageEncoding.fitted(pixels, columns.input, spec, image_mode(train.split, columns.input))
        return encoding.encode(pixels), encoding.read(test), encoding
    if columns.kind == "text":
        texts = _texts(train, columns.input), _texts(test, columns.input)
        train_ids, test_ids, encoder = encode_texts(
            spec.tokenizer or "words", *texts, spec.vocabulary_size, spec.length
        )
        encoding = TextEncoding(columns.input, encoder, spec.length)
        return padded(train_ids, spec.length, encoder), padded(test_ids, spec.length, encoder), encoding
    if columns.kind == "numbers":
        encoding = NumbersEncoding(columns.input)
    else:
        encoding = TableEncoding.fitted(train, columns.inputs, spec)
    return encoding.read(train), encoding.read(test), encoding


def _decoded(chosen: Chosen, column: str, spec: DataSpec, channels: int | None) -> Pixels:
    rows, back, numbers = chosen.in_file_order()
    cells, mode = column_values(rows, column), image_mode(chosen.split, column)
    return decode_images(cells, numbers, spec, chosen.holder, channels, mode)[back]


def _bits(images: Tensor) -> int:
    """Of a pixel, before it was decoded."""
    return 8 if images.dtype == torch.uint8 else 16


def _texts(chosen: Chosen, column: str) -> Sequence[str]:
    rows, back, numbers = chosen.in_file_order()
    values = text_values(rows, column, chosen.holder, numbers)
    return [values[index] for index in back.tolist()]
