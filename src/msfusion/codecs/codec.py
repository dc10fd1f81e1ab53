"""The interface of all codecs: a tensor becomes bytes, and bytes become a tensor of the same dtype and shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from msfusion.codecs.header import MAX_ELEMENTS, Buffer, Header, check_describable, header_size, read_header
from msfusion.codecs.operations import Operations, operations_for
from msfusion.errors import CodecError

Encoded = tuple[bool, bytes, Sequence[Any]]
"""What a codec makes of a tensor: is there a sign plane, its settings for the header, the payload's parts."""


class Codec(ABC):
    """Settings of one way to encode. Frozen and without state: the same tensor gives the same bytes.

    Every codec takes float32, float16, bfloat16 and float64 in any layout, and any shape of at most 8 axes,
    empty ones too. All but `Identity` calculate in float32 (a float64 tensor is rounded to it first) and
    refuse NaN and infinities.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    settings_size: ClassVar[int]
    in_float32: ClassVar[bool] = True

    def encode(self, tensor: Float[Tensor, "..."], *, reference: bool = False) -> bytes:
        """The message of a tensor. `reference` takes the readable path; the bytes are the same.

        Raises CodecError for other dtypes, more than 8 axes, and values that are not finite.
        """
        tensor = tensor.detach()
        check_describable(tuple(tensor.shape), tensor.dtype)
        signed, settings, parts = self._encode(tensor, operations_for(tensor.device, reference))
        header = Header(self.number, tensor.dtype, tuple(tensor.shape), settings, signed)
        return b"".join([header.pack(), *parts])

    def decode(
        self,
        data: Buffer,
        *,
        out: Float[Tensor, "..."] | None = None,
        max_elements: int = MAX_ELEMENTS,
        device: torch.device | str = "cpu",
        reference: bool = False,
    ) -> Float[Tensor, "..."]:
        """The tensor of a message that a codec of these very settings wrote; see `msfusion.codecs.decode`.

        Raises CodecError for the message of another codec, or of other settings, as well.
        """
        header, payload = read_header(data, max_elements=max_elements)
        if header.codec != self.number:
            raise CodecError(f"a message of codec number {header.codec} where {self.name} is spoken.")
        self._check_settings(header)
        return decode_payload(type(self), header, payload, out=out, device=device, reference=reference)

    def encoded_size(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, signed: bool = False
    ) -> int:
        """Bytes of a message of this shape and dtype: exact, or with entropy coding the most it can be.

        `signed`: count a sign plane, which is sent only where negative values need one.
        """
        check_describable(tuple(shape), dtype)
        header = header_size(tuple(shape), self._settings_size())
        return header + self._payload_size(shape, dtype, signed)

    def _settings_size(self) -> int:
        """Bytes of the settings in a header."""
        return self.settings_size

    @abstractmethod
    def _encode(self, tensor: Float[Tensor, "..."], operations: Operations) -> Encoded:
        """Sign flag, settings and payload of a detached tensor of any layout."""

    @abstractmethod
    def _payload_size(self, shape: Sequence[int], dtype: torch.dtype, signed: bool) -> int:
        """Bytes of the payload of a tensor of this shape, at most."""

    @abstractmethod
    def _check_settings(self, header: Header) -> None:
        """Raises CodecError for the header of a message that these settings would not have produced."""

    @classmethod
    @abstractmethod
    def _check_message(cls, header: Header, payload: memoryview) -> None:
        """Raises CodecError unless the settings make sense and the payload accounts for the shape.

        Whatever a message declares is checked here, before anything is allocated for it.
        """

    @classmethod
    @abstractmethod
    def _decode(
        cls, header: Header, payload: memoryview, out: Shaped[Tensor, " elements"], operations: Operations
    ) -> None:
        """Fill `out`: float32 (`Identity`: of the header's dtype), contiguous, as long as the header says."""


def decode_payload(
    codec: type[Codec],
    header: Header,
    payload: memoryview,
    *,
    out: Float[Tensor, "..."] | None,
    device: torch.device | str,
    reference: bool,
) -> Float[Tensor, "..."]:
    """The tensor of a payload whose header has been read, in `out` where it is given."""
    if out is not None:
        _check_buffer(out, header)
        device = out.device
    codec._check_message(header, payload)
    operations = operations_for(torch.device(device), reference)
    result = torch.empty(header.shape, dtype=header.dtype, device=device) if out is None else out
    if header.elements == 0:
        return result
    if header.dtype == torch.float32 or not codec.in_float32:
        codec._decode(header, payload, result.view(-1), operations)
        return result
    work = torch.empty(header.elements, dtype=torch.float32, device=device)
    codec._decode(header, payload, work, operations)
    # a value that was rounded up on the way must not become an infinity
    largest = min(torch.finfo(header.dtype).max, torch.finfo(torch.float32).max)
    return result.copy_(work.clamp_(-largest, largest).view(header.shape))


def _check_buffer(out: Float[Tensor, "..."], header: Header) -> None:
    if tuple(out.shape) == header.shape and out.dtype == header.dtype and out.is_contiguous():
        return
    layout = "" if out.is_contiguous() else ", not contiguous"
    raise CodecError(
        f"a message holds {header.dtype} of shape {header.shape}, and the buffer to decode into is "
        f"{out.dtype} of shape {tuple(out.shape)}{layout}."
    )


def in_float32(tensor: Float[Tensor, "..."]) -> Float32[Tensor, " elements"]:
    """The elements in row-major order, in float32; a view where the tensor is both already."""
    return tensor.to(torch.float32).contiguous().view(-1)


def not_finite(codec: str) -> CodecError:
    """The refusal of NaN and infinities."""
    return CodecError(
        f"a tensor with NaN or infinities (or float64 values beyond float32) cannot be encoded by {codec}; "
        "find out where they come from, or send it with 'identity'."
    )
