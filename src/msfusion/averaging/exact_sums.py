"""Sums of tensors, entry by entry, without any rounding error; so they do not depend on the order of the
terms.

An entry's sum is kept as an expansion (Shewchuk, "Adaptive Precision Floating-Point Arithmetic", 1997): a few
float64 numbers that add up to it exactly. Each addition passes its rounding error on to the next component. A
component is allocated once an error needs it: weights that are integers take one, float32 parameters one or
two, and a third is needed only where terms of one entry differ by a factor of 2^70 or so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import EllipsisType

import torch
from jaxtyping import Float64
from torch import Tensor

from msfusion.width.slices import Cut

CHUNK = 32_768
"""Entries worked on at a time: the temporaries of an addition then stay in the processor's cache."""

SPLITTER = 2.0**27 + 1
"""Veltkamp's constant: splits a float64 into two numbers of 26 bits."""


class ExactSum:
    """The sum of sub-tensors that stand somewhere in a full tensor of a given shape; elsewhere zero."""

    def __init__(self, shape: Iterable[int], device: torch.device) -> None:
        self.shape = tuple(shape)
        self.device = device
        self.components: list[Float64[Tensor, "..."]] = []

    def add(self, cut: Cut, terms: Iterable[Float64[Tensor, "..."]]) -> None:
        """Add each of the sub-tensors, that all stand where `cut` says. The terms are overwritten."""
        for term in terms:
            self._add_one(cut, term.contiguous())

    def _add_one(self, cut: Cut, term: Float64[Tensor, "..."]) -> None:
        for component in self.components:
            part = component if cut.whole else cut.take(component)
            _two_sum_(part, term)
            if not cut.whole:
                cut.put(component, part)
            if not term.any():
                return
        component = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        cut.put(component, term)
        self.components.append(component)

    def total(
        self, rows: slice | EllipsisType = ...
    ) -> tuple[Float64[Tensor, "..."], Float64[Tensor, "..."]]:
        """The sum as (high, low): high is the sum rounded to float64, low is the rest, rounded likewise.

        They depend on nothing but the exact sum. `rows` chooses a part of the first axis.
        """
        # the zeros take no memory: `self.shape` can be that of the largest tensor of the model
        nothing = torch.zeros((), dtype=torch.float64, device=self.device).expand(self.shape)
        components = [component[rows] for component in [*self.components, nothing, nothing]]
        high, low = (component.clone(memory_format=torch.contiguous_format) for component in components[:2])
        _two_sum_(high, low)
        if len(self.components) > 2:
            _sum_many(components[: len(self.components)], high, low)
        return high, low


def exact_products(values: Tensor, factor: float) -> list[Float64[Tensor, "..."]]:
    """Float64 tensors whose sum is exactly `values * factor`: one where a float64 holds it, two or four
    otherwise.

    Exact unless a product underflows (is below about 1e-290).
    """
    wide = values.to(torch.float64)
    values_bits = 53 if values.dtype == torch.float64 else 24
    if _fits(factor, 53 - values_bits):
        return [wide * factor]
    factors = [factor] if _fits(factor, 26) else _halves(factor)
    if values_bits == 24:
        return [wide * part for part in factors]
    top, rest = _split(wide)
    return [half * part for part in factors for half in (top, rest)]


def quotient(
    high: Float64[Tensor, "..."],
    low: Float64[Tensor, "..."],
    divisor_high: Float64[Tensor, "..."],
    divisor_low: Float64[Tensor, "..."],
) -> Float64[Tensor, "..."]:
    """(high + low) / (divisor_high + divisor_low), to within a hair of its correct rounding to float64.

    A quotient that float64 can hold is exact. (One step of long division with the exact remainder.)
    """
    first = high / divisor_high
    product = first * divisor_high
    remainder = (high - product) - _product_error(first, divisor_high, product) + low - first * divisor_low
    return first + remainder / divisor_high


def _two_sum_(one: Float64[Tensor, "*shape"], other: Float64[Tensor, "*shape"]) -> None:
    """Knuth's TwoSum in place: `one` becomes the rounded sum, `other` its rounding error."""
    for a, b in zip(torch.split(one.view(-1), CHUNK), torch.split(other.view(-1), CHUNK), strict=True):
        total = a + b
        added = total - a
        b.sub_(added)
        a.sub_(total.sub(added)).add_(b)  # what a lost, plus what b lost
        b.copy_(a)
        a.copy_(total)


def _sum_many(components: Sequence[Tensor], high: Tensor, low: Tensor) -> None:
    """Correct the few entries that three or more components share, one by one (no faster way is exact)."""
    shared = torch.stack([component != 0 for component in components[2:]]).any(0)
    if not shared.any():
        return
    columns = torch.stack([component[shared] for component in components]).T.tolist()
    highs = [math.fsum(column) for column in columns]
    high[shared] = high.new_tensor(highs)
    low[shared] = low.new_tensor([math.fsum([*c, -top]) for c, top in zip(columns, highs, strict=True)])


def _product_error(one: Tensor, other: Tensor, product: Tensor) -> Float64[Tensor, "..."]:
    """Dekker: one * other - product, exactly."""
    one_top, one_rest = _split(one)
    other_top, other_rest = _split(other)
    error = one_top * other_top - product
    return error + one_top * other_rest + one_rest * other_top + one_rest * other_rest


def _split(values: Float64[Tensor, "..."]) -> tuple[Float64[Tensor, "..."], Float64[Tensor, "..."]]:
    """Veltkamp: two tensors of 26-bit numbers that add up to the values."""
    scaled = values * SPLITTER
    top = scaled - (scaled - values)
    return top, values - top


def _halves(factor: float) -> list[float]:
    scaled = factor * SPLITTER
    top = scaled - (scaled - factor)
    return [top, factor - top]


def _fits(number: float, bits: int) -> bool:
    """Whether a number's significand has at most so many bits."""
    return (math.frexp(number)[0] * 2.0**bits).is_integer()
