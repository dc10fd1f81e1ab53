"""Blocks with a power of two each: small ones survive beside large ones."""

from __future__ import annotations

import pytest
import torch
from codec_tensors import same_bits, tensors
from hypothesis import given, settings
from torch import Tensor

from msfusion import codecs
from msfusion.codecs import CodecError, DeadZone, Quantized, Scaled, TopK

quick = settings(max_examples=60)
EVERYTHING = TopK(ratio=0.0)
"""Sends every value as it is."""


def payload(codec: codecs.Codec, tensor: Tensor) -> bytes:
    return bytes(codecs.read_header(codec.encode(tensor))[1])


def test_what_is_sent_by_hand() -> None:
    tensor = torch.tensor([[3.0, -0.5], [0.0, 0.0], [1.0, 0.25], [0.01, -0.02]])
    scaled = torch.tensor([[0.75, -0.125], [0.0, 0.0], [0.5, 0.125], [0.32, -0.64]])
    exponents = bytes([2, 0, 1, 256 - 5])
    assert payload(Scaled(Quantized(bits=2)), tensor) == exponents + payload(Quantized(bits=2), scaled)
    decoded = codecs.decode(Scaled(Quantized(bits=2)).encode(tensor))
    expected = codecs.decode(Quantized(bits=2).encode(scaled))
    assert torch.equal(decoded, expected * torch.tensor([[4.0], [1.0], [2.0], [2.0**-5]]))


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((), 1),
        ((5,), 1),
        ((4, 3), 4),
        ((4, 3, 2), 12),
        ((2, 3, 4, 5), 2),
        ((2, 3, 1, 4, 5), 2),
        ((0, 3), 0),
        ((3, 0), 0),
    ],
)
def test_one_byte_for_each_block(shape: tuple[int, ...], blocks: int) -> None:
    tensor, codec = torch.randn(shape), Scaled(EVERYTHING)
    assert len(payload(codec, tensor)) - len(payload(EVERYTHING, tensor)) == blocks
    assert len(codec.encode(tensor)) == codec.encoded_size(shape)


@quick
@given(tensors(dtypes=[torch.float32]))
def test_scaling_itself_loses_nothing(tensor: Tensor) -> None:
    # beside a large value of its block a tiny one may leave the range of ordinary numbers: of no weight there
    tensor = torch.where(tensor.abs() < 1e-3 * tensor.abs().max(), 0.0, tensor) if tensor.numel() else tensor
    tensor = torch.where(tensor.abs() < 2.0**-100, 0.0, tensor)
    codec = Scaled(EVERYTHING)
    assert torch.equal(codec.decode(codec.encode(tensor)), tensor)


def test_images_have_an_exponent_for_each_example() -> None:
    images = torch.randn(4, 3, 8, 8) * torch.tensor([1.0, 1e-3, 1e-6, 0.0]).view(4, 1, 1, 1)
    decoded = codecs.decode(Scaled(DeadZone(step=0.1)).encode(images))
    assert ((decoded - images).flatten(1).norm(dim=1) <= 0.05 * images.flatten(1).norm(dim=1)).all()


def test_vectors_a_thousandfold_smaller_survive() -> None:
    tokens = torch.randn(8, 32, 64)
    tokens[:, 1:] *= torch.logspace(-5, -2, 31)[:, None]  # the first is what the classifier sees

    def errors(codec: codecs.Codec) -> Tensor:
        """Of each vector, relative."""
        return (codec.decode(codec.encode(tokens)) - tokens).norm(dim=-1) / tokens.norm(dim=-1)

    for inner in (codecs.by_name("compact"), DeadZone(step=0.7)):
        assert float(errors(inner).median()) == 1.0  # all of it lost
        assert float(errors(Scaled(inner)).max()) < 0.6
        assert float(errors(Scaled(inner)).median()) < 0.35


@pytest.mark.parametrize("at", range(3))
def test_an_exponent_that_nobody_writes_is_refused(at: int) -> None:
    message = bytearray(Scaled(EVERYTHING).encode(torch.randn(3, 4)))
    header, _ = codecs.read_header(message)
    for sound in (126, 256 - 126):
        message[header.size + at] = sound
        assert codecs.decode(message).isfinite().all()
    for damaged in (127, 128, 129):
        message[header.size + at] = damaged
        with pytest.raises(CodecError, match="no encoder writes"):
            codecs.decode(message)


def test_what_would_overflow_stays_finite() -> None:
    message = bytearray(Scaled(EVERYTHING).encode(torch.tensor([[1.5, -1.5]])))
    header, _ = codecs.read_header(message)
    huge = payload(EVERYTHING, torch.tensor([[3e38, -3e38]]))
    decoded = codecs.decode(bytes(message[: header.size]) + bytes([126]) + huge)
    largest = torch.finfo(torch.float32).max
    assert decoded.tolist() == [[largest, -largest]]


def test_settings_that_lie_are_refused() -> None:
    message = Scaled(Quantized(bits=2)).encode(torch.randn(3, 4))
    settings_at = codecs.read_header(message)[0].size - 2 - Quantized.settings_size
    for offset, lie in ((0, 0), (0, 6), (0, 7), (0, 5), (1, 2), (1, 1)):
        damaged = bytearray(message)
        damaged[settings_at + offset] = lie
        with pytest.raises(CodecError):
            codecs.decode(damaged)


def test_the_reader_must_have_the_same_settings() -> None:
    tensor = torch.randn(3, 4, 5)
    message = Scaled(Quantized(bits=2)).encode(tensor)
    for other in (Scaled(Quantized(bits=3)), Quantized(bits=2), Scaled(DeadZone())):
        with pytest.raises(CodecError):
            other.decode(message)
    assert same_bits(Scaled(Quantized(bits=2)).decode(message), codecs.decode(message))
