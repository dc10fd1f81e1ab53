"""What holds for every codec and every tensor."""

from __future__ import annotations

import pytest
import torch
from codec_tensors import EVERY_CODEC, one_of, same_bits, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfusion import codecs
from msfusion.codecs import Codec, MaskEncoded, Quantized, RandomTopK, TopK
from msfusion.codecs.masks import MaskSettings, kept_count

quick = settings(max_examples=60)
LOSSLESS_TYPES = [torch.float32, torch.float64]


def round_trip(codec: Codec, tensor: Tensor) -> Tensor:
    return codec.decode(codec.encode(tensor))


@quick
@given(tensors(), one_of(EVERY_CODEC))
def test_dtype_and_shape_come_back_finite_and_within_the_size(tensor: Tensor, codec: Codec) -> None:
    message = codec.encode(tensor)
    decoded = codec.decode(message)
    assert decoded.dtype == tensor.dtype
    assert decoded.shape == tensor.shape
    assert decoded.isfinite().all()
    assert len(message) <= codec.encoded_size(tensor.shape, tensor.dtype, signed=True)
    assert same_bits(codecs.decode(message), decoded)


@quick
@given(tensors(), one_of(EVERY_CODEC))
def test_the_reference_gives_the_same_bytes_and_bits(tensor: Tensor, codec: Codec) -> None:
    message = codec.encode(tensor)
    assert codec.encode(tensor, reference=True) == message
    assert same_bits(codec.decode(message, reference=True), codec.decode(message))


@st.composite
def edge_tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of what lies at the edges of a type: denormals, the largest, both zeros; empty ones and scalars too."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    kind = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    least = kind.smallest_normal * kind.eps
    magnitudes = [
        0.0,
        least,
        2 * least,
        3 * least,
        5 * least,
        kind.tiny / 2,
        kind.tiny,
        1.0,
        kind.max / 2,
        kind.max,
    ]
    few = draw(
        st.lists(
            st.sampled_from([sign * each for each in magnitudes for sign in (1, -1)]), min_size=1, max_size=4
        )
    )
    shape = draw(
        st.sampled_from([(), (0,), (1,), (2, 0), (3,), (2, 3, 5), (1, 1, 1, 1), (2, 2, 2, 4), (70,)])
    )
    places = draw(st.lists(st.sampled_from(few), min_size=(n := torch.Size(shape).numel()), max_size=n))
    return torch.tensor(places, dtype=torch.float64).to(dtype).reshape(shape)


@quick
@given(edge_tensors(), one_of(EVERY_CODEC))
def test_the_edges_of_a_type_are_no_exception(tensor: Tensor, codec: Codec) -> None:
    message = codec.encode(tensor)
    decoded = codecs.decode(message)
    assert (decoded.dtype, decoded.shape) == (tensor.dtype, tensor.shape)
    assert decoded.isfinite().all()
    assert len(message) <= codec.encoded_size(tensor.shape, tensor.dtype, signed=True)
    assert codec.encode(tensor, reference=True) == message
    assert same_bits(codecs.decode(message, reference=True), decoded)
    if not tensor.any():
        assert not decoded.any()
    if isinstance(codec, codecs.Surviving):
        kept = codec.survivors(message)
        assert len(kept) == kept_count(codec.ratio, tensor.numel())  # type: ignore[attr-defined]
        assert codec.pull_back(message, torch.ones_like(decoded)).isfinite().all()


@pytest.mark.parametrize("codec", EVERY_CODEC, ids=repr)
def test_the_layout_does_not_matter(codec: Codec) -> None:
    images = torch.randn(2, 3, 5, 7)
    laid_out = [
        images.contiguous(memory_format=torch.channels_last),
        images.permute(3, 1, 0, 2),
        images[:, :, 1::2],
        images.view(-1)[::3],
        images[0, 0, 0, :1].expand(4, 6),
        torch.randn(9, 2)[:1, :1],
        images.clone().requires_grad_(),
    ]
    for tensor in laid_out:
        plain = tensor.detach().clone(memory_format=torch.contiguous_format)
        for reference in (False, True):
            assert codec.encode(tensor, reference=reference) == codec.encode(plain), tensor.shape


@quick
@given(tensors(), one_of(EVERY_CODEC))
def test_a_reused_buffer_gets_the_same_bits(tensor: Tensor, codec: Codec) -> None:
    message = codec.encode(tensor)
    buffer = torch.full(tensor.shape, float("nan"), dtype=tensor.dtype)
    assert codec.decode(message, out=buffer) is buffer
    assert same_bits(buffer, codec.decode(message))


@quick
@given(
    tensors(dtypes=LOSSLESS_TYPES),
    st.floats(0, 0.999),
    st.integers(1, 8),
    st.sampled_from(["nearest", "floor"]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_encoding_what_was_decoded_changes_nothing(
    tensor: Tensor, ratio: float, bits: int, rounding: str, values: str
) -> None:
    tensor = torch.where(tensor.abs() < 1e-20, 0.0, tensor)  # below, levels run out of bits
    for codec in (
        codecs.by_name("mask_encoded", ratio=ratio, bits=bits, rounding=rounding, values=values),
        codecs.by_name("top_k", ratio=ratio, values=values),
    ):
        decoded = round_trip(codec, tensor)
        decoded = torch.where(decoded.abs() < 1e-20, 0.0, decoded)
        again = round_trip(codec, decoded)
        assert torch.equal(again, decoded)


@quick
@given(tensors())
def test_identity_keeps_every_bit(tensor: Tensor) -> None:
    if tensor.numel() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        tensor.view(-1)[0], tensor.view(-1)[1] = float("nan"), float("-inf")
    assert same_bits(round_trip(codecs.Identity(), tensor), tensor)


@quick
@given(tensors(), st.floats(0, 0.999), st.integers(1, 8))
def test_exactly_k_values_are_kept_the_first_of_equal_ones(tensor: Tensor, ratio: float, bits: int) -> None:
    codec = MaskEncoded(ratio=ratio, bits=bits)
    header, payload = codecs.read_header(codec.encode(tensor))
    count = MaskSettings.read(header).count
    assert count == kept_count(ratio, tensor.numel())
    # sorting is stable: of equal magnitudes the first come first
    flat = tensor.float().reshape(-1)
    expected = flat.abs().sort(descending=True, stable=True).indices[:count].sort().values
    kept = torch.frombuffer(bytearray(payload[: 4 * count]), dtype=torch.float32) if count else flat[:0]
    assert torch.equal(kept, flat[expected])
    stream = [octet >> bit & 1 for octet in payload[4 * count :] for bit in range(8)]
    codes = [stream[at * bits : at * bits + bits] for at in range(len(flat))]
    assert [at for at, code in enumerate(codes) if all(code)] == expected.tolist()


@quick
@given(tensors(dtypes=LOSSLESS_TYPES), st.floats(0, 0.999), st.integers(1, 8))
def test_mask_encoding_errs_by_half_a_level_at_most(tensor: Tensor, ratio: float, bits: int) -> None:
    decoded = round_trip(MaskEncoded(ratio=ratio, bits=bits), tensor).double()
    flat, decoded = tensor.float().double().reshape(-1), decoded.reshape(-1)
    count = kept_count(ratio, len(flat))
    if count == 0:
        return
    order = flat.abs().sort(descending=True, stable=True).indices
    assert torch.equal(decoded[order[:count]], flat[order[:count]])
    smallest, ones = float(flat.abs()[order[count - 1]]), 2**bits - 1
    error = (decoded - flat)[order[count:]].abs()
    # the highest code stands for everything up to T; others for half a level on either side
    allowed = (
        torch.where(flat[order[count:]].abs() < (ones - 1.5) * smallest / ones, 0.5, 1.0) * smallest / ones
    )
    assert (error <= allowed + 1.2e-7 * smallest + 2e-45).all()


@quick
@given(tensors(dtypes=LOSSLESS_TYPES), st.integers(1, 8))
def test_quantising_errs_by_half_a_step_at_most(tensor: Tensor, bits: int) -> None:
    if tensor.numel() == 0:
        return
    values = tensor.float().double()
    error = (round_trip(Quantized(bits=bits), tensor).double() - values).abs().max()
    step = (values.max() - values.min()) / (2**bits - 1)
    assert error <= step / 2 + 1.2e-7 * values.abs().max() + 2e-45


@pytest.mark.parametrize("kind", ["relu", "signed"])
def test_more_bits_mean_a_smaller_error(kind: str) -> None:
    tensor = torch.randn(20_000)
    tensor = tensor.relu() if kind == "relu" else tensor
    for build in (lambda bits: MaskEncoded(bits=bits), lambda bits: Quantized(bits=bits)):
        errors = [float((round_trip(build(bits), tensor) - tensor).norm()) for bits in range(1, 9)]
        assert errors == sorted(errors, reverse=True)
        assert len(set(errors)) == len(errors)


def test_nearest_is_better_than_floor_and_half_precision_costs_next_to_nothing() -> None:
    tensor = torch.randn(50_000).relu()

    def error(**settings: object) -> float:
        return float((round_trip(codecs.by_name("mask_encoded", **settings), tensor) - tensor).norm())

    assert error() < 0.7 * error(rounding="floor")
    assert error(values="float16") == pytest.approx(error(), rel=1e-3)
    assert error(values="bfloat16") == pytest.approx(error(), rel=1e-2)


@quick
@given(tensors(), st.floats(0, 0.999), st.integers(1, 8), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_the_size_is_that_of_the_formula(tensor: Tensor, ratio: float, bits: int, values: str) -> None:
    elements = tensor.numel()
    count, per_value = kept_count(ratio, elements), 4 if values == "float32" else 2
    codec = codecs.by_name("mask_encoded", ratio=ratio, bits=bits, values=values)
    message = codec.encode(tensor)
    header, payload = codecs.read_header(message)
    planes = -(-bits * elements // 8) + (-(-elements // 8) if header.signed else 0)
    assert len(payload) == count * per_value + planes
    assert len(message) == header.size + len(payload)
    assert len(message) == codec.encoded_size(tensor.shape, tensor.dtype, signed=header.signed)
    for other in (TopK(ratio=ratio), RandomTopK(ratio=ratio), Quantized(bits=bits), codecs.Identity()):
        assert len(other.encode(tensor)) == other.encoded_size(tensor.shape, tensor.dtype)


@pytest.mark.parametrize(
    ("ratio", "elements", "count"),
    [(0.99, 100, 1), (0.99, 99, 1), (0.9, 10, 1), (0.7, 10, 3), (0.0, 7, 7), (0.999, 5000, 5), (0.99, 0, 0)],
)
def test_how_many_values_are_kept(ratio: float, elements: int, count: int) -> None:
    assert kept_count(ratio, elements) == count
    settings_read = MaskSettings.read(
        codecs.read_header(MaskEncoded(ratio=ratio).encode(torch.rand(elements)))[0]
    )
    assert settings_read.count == count


@quick
@given(tensors(dtypes=[torch.float32]))
def test_a_sign_plane_is_sent_only_where_it_says_something(tensor: Tensor) -> None:
    codec = MaskEncoded(ratio=0.9)
    header, _ = codecs.read_header(codec.encode(tensor.abs()))
    assert not header.signed
    message = codec.encode(tensor)
    decoded = codec.decode(message)
    order = tensor.reshape(-1).abs().sort(descending=True, stable=True).indices
    others = decoded.reshape(-1)[order[kept_count(0.9, tensor.numel()) :]]
    assert codecs.read_header(message)[0].signed == bool((others < 0).any())
    assert not (torch.signbit(others) & (others == 0)).any()


def test_zero_and_one_element() -> None:
    for codec in EVERY_CODEC:
        assert torch.equal(round_trip(codec, torch.zeros(5, 4)), torch.zeros(5, 4)), codec
        for one in (torch.tensor(-1.5), torch.tensor([2.0])):
            # alone, a value equals the root mean square, which may lie within the dead zone
            coarse = isinstance(getattr(codec, "inner", codec), codecs.DeadZone)
            allowed = 1.0 if coarse else 0.01
            torch.testing.assert_close(round_trip(codec, one), one, rtol=allowed, atol=0)


def test_tiny_gradients_survive_half_precision() -> None:
    tensor = torch.randn(10_000) * 1e-12
    decoded = round_trip(codecs.by_name("accurate"), tensor)
    assert (decoded - tensor).norm() < 0.25 * tensor.norm()


class TestRandomTopK:
    tensor = torch.rand(50_000, generator=torch.Generator().manual_seed(1))

    def kept(self, codec: Codec, tensor: Tensor) -> set[int]:
        return set(round_trip(codec, tensor).nonzero().view(-1).tolist())

    def test_about_alpha_of_the_values_come_from_the_others(self) -> None:
        top = self.kept(TopK(ratio=0.9), self.tensor)
        drawn = self.kept(RandomTopK(ratio=0.9, alpha=0.2), self.tensor)
        assert len(drawn) == len(top) == 5000
        assert len(drawn - top) == pytest.approx(1000, abs=150)
        others = torch.tensor(sorted(drawn - top)).double()
        assert float(others.mean()) == pytest.approx(25_000, rel=0.05)  # from everywhere

    def test_all_of_the_others_can_be_reached(self) -> None:
        tensor = torch.arange(1.0, 13.0)
        seen = [self.kept(RandomTopK(ratio=0.75, alpha=0.7, seed=seed), tensor) for seed in range(60)]
        assert set.union(*seen) == set(range(12))
        assert all(len(kept) == 3 for kept in seen)

    def test_without_chance_it_is_top_k(self) -> None:
        assert torch.equal(round_trip(RandomTopK(alpha=0.0), self.tensor), round_trip(TopK(), self.tensor))
        assert not self.kept(RandomTopK(alpha=1.0), self.tensor) & self.kept(TopK(), self.tensor)

    def test_another_choice_for_another_tensor_or_seed_and_the_same_for_the_same(self) -> None:
        codec = RandomTopK(ratio=0.9, alpha=0.2)
        assert codec.encode(self.tensor) == codec.encode(self.tensor.clone())
        assert self.kept(codec, self.tensor) != self.kept(codec, self.tensor * 1.5)
        assert self.kept(codec, self.tensor) != self.kept(
            RandomTopK(ratio=0.9, alpha=0.2, seed=1), self.tensor
        )

    def test_it_never_wants_more_others_than_there_are(self) -> None:
        codec = RandomTopK(ratio=0.0, alpha=1.0)
        assert torch.equal(round_trip(codec, self.tensor), self.tensor)
