"""The derivative of codecs that send some values as they are, the others at most as multiples of the smallest.

A message of the k surviving values v_j, codes m_i and signs s_i decodes to

    y_i = v_j                                at the place of the j-th survivor
    y_i = s_i m_i T / (2^b - 1)              elsewhere, with T = min_j |v_j|

The codes are piecewise constant in what was encoded, so with g = d loss / d y

    d loss / d v_j = g_i                     at its place i
                   + sign(v_j) / n * sum of s_i m_i / (2^b - 1) * g_i over all other places i

where the second term goes to those n survivors whose magnitude is T (one, but for ties, which share it
equally). All other elements of the encoded tensor have the derivative 0: of the d gradients only k need to
travel, and their places are known on both sides. Rounding the survivors to half precision counts as the
identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from msfusion.codecs.codec import Codec
from msfusion.codecs.header import MAX_ELEMENTS, Buffer, read_header, room_for
from msfusion.codecs.masks import MaskSettings, mask_planes
from msfusion.codecs.operations import operations_for
from msfusion.errors import CodecError


class Surviving(Codec):
    """A codec with a true derivative: that of its kept values. Its payload is as in `msfusion.codecs.masks`."""

    def survivors(
        self, data: Buffer, *, max_elements: int = MAX_ELEMENTS, reference: bool = False
    ) -> Int64[Tensor, " count"]:
        """Where the values stand that a message sends as they are, ascending, in row-major order.

        Raises CodecError as `decode` does.
        """
        return self._open(data, torch.device("cpu"), max_elements, reference).places

    def pull_back(
        self, data: Buffer, gradient: Float[Tensor, "..."], *, reference: bool = False
    ) -> Float[Tensor, " count"]:
        """The gradient at the surviving values of a message, in their order, from that at what it decodes to.

        Calculated in float32; the result has the gradient's dtype. Raises CodecError as `decode` does, and for a
        gradient of another shape.
        """
        opened = self._open(data, gradient.device, room_for(gradient.shape), reference)
        if tuple(gradient.shape) != opened.shape:
            raise CodecError(
                f"a gradient of shape {tuple(gradient.shape)} for a message of shape {opened.shape}."
            )
        if len(opened.kept) == 0:
            return gradient.new_empty(0)
        flat = gradient.detach().to(torch.float32).contiguous().view(-1)
        weights, places = opened.weights, opened.places
        pulled = weights[places] * flat[places]
        of_smallest = torch.dot(weights.index_fill_(0, places, 0.0), flat)
        magnitudes = opened.kept.abs()
        smallest = magnitudes == magnitudes.min()
        pulled += opened.kept.sign() * smallest * (of_smallest / smallest.sum())
        return pulled.to(gradient.dtype)

    def _open(self, data: Buffer, device: torch.device, max_elements: int, reference: bool) -> _Opened:
        header, payload = read_header(data, max_elements=max_elements)
        if header.codec != self.number:
            raise CodecError(f"a message of codec number {header.codec} where {self.name} is spoken.")
        self._check_settings(header)
        self._check_message(header, payload)
        weights = torch.empty(header.elements, dtype=torch.float32, device=device)
        if header.elements == 0:
            return _Opened(header.shape, weights.long(), weights, weights)
        stored, mask, signs = mask_planes(header, payload, device)
        kept = stored.values
        bits, operations = MaskSettings.read(header).bits, operations_for(device, reference)
        codes = torch.arange(2**bits, dtype=torch.float32, device=device)
        operations.dequantise(mask, codes / (2**bits - 1), bits, weights)
        surviving = weights == 1  # which the code of all ones alone stands for
        places = torch.from_numpy(np.flatnonzero(surviving.cpu().numpy())).to(
            device
        )  # 5 times as fast as torch
        if len(places) != len(kept):
            raise CodecError(f"a message is damaged: its mask does not mark {len(kept)} values.")
        if signs is not None:
            negative = torch.empty_like(weights)
            operations.dequantise(signs, torch.tensor([1.0, -1.0], device=device), 1, negative)
            weights *= negative
        return _Opened(header.shape, places, weights, kept)


@dataclass(frozen=True)
class _Opened:
    """What a message says: an element is its `weight` times T, or, at the `places`, times a kept value."""

    shape: tuple[int, ...]
    places: Int64[Tensor, " count"]
    weights: Float32[Tensor, " elements"]
    kept: Float32[Tensor, " count"]
