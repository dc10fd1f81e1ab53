"""A uniform quantiser with a dead zone around zero and an entropy coder: what image and video coders do.

    q_i = sign(x_i) floor(|x_i| / step - dead_zone + 1)   (0 in the dead zone)
    decoded: sign(q_i) (|q_i| + dead_zone - 1/2) step, the middle of the interval

The step is given as a share of the root mean square of the tensor, so that one setting fits activations and
gradients alike.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from msfusion.codecs.codec import Codec, Encoded, in_float32, not_finite
from msfusion.codecs.entropy import TRIED, deflated, inflate
from msfusion.codecs.grouped import GROUPINGS
from msfusion.codecs.header import Buffer, Header
from msfusion.codecs.operations import Operations, Packed
from msfusion.errors import CodecError, ConfigError

LARGEST_CODE = 127
AS_THEY_ARE, DEFLATED = 0, 1
"""How the codes stand in a message: a byte each, in a DEFLATE stream, or by one of `GROUPINGS`."""

_SETTINGS = struct.Struct("<Bff")


@dataclass(frozen=True)
class DeadZone(Codec):
    """`step` is the step in root mean squares; values below `dead_zone` steps become zero.

    There are 127 steps on either side: where that does not reach the largest value, the step is made larger.
    Raises ConfigError for settings that are out of range.
    """

    step: float = 0.4
    dead_zone: float = 0.6

    name: ClassVar[str] = "dead_zone"
    number: ClassVar[int] = 5
    settings_size: ClassVar[int] = _SETTINGS.size

    def __post_init__(self) -> None:
        if not 0 < self.step < math.inf:
            raise ConfigError(f"step = {self.step}: the step must be above 0.")
        if not 0.5 <= self.dead_zone <= 4:
            raise ConfigError(
                f"dead_zone = {self.dead_zone}: must be between 0.5 (no dead zone) and 4 steps."
            )

    def _encode(self, tensor: Float[Tensor, "..."], operations: Operations) -> Encoded:
        values = in_float32(tensor)
        step = float(np.float32(self._absolute_step(values)))
        dead_zone = float(np.float32(self.dead_zone))
        starts = (torch.arange(LARGEST_CODE, dtype=torch.float64) + dead_zone) * step
        starts = starts.to(torch.float32).clamp(min=2.0**-149)  # zero stays zero
        boundaries = torch.cat([-starts.flip(0), starts]).to(values.device)
        codes = operations.quantise(values, boundaries, 8)
        way, payload = _shortest(codes)
        return False, _SETTINGS.pack(way, step, dead_zone), [payload]

    def _absolute_step(self, values: Float32[Tensor, " elements"]) -> float:
        if len(values) == 0:
            return 0.0
        mean_square = float(values.double().square().mean())
        if not math.isfinite(mean_square):
            raise not_finite(self.name)
        step = max(self.step * math.sqrt(mean_square), float(values.abs().max()) / (LARGEST_CODE - 1))
        return min(step, torch.finfo(torch.float32).max)

    def _payload_size(self, shape: Sequence[int], dtype: torch.dtype, signed: bool) -> int:
        return math.prod(shape)

    def _check_settings(self, header: Header) -> None:
        if _read(header)[2] != float(np.float32(self.dead_zone)):
            raise CodecError(f"a message of {self.name} with other settings than those of its reader.")

    @classmethod
    def _check_message(cls, header: Header, payload: memoryview) -> None:
        way = _read(header)[0]
        if len(payload) >= header.elements if way != AS_THEY_ARE else len(payload) != header.elements:
            raise CodecError(f"a payload of {len(payload)} bytes where {header.elements} are expected.")

    @classmethod
    def _decode(
        cls, header: Header, payload: memoryview, out: Float32[Tensor, " elements"], operations: Operations
    ) -> None:
        way, step, dead_zone = _read(header)
        codes: Buffer = payload
        if way == DEFLATED:
            codes = inflate(payload, header.elements)
        elif way in GROUPINGS:
            codes = GROUPINGS[way].decode(payload, header.elements, LARGEST_CODE).tobytes()
        if np.frombuffer(codes, np.uint8).max() > 2 * LARGEST_CODE:
            raise CodecError("a message is damaged: it holds a code that no encoder writes.")
        steps = torch.arange(-LARGEST_CODE, LARGEST_CODE + 2, dtype=torch.float64)
        middles = steps.sign() * (steps.abs() + dead_zone - 0.5) * step
        largest = torch.finfo(torch.float32).max
        levels = middles.clamp(-largest, largest).to(torch.float32)
        operations.dequantise(codes, levels.to(out.device), 8, out)


def _shortest(codes: Packed) -> tuple[int, bytes]:
    """How codes take the fewest bytes, and these; the first of them show it."""
    first = codes[:TRIED]
    tried = {AS_THEY_ARE: first.tobytes(), DEFLATED: deflated(first)}
    tried |= {way: each.encode(first, LARGEST_CODE) for way, each in GROUPINGS.items()}
    way, payload = min(tried.items(), key=lambda each: len(each[1]))
    if len(codes) > TRIED and way != AS_THEY_ARE:
        payload = GROUPINGS[way].encode(codes, LARGEST_CODE) if way in GROUPINGS else deflated(codes)
    shorter = way != AS_THEY_ARE and len(payload) < len(codes)
    return (way, payload) if shorter else (AS_THEY_ARE, codes.tobytes())


def _read(header: Header) -> tuple[int, float, float]:
    if len(header.settings) != _SETTINGS.size or header.signed:
        raise CodecError("a message is damaged: impossible settings in its header.")
    way, step, dead_zone = _SETTINGS.unpack(header.settings)
    if way not in (AS_THEY_ARE, DEFLATED, *GROUPINGS) or not (0 <= step < math.inf and 0.5 <= dead_zone <= 4):
        raise CodecError("a message is damaged: impossible settings in its header.")
    return way, step, dead_zone
