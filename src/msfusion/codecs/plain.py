"""The shortest way to a codec of one's own: values to bytes and back; headers, types and checks are done here."""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from msfusion.codecs.codec import Codec, Encoded, in_float32, not_finite
from msfusion.codecs.header import MOST_SETTINGS, Header
from msfusion.codecs.operations import Operations
from msfusion.errors import CodecError, ConfigError

Values = np.ndarray[tuple[int], np.dtype[np.float32]]


class PlainCodec(Codec):
    """A codec that is written as two functions on float32 values; its settings are the fields of its dataclass.

        @msfusion.codecs.register
        @dataclass(frozen=True)
        class Signs(PlainCodec):
            name: ClassVar[str] = "signs"
            number: ClassVar[int] = 200

            def to_bytes(self, values): ...
            def from_bytes(self, payload, count): ...
            def most_bytes(self, count): ...

    Settings are numbers, at most four; they travel in the header, as float64.
    """

    settings_size: ClassVar[int] = 0

    @abstractmethod
    def to_bytes(self, values: Values) -> bytes:
        """The payload of values in row-major order, all finite, at least one. The same for the same values."""

    @abstractmethod
    def from_bytes(self, payload: bytes, count: int) -> Values:
        """So many values from a payload of at most `most_bytes`. Bytes that are none raise CodecError or ValueError."""

    @abstractmethod
    def most_bytes(self, count: int) -> int:
        """The longest payload of so many values: a longer one is refused before it is read."""

    def _settings_size(self) -> int:
        return len(_packed(self))

    def _encode(self, tensor: Float[Tensor, "..."], operations: Operations) -> Encoded:
        values = in_float32(tensor.cpu()).numpy()
        if not np.isfinite(values).all():
            raise not_finite(self.name)
        return False, _packed(self), [self.to_bytes(values)] if len(values) else []

    def _payload_size(self, shape: Sequence[int], dtype: torch.dtype, signed: bool) -> int:
        count = math.prod(shape)
        return self.most_bytes(count) if count else 0

    def _check_settings(self, header: Header) -> None:
        if header.settings != _packed(self):
            raise CodecError(f"a message of {self.name} with other settings than are spoken here.")

    @classmethod
    def _check_message(cls, header: Header, payload: memoryview) -> None:
        codec = _with_settings(cls, header)
        try:
            most = codec.most_bytes(header.elements) if header.elements else 0
        except Exception as error:  # of settings that no encoder has
            raise CodecError(f"the header of a message is damaged: {error}") from error
        if header.signed or len(payload) > most:
            raise CodecError(f"a payload of {len(payload)} bytes, and {cls.name} needs at most {most}.")

    @classmethod
    def _decode(
        cls, header: Header, payload: memoryview, out: Float[Tensor, " elements"], operations: Operations
    ) -> None:
        codec = _with_settings(cls, header)
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is found below
                values = np.asarray(codec.from_bytes(bytes(payload), header.elements)).astype(np.float32)
        except CodecError:
            raise
        except Exception as error:  # whatever another's codec makes of bytes that are none
            raise CodecError(f"the payload of a message is none of {cls.name} ({error}).") from error
        if values.shape != (header.elements,) or not np.isfinite(values).all():
            raise CodecError(
                f"the payload of a message is none of {cls.name}: not {header.elements} finite values."
            )
        out.copy_(torch.from_numpy(values))


def _settings(codec: Any) -> tuple[Field[Any], ...]:
    return fields(codec) if hasattr(codec, "__dataclass_fields__") else ()


def _packed(codec: Codec) -> bytes:
    """The settings as they stand in a header."""
    values = [float(getattr(codec, each.name)) for each in _settings(codec)]
    packed = struct.pack(f"<{len(values)}d", *values)
    if len(packed) > MOST_SETTINGS:
        raise ConfigError(f"the codec {codec.name} has {len(values)} settings: four numbers are the most")
    return packed


def _with_settings(codec: type[PlainCodec], header: Header) -> PlainCodec:
    """The codec with the settings of a message. Raises CodecError where it would not have them."""
    own = _settings(codec)
    if len(header.settings) != 8 * len(own):
        raise CodecError(f"the header of a message is damaged: {codec.name} has {len(own)} settings.")
    values = struct.unpack(f"<{len(own)}d", header.settings)
    try:
        typed = {
            each.name: int(v) if each.type in (int, "int") else v for each, v in zip(own, values, strict=True)
        }
        return codec(**typed)
    except Exception as error:  # a setting that it refuses
        raise CodecError(f"the header of a message is damaged: {error}") from error
