"""The operations of all codecs in plain torch, on any device: what `fast` must agree with bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int32, Int64, UInt8
from torch import Tensor

from msfusion.codecs.header import Buffer
from msfusion.codecs.operations import Largest, Operations, Packed, packed_size


class Reference(Operations):
    """See `msfusion.codecs.operations.Operations`."""

    def largest(self, values: Float32[Tensor, " elements"], count: int) -> Largest:
        """The largest magnitudes: all above the smallest of them, and the first equal to it."""
        if count == 0:
            return Largest(values[:0], 0, 0)
        # as integers, the bits of non-negative floats are in the order of their values, and NaN is the largest
        keys = values.abs().view(torch.int32)
        smallest = int(keys.topk(count).values[-1])
        surplus = int((keys >= smallest).sum()) - count
        return Largest(values[_positions(keys, smallest, count)], smallest, surplus)

    def positions(self, values: Float32[Tensor, " elements"], largest: Largest) -> Int64[Tensor, " count"]:
        """Where the largest are."""
        return _positions(values.abs().view(torch.int32), largest.smallest, len(largest.values))

    def quantise(
        self, values: Float32[Tensor, " elements"], boundaries: Float32[Tensor, " boundaries"], bits: int
    ) -> Packed:
        """Packed codes of the values."""
        return pack(torch.bucketize(values, boundaries, right=True), bits)

    def dequantise(
        self,
        packed: Buffer,
        levels: Float32[Tensor, " levels"],
        bits: int,
        out: Float32[Tensor, " elements"],
    ) -> None:
        """Levels of packed codes."""
        out.copy_(levels[unpack(packed, bits, len(out), out.device)])

    def mask(
        self,
        values: Float32[Tensor, " elements"],
        boundaries: Float32[Tensor, " boundaries"],
        bits: int,
        largest: Largest,
    ) -> tuple[Packed, Packed | None]:
        """Packed codes with all ones for the largest, and packed signs."""
        top = self.positions(values, largest)
        codes = torch.bucketize(values.abs(), boundaries, right=True)
        signs = (values < 0) & (codes > 0)
        codes[top], signs[top] = 2**bits - 1, False
        return pack(codes, bits), pack(signs.long(), 1) if signs.any() else None

    def unmask(
        self,
        mask: Buffer,
        signs: Buffer | None,
        levels: Float32[Tensor, " levels"],
        kept: Float32[Tensor, " count"],
        bits: int,
        out: Float32[Tensor, " elements"],
    ) -> bool:
        """Levels of the codes, and kept values where they are all ones."""
        codes = unpack(mask, bits, len(out), out.device)
        top: Bool[Tensor, " elements"] = codes == 2**bits - 1
        if int(top.sum()) != len(kept):
            return False
        out.copy_(levels[codes])
        out[top] = kept
        if signs is not None:
            negative = unpack(signs, 1, len(out), out.device).bool()
            out.copy_(torch.where(negative, -out, out))
        return True


def _positions(keys: Int32[Tensor, " elements"], smallest: int, count: int) -> Int64[Tensor, " count"]:
    above = (keys > smallest).nonzero().view(-1)
    equal = (keys == smallest).nonzero().view(-1)[: count - len(above)]
    return torch.cat([above, equal]).sort().values


def pack(codes: Int64[Tensor, " elements"], bits: int) -> Packed:
    """Codes of so many bits as one stream, the lowest bit first."""
    places = torch.arange(bits, device=codes.device)
    stream = (codes[:, None] >> places & 1).view(-1)
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, device=codes.device)
    return (stream * weights).sum(1).to(torch.uint8).cpu().numpy()


def unpack(packed: Buffer, bits: int, elements: int, device: torch.device) -> Int64[Tensor, " elements"]:
    """The first `elements` codes of a stream of bits."""
    data = np.frombuffer(packed, np.uint8, packed_size(elements, bits))
    octets: UInt8[Tensor, " octets"] = torch.from_numpy(data.copy()).to(device)
    stream = (octets[:, None].long() >> torch.arange(8, device=device) & 1).view(-1)
    weights = 2 ** torch.arange(bits, device=device)
    return (stream[: elements * bits].view(-1, bits) * weights).sum(1)
