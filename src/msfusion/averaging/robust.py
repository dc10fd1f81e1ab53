"""Robust averages: a few participants that lie, or whose machines are broken, do not move the model far.

The mean of ten values follows one of them anywhere. With v_(1) <= ... <= v_(n) the values of one entry, in order,

    median          the middle one, or the mean of the middle two
    trimmed mean    the mean of v_(k+1) ... v_(n-k), where k = max(1, floor(n/5))         of n < 3 values: their mean

(Yin et al., ICML 2018, section 4). Weights have no part in it: who lies about its values lies about its examples too.
Fewer than half of the holders (a fifth, trimmed) cannot pull an entry out of the range of the others' values.

Both need an entry to have several holders. Of a model that everybody trains each entry has all of them. Of copies each
entry has few holders, but all participants hold one of its kin (`averaging.kin`): there ubar, the common change, is the
robust average over the kin, and what a holder adds to its own copy is cut to the range of the values that were kept.

Values are sorted, so the order of updates decides nothing. All updates of a round are kept until `result`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from msfusion.averaging.exact_sums import ExactSum
from msfusion.averaging.fusion import Accumulator
from msfusion.averaging.kin import KinAccumulator
from msfusion.errors import ConfigError
from msfusion.quoting import quoted
from msfusion.registry import Registry
from msfusion.width.copies import Along, Copies, beside
from msfusion.width.groups import State, WidthMap
from msfusion.width.slices import Cut

Average = str
"""How values of one entry become one: "mean" is their weighted mean; the others, in `AVERAGES`, go without weights."""

Rule = Callable[[Float64[Tensor, "holders ..."]], "Kept | Tensor"]
"""From the values of one tensor, stacked, with nan where a participant held no such entry, to their average: a tensor
without the first axis, or with the range of the values that it is of. Order must not matter.
"""

AVERAGES: Registry[Rule] = Registry("average", "method.average", reserved=["mean"])
"""The robust averages by their names. `msfusion.average` adds one."""

OWN_BY_ENTRY = frozenset({"mean", "median", "trimmed"})
"""The averages of the house: each entry by itself."""

TRIMMED = 5
"""One of so many values is left out at either end of a trimmed mean."""


def average(name: str) -> Callable[[Rule], Rule]:
    """A decorator that registers a rule by which values of an entry become one. Raises ConfigError for a taken name."""
    return AVERAGES.add(name)


@dataclass(frozen=True)
class Kept:
    """Of each entry the average, and the least and the largest of the values that it is the mean of."""

    mean: Float64[Tensor, "..."]
    low: Float64[Tensor, "..."]
    high: Float64[Tensor, "..."]


def robust(values: Float64[Tensor, "holders ..."], average: Average) -> Kept:
    """The robust average of each entry over the first axis; where a participant is no holder its value is nan.

    Raises ConfigError for a rule that there is not, or that returns another shape.
    """
    found = AVERAGES[average](values)
    if not isinstance(found, Kept | Tensor):
        raise ConfigError(f"the average {quoted(average)} made a {type(found).__name__}: it must be a tensor")
    kept = found if isinstance(found, Kept) else _with_range(found, values)
    if kept.mean.shape != values.shape[1:]:
        raise ConfigError(
            f"the average {quoted(average)} made shape {list(kept.mean.shape)} of values of shape "
            f"{list(values.shape)}: it must be that without the first axis"
        )
    return kept


@AVERAGES.add("median")
def median(values: Float64[Tensor, "holders ..."]) -> Kept:
    """The middle one of each entry's values, or the mean of the middle two."""
    return _without_ends(values, "median")


@AVERAGES.add("trimmed")
def trimmed(values: Float64[Tensor, "holders ..."]) -> Kept:
    """The mean without the largest and the smallest fifth."""
    return _without_ends(values, "trimmed")


def _with_range(mean: Tensor, values: Float64[Tensor, "holders ..."]) -> Kept:
    """An average of all values that are there."""
    there = ~values.isnan()
    low, high = (torch.where(there, values, far) for far in (math.inf, -math.inf))
    return Kept(mean.to(torch.float64), low.amin(0), high.amax(0))


def check_average(average: Average) -> None:
    """Raise ConfigError where there is no such average."""
    if average != "mean":
        AVERAGES[average]


def _without_ends(values: Float64[Tensor, "holders ..."], average: Average) -> Kept:
    ordered, count = values.sort(0).values, (~values.isnan()).sum(0)  # nan comes last
    left_out = _left_out(count, average)
    number = torch.arange(len(values), device=values.device).view(-1, *[1] * (values.dim() - 1))
    kept = (number >= left_out) & (number < count - left_out)
    mean = torch.where(kept, ordered, 0.0).sum(0) / kept.sum(0)
    low = ordered.gather(0, left_out.clamp(max=len(values) - 1).unsqueeze(0))[0]
    high = ordered.gather(0, (count - 1 - left_out).clamp(min=0).unsqueeze(0))[0]
    # the sum of equal values, divided, may be off by the last bit
    return Kept(torch.minimum(torch.maximum(mean, low), high), low, high)


def _left_out(count: Int[Tensor, "..."], average: Average) -> Int[Tensor, "..."]:
    """How many of so many values are left out at either end."""
    if average == "median":
        return ((count - 1) // 2).clamp(min=0)
    trimmed = (count // TRIMMED).clamp(min=1) if average == "trimmed" else torch.zeros_like(count)
    return torch.where(count < 3, 0, trimmed)


class RobustAccumulator(Accumulator):
    """`Accumulator` with another average. Its memory is that of all updates of the round, and of one tensor of each."""

    def __init__(self, state: State, width_map: WidthMap, average: Average) -> None:
        super().__init__(state, width_map, bundle_limit=0)
        self._average, self._values = average, list[tuple[Mapping[str, Cut], dict[str, Tensor]]]()

    def add(self, window: Mapping[str, Tensor], sub_state: State, weight: float, *, source: str = "") -> None:
        """As `Accumulator.add`; the weight has no part in the average."""
        cuts, held = self._fitting(window, sub_state, weight, source or "the update")
        self._values.append((cuts, {name: tensor.clone() for name, tensor in held.items()}))

    def add_part(
        self,
        window: Mapping[str, Tensor],
        sub_state: State,
        weight: float,
        *,
        share: float,
        rest: State | None,
        source: str = "",
    ) -> None:
        """As `Accumulator.add_part`, with both parts as one value."""
        self.add(window, sub_state, weight, source=source)
        _, held = self._values[-1]
        for name, tensor in self._joined(rest) if rest is not None else ():
            if tensor.is_floating_point():
                held[name] = torch.lerp(tensor.to(held[name]), held[name], share)

    def _mean(self, name: str, old: Tensor) -> Tensor:
        """The robust average of one tensor; `old` where nobody held an entry. Whole numbers: the largest."""
        if not self._values:
            return old.clone()
        each = torch.full((len(self._values), *old.shape), torch.nan, dtype=torch.float64, device=old.device)
        for full, (cuts, held) in zip(each, self._values, strict=True):
            cuts[name].put(full, held[name].to(full))
        nobody = each.isnan().all(0)
        average = (
            robust(each, self._average).mean
            if old.is_floating_point()
            else each.nan_to_num(-torch.inf).amax(0)
        )
        return torch.where(nobody, old, torch.where(nobody, 0.0, average).to(old.dtype))


class RobustKin(KinAccumulator):
    """`KinAccumulator` with another average over the kin; all participants count alike."""

    def __init__(self, state: State, copies: Copies, factors: Mapping[str, Along], average: Average) -> None:
        super().__init__(state, copies, factors)
        self._average = average
        self._values: dict[str, list[tuple[Cut, Tensor, float | Tensor]]] = {}
        self._kept: dict[str, Kept] = {}

    def _counted(self, weight: float) -> float:
        return 1.0

    def _include(
        self, name: str, cut: Cut, terms: Sequence[tuple[Tensor, float]], copies: float | Tensor
    ) -> None:
        change = torch.stack([values.detach().double() * factor for values, factor in terms]).sum(0)
        self._values.setdefault(name, []).append((cut, change, beside(copies, change)))

    def _mean_of_kin(self, name: str, kin: object) -> Float64[Tensor, "..."]:
        return self._copies.spread(name, self._robust(name).mean)

    def _own(self, name: str) -> tuple[Float64[Tensor, "..."], Float64[Tensor, "..."]]:
        """The sum over the holders of each entry, of values within the range of the kin's that were kept."""
        kept, total = self._robust(name), ExactSum(self._state[name].shape, self._state[name].device)
        low, high = (self._copies.spread(name, bound) for bound in (kept.low, kept.high))
        for cut, change, copies in self._values[name]:
            within = torch.minimum(torch.maximum(change, cut.take(low)), cut.take(high))
            total.add(cut, [within / copies])
        return total.total()

    def _robust(self, name: str) -> Kept:
        """The average over the kin, and their range, in the small model's shape."""
        if name not in self._kept:
            each = [self._mean_of_its_copies(name, *one) for one in self._values[name]]
            self._kept[name] = robust(torch.stack(each), self._average)
        return self._kept[name]

    def _mean_of_its_copies(
        self, name: str, cut: Cut, change: Tensor, copies: float | Tensor
    ) -> Float64[Tensor, "..."]:
        """What one participant changed, in the small model's shape."""
        large, small = (
            torch.zeros(cut.shape).to(change),
            torch.zeros(self._copies.small_shape(name)).to(change),
        )
        cut.put(large, change / copies)
        for there, here in self._copies.pieces(name):
            here.put(small, here.take(small) + there.take(large))
        return small


def accumulator_for(state: State, width_map: WidthMap, average: Average) -> Accumulator:
    """What takes in a round's updates: exact sums for the mean, all of their values for a robust average."""
    if average == "mean":
        return Accumulator(state, width_map)
    return RobustAccumulator(state, width_map, average)


def kin_accumulator_for(
    state: State, copies: Copies, factors: Mapping[str, Along], average: Average
) -> KinAccumulator:
    """The same for a model of copies."""
    if average == "mean":
        return KinAccumulator(state, copies, factors)
    return RobustKin(state, copies, factors, average)
