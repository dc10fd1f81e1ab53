"""No compression: the elements as they are, NaN and infinities too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from msfusion.codecs.codec import Codec, Encoded
from msfusion.codecs.header import Header
from msfusion.codecs.operations import Operations
from msfusion.errors import CodecError


@dataclass(frozen=True)
class Identity(Codec):
    """The bytes of the elements in row-major order."""

    name: ClassVar[str] = "identity"
    number: ClassVar[int] = 6
    settings_size: ClassVar[int] = 0
    in_float32: ClassVar[bool] = False

    def _encode(self, tensor: Float[Tensor, "..."], operations: Operations) -> Encoded:
        return False, b"", [_octets(tensor.cpu().contiguous().view(-1))]

    def _payload_size(self, shape: Sequence[int], dtype: torch.dtype, signed: bool) -> int:
        return math.prod(shape) * dtype.itemsize

    def _check_settings(self, header: Header) -> None:
        """There are none."""

    @classmethod
    def _check_message(cls, header: Header, payload: memoryview) -> None:
        if header.settings or header.signed or len(payload) != header.elements * header.dtype.itemsize:
            raise CodecError("a payload has another size than its header says: cut off, or followed by more.")

    @classmethod
    def _decode(
        cls, header: Header, payload: memoryview, out: Float[Tensor, " elements"], operations: Operations
    ) -> None:
        work = out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")
        np.copyto(_octets(work), np.frombuffer(payload, np.uint8))
        if work is not out:
            out.copy_(work)


def _octets(flat: Float[Tensor, " elements"]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    # a contiguous tensor of one element may have any stride, and a view of another size asks for 1
    return flat.as_strided((len(flat),), (1,)).view(torch.uint8).numpy()
