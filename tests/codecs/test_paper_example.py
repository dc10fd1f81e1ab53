"""The 4 x 4 example of the paper (arXiv 2408.13787), by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msfusion import codecs

EXAMPLE = torch.tensor(
    [[2.2, 0.8, 1.2, 0.4], [1.8, 0.2, 3.1, 2.0], [2.1, 0.2, 1.1, 1.7], [0.3, 2.8, 1.4, 0.9]]
)
PRINTED_MASKS = "11 01 01 00  10 00 11 10  11 00 01 10  00 11 10 01"


def payload(message: bytes) -> bytes:
    return bytes(codecs.read_header(message)[1])


def masks_of(data: bytes) -> str:
    codes = [f"{octet >> 2 * place & 3:02b}" for octet in data for place in range(4)]
    return "  ".join(" ".join(codes[row : row + 4]) for row in range(0, 16, 4))


def error(codec: codecs.Codec) -> float:
    return float((codec.decode(codec.encode(EXAMPLE)) - EXAMPLE).norm())


@pytest.mark.parametrize("reference", [True, False])
def test_values_and_masks_are_those_of_the_paper(reference: bool) -> None:
    message = codecs.MaskEncoded(ratio=0.75, rounding="floor").encode(EXAMPLE, reference=reference)
    data = payload(message)
    assert len(data) == 20
    assert data[:16] == torch.tensor([2.2, 3.1, 2.1, 2.8]).numpy().tobytes()
    assert masks_of(data[16:]) == PRINTED_MASKS


def test_decoded_by_hand() -> None:
    codec = codecs.MaskEncoded(ratio=0.75, rounding="floor")
    third, two_thirds = 2.1 / 3, 2 * 2.1 / 3
    expected: Tensor = torch.tensor(
        [
            [2.2, third, third, 0.0],
            [two_thirds, 0.0, 3.1, two_thirds],
            [2.1, 0.0, third, two_thirds],
            [0.0, 2.8, two_thirds, third],
        ]
    )
    torch.testing.assert_close(codec.decode(codec.encode(EXAMPLE)), expected, rtol=1e-6, atol=0)


def test_errors_are_those_of_the_paper() -> None:
    assert error(codecs.MaskEncoded(ratio=0.75, rounding="floor")) == pytest.approx(1.183, abs=5e-4)
    assert error(codecs.MaskEncoded(ratio=0.75, rounding="nearest")) == pytest.approx(1.0247, abs=5e-5)
    assert error(codecs.TopK(ratio=0.75)) == pytest.approx(4.064, abs=1e-3)


def test_the_paper_s_setting_is_13_79_times_smaller() -> None:
    elements = 256 * 64 * 32 * 32
    size = codecs.by_name("paper").encoded_size((256, 64, 32, 32))
    assert 4 * elements / size == pytest.approx(13.79, abs=0.005)
