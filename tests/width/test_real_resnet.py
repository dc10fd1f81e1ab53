"""ResNet-18 at its real size: how fast its map is found, and what share of its entries each schedule reaches."""

from __future__ import annotations

import time
from functools import cache

import pytest
import torch
from zoo_convolution import ResNet18

from msfusion.width.groups import WidthMap
from msfusion.width.trace import trace
from msfusion.windows import coverage, double_shift, random, rolling, static

pytestmark = pytest.mark.release


@cache
def resnet18() -> tuple[WidthMap, float]:
    """The map of the CIFAR ResNet-18 (11.2 M parameters), and the processor's seconds that it took."""
    torch.manual_seed(0)
    model = ResNet18((64, 128, 256, 512))
    begin = time.process_time()
    width_map = trace(model, (torch.randn(2, 3, 16, 16),))
    return width_map, time.process_time() - begin


def test_all_stages_are_narrowed() -> None:
    width_map, seconds = resnet18()
    sizes = sorted(group.units for group in width_map.groups)
    assert sizes == [64] * 3 + [128] * 3 + [256] * 3 + [512] * 3  # a stream per stage, two blocks' insides
    assert width_map.reach() > 0.999
    assert seconds < 10


def test_double_shift_reaches_nearly_every_entry_within_twelve_rounds() -> None:
    assert coverage(resnet18()[0], double_shift, [0.25] * 10, 12)[-1] >= 0.99


def test_one_stride_for_all_groups_never_reaches_half_of_the_entries() -> None:
    width_map, _ = resnet18()
    shares = coverage(width_map, rolling, [0.25], 520)
    assert shares[:12] == coverage(width_map, rolling, [0.25] * 10, 12)  # all hold the same window
    assert shares[-1] == pytest.approx(0.536, abs=0.003)
    assert shares[-1] == shares[511]  # after a whole turn of the widest group nothing new comes


def test_nested_and_random_windows_for_comparison() -> None:
    width_map, _ = resnet18()
    nested = coverage(width_map, static, [0.25] * 10, 12)
    assert nested[0] == nested[-1] == pytest.approx(1 / 16, abs=0.01)
    independent = coverage(width_map, random, [0.25] * 10, 12)
    assert independent[-1] > 0.99
