"""The true derivative of a codec: what autograd says of decoding written in plain torch, the codes held constant."""

from __future__ import annotations

import pytest
import torch
from codec_tensors import EVERY_CODEC, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfusion import codecs
from msfusion.codecs import CodecError, MaskEncoded, RandomTopK, Surviving, TopK
from msfusion.codecs.masks import MaskSettings, mask_planes
from msfusion.codecs.reference import unpack

SURVIVING: list[Surviving] = [each for each in EVERY_CODEC if isinstance(each, Surviving)]
quick = settings(max_examples=80)


def by_autograd(codec: Surviving, message: bytes, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the message decodes to, where its values stand, and the gradient at these: all by torch, in float64."""
    header, payload = codecs.read_header(message)
    if header.elements == 0:
        return torch.zeros(header.shape).double(), torch.zeros(0).long(), torch.zeros(0).double()
    stored, mask, signs = mask_planes(header, payload, torch.device("cpu"))
    kept = stored.values
    bits = MaskSettings.read(header).bits
    ones = 2**bits - 1
    codes = unpack(mask, bits, header.elements, kept.device)
    sign = 1 - 2 * unpack(signs, 1, header.elements, kept.device) if signs is not None else torch.tensor(1)
    values = kept.double().requires_grad_()
    decoded = sign * codes * (values.abs().amin() / ones)
    top = (codes == ones).nonzero().view(-1)
    decoded = decoded.index_put((top,), values)
    (decoded * gradient.double().view(-1)).sum().backward()
    assert values.grad is not None
    return decoded.detach().view(header.shape), top, values.grad


def agree(codec: Surviving, tensor: Tensor, seed: int = 0) -> None:
    message = codec.encode(tensor)
    gradient = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)
    decoded, places, wanted = by_autograd(codec, message, gradient)
    narrower = torch.finfo(tensor.dtype if tensor.dtype != torch.float64 else torch.float32)
    torch.testing.assert_close(
        codec.decode(message).double(),
        decoded.clamp(-narrower.max, narrower.max),
        rtol=narrower.eps,
        atol=narrower.smallest_normal * narrower.eps,  # the smallest number of all
    )
    assert torch.equal(codec.survivors(message), places)
    found = codec.pull_back(message, gradient)
    assert found.dtype == tensor.dtype
    scale = float(gradient.double().abs().sum())
    torch.testing.assert_close(found.double(), wanted, rtol=0.0, atol=2 * narrower.eps * scale)


@quick
@given(tensors(), st.sampled_from(SURVIVING), st.integers(0, 100))
def test_it_is_what_autograd_says(tensor: Tensor, codec: Surviving, seed: int) -> None:
    agree(codec, tensor, seed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99])
def test_it_is_what_autograd_says_of_activations(ratio: float, bits: int, signed: bool) -> None:
    torch.manual_seed(bits)
    tensor = torch.randn(4, 8, 9, 7) if signed else torch.randn(4, 8, 9, 7).relu()
    for dtype in (torch.float32, torch.float64, torch.float16):
        agree(MaskEncoded(ratio=ratio, bits=bits), tensor.to(dtype))
        agree(MaskEncoded(ratio=ratio, bits=bits, values="float16", entropy="zstd"), tensor.to(dtype))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 5),
        torch.ones(40),
        -torch.ones(40),
        torch.tensor([2.0, -1.0, 1.0, 1.0, 0.4, -0.7, 0.0, 1.0]),
        torch.empty(0, 4),
        torch.tensor(-3.0),
    ],
    ids=["zeros", "ones", "minus ones", "ties at T", "empty", "one number"],
)
def test_it_is_what_autograd_says_of_odd_tensors(tensor: Tensor) -> None:
    for codec in [*SURVIVING, MaskEncoded(ratio=0.5), MaskEncoded(ratio=0.6, bits=3), TopK(ratio=0.5)]:
        agree(codec, tensor)


def test_the_smallest_survivor_collects_what_follows_it() -> None:
    """By hand: of 4, -2, 1.3, -0.6 two survive, T = 2, the others become 2/3 T and -1/3 T."""
    tensor = torch.tensor([[4.0, -2.0], [1.3, -0.6]])
    codec = MaskEncoded(ratio=0.5, bits=2)
    message = codec.encode(tensor)
    torch.testing.assert_close(codec.decode(message), torch.tensor([[4.0, -2.0], [4 / 3, -2 / 3]]))
    assert codec.survivors(message).tolist() == [0, 1]
    pulled = codec.pull_back(message, torch.tensor([[10.0, 20.0], [3.0, 6.0]]))
    # sign(-2) * (2/3 * 3 - 1/3 * 6) = 0; so with other gradients: -(2/3 * 6 - 1/3 * 3) = -3
    assert pulled.tolist() == [10.0, 20.0]
    assert codec.pull_back(message, torch.tensor([[10.0, 20.0], [6.0, 3.0]])).tolist() == [10.0, 17.0]


def test_those_that_tie_for_the_smallest_share_it() -> None:
    tensor = torch.tensor([5.0, 2.0, -2.0, 1.4])
    codec = MaskEncoded(ratio=0.25, bits=2)
    pulled = codec.pull_back(codec.encode(tensor), torch.tensor([0.0, 0.0, 0.0, 3.0]))
    assert pulled.tolist() == [0.0, 1.0, -1.0]


def test_of_top_k_the_gradients_at_the_survivors_remain() -> None:
    tensor, gradient = torch.randn(500), torch.randn(500)
    for codec in (TopK(ratio=0.9), RandomTopK(ratio=0.9, alpha=0.5)):
        message = codec.encode(tensor)
        places = codec.decode(message).nonzero().view(-1)
        assert torch.equal(codec.survivors(message), places)
        assert torch.equal(codec.pull_back(message, gradient), gradient[places])


@quick
@given(tensors(), st.sampled_from(SURVIVING))
def test_the_reference_and_the_fast_path_agree(tensor: Tensor, codec: Surviving) -> None:
    message, gradient = codec.encode(tensor), torch.randn(tensor.shape).to(tensor.dtype)
    assert torch.equal(codec.survivors(message), codec.survivors(message, reference=True))
    assert torch.equal(codec.pull_back(message, gradient), codec.pull_back(message, gradient, reference=True))


def test_any_layout_of_the_gradient() -> None:
    codec, tensor = MaskEncoded(ratio=0.9), torch.randn(2, 3, 5, 7)
    message, gradient = codec.encode(tensor), torch.randn(2, 3, 5, 7)
    laid_out = gradient.contiguous(memory_format=torch.channels_last)
    assert torch.equal(codec.pull_back(message, laid_out), codec.pull_back(message, gradient))


@pytest.mark.parametrize("codec", SURVIVING, ids=repr)
def test_hostile_messages_are_refused(codec: Surviving) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(3, 4, 25)
    message, gradient = codec.encode(tensor), torch.randn(3, 4, 25)

    def refused(data: bytes, of: Tensor = gradient) -> None:
        with pytest.raises(CodecError):
            codec.pull_back(data, of)
        if of is gradient:
            with pytest.raises(CodecError):
                codec.survivors(data)

    for end in range(0, len(message), 3):
        refused(message[:end])
    refused(message + b"\0")
    refused(codecs.Identity().encode(tensor))
    refused(message, gradient[:2])
    refused(message, gradient.view(300))
    with pytest.raises(CodecError, match="299 elements allowed"):
        codec.survivors(message, max_elements=299)


@quick
@given(st.data(), st.sampled_from(SURVIVING))
def test_whatever_cannot_be_decoded_has_no_derivative(data: st.DataObject, codec: Surviving) -> None:
    """A mutated message either has as many survivors as a sound one, or raises the same kind of error as decoding."""
    tensor = torch.randn(4, 25, generator=torch.Generator().manual_seed(1))
    message = bytearray(codec.encode(tensor))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(message) - 1))
        message[place] = data.draw(st.integers(0, 255))
    try:
        decoded = codec.decode(message, max_elements=100)
    except CodecError:
        with pytest.raises(CodecError):
            codec.survivors(message, max_elements=100)
        return
    survivors = codec.survivors(message, max_elements=100)
    assert codec.pull_back(message, torch.ones_like(decoded)).shape == survivors.shape
