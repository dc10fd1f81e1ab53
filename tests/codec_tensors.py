"""Tensors and codecs for the tests of `msfusion.codecs`."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from msfusion import codecs
from msfusion.codecs import Codec

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

EVERY_CODEC: list[Codec] = [
    *codecs.PROFILES.values(),
    codecs.MaskEncoded(ratio=0.5, bits=1),
    codecs.MaskEncoded(ratio=0.9, bits=4, rounding="floor", values="bfloat16"),
    codecs.MaskEncoded(ratio=0.0, bits=8, values="float16", entropy="zstd"),
    codecs.TopK(ratio=0.8),
    codecs.TopK(ratio=0.9, values="float16", entropy="zstd"),
    codecs.RandomTopK(ratio=0.8, alpha=0.3),
    codecs.Quantized(bits=1),
    codecs.Quantized(bits=3),
    codecs.Quantized(bits=8),
    codecs.DeadZone(step=0.4, dead_zone=0.7),
    codecs.DeadZone(step=3.0, dead_zone=1.0),
    codecs.Identity(),
    codecs.Scaled(),
    codecs.Scaled(codecs.by_name("paper")),
    codecs.Scaled(codecs.DeadZone(step=1.0)),
    codecs.Scaled(codecs.Quantized(bits=2)),
    codecs.Scaled(codecs.RandomTopK(ratio=0.5)),
]


@st.composite
def tensors(draw: st.DrawFn, *, dtypes: list[torch.dtype] | None = None, elements: int = 400) -> Tensor:
    """Finite tensors of any shape and layout: dense or sparse, with ties, signed or not, from tiny to huge."""
    shape = draw(st.lists(st.integers(0, 9), max_size=5).filter(lambda s: torch.Size(s).numel() <= elements))
    dtype = draw(st.sampled_from(dtypes or DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "relu", "ties", "zero", "one", "wide"]))
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "relu":
        tensor = tensor.relu()
    elif kind == "ties":
        tensor = tensor.round()
    elif kind == "zero":
        tensor = tensor * 0
    elif kind == "one" and tensor.numel():
        tensor = tensor * 0
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = -2.5
    elif kind == "wide":
        tensor = tensor * 10.0 ** torch.randint(-44, 38, shape, generator=generator)
    largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    tensor = (tensor * draw(st.sampled_from([1.0, 1e-9, 1e4]))).clamp(-largest, largest).to(dtype)
    return draw(layouts(tensor))


@st.composite
def layouts(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The same tensor, laid out in memory in one way or another."""
    kind = draw(st.sampled_from(["contiguous", "reversed axes", "strided", "channels last"]))
    if kind == "reversed axes":
        axes = tuple(reversed(range(tensor.dim())))
        return tensor.permute(axes).contiguous().permute(axes)
    if kind == "strided":
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    if kind == "channels last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def one_of(choices: list[Codec]) -> st.SearchStrategy[Codec]:
    return st.sampled_from(choices)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    octets = [
        tensor.clone(memory_format=torch.contiguous_format).view(-1, 1).view(torch.uint8)
        for tensor in (one, other)
    ]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*octets)
