"""Averaging the changes to a model that is made of copies: all copies move together, and come apart as far as they may.

Entries copied from the same small entry are each other's kin (`msfusion.width.copies`). Participant p holds n_p of the
kin of entry e, weighs a_p, and changed its copy by u_p(e). With b_p = a_p / n_p,

    ubar(e)   =  sum over everybody, and the kin it held, of b_p u_p  /  the sum of these b_p
    theta[e] +=  ubar(e)  +  apart * sum over the holders p of e of b_p (u_p(e) - ubar(e)) / c

where c is, among the kin of e, the largest sum of holders' weights b_p. The second term adds up to zero over the kin:
their common motion is that of the small model under FedAvg, whatever the windows, weights and absences. With this c no
entry goes further than its own holders went. With apart = 1 and one holder for each held entry, all of equal weight, a
held entry becomes what its holder made of it.

Where parameters are kept in another scale than participants train them in (`msfusion.width.own_scale`), changes are
summed in theirs, and divided by the factor at the end.

Running statistics move by value, since a sum of changes could make a variance negative: an entry takes the mean over
its kin, mixed by `apart` with that of its own holders. Counters become the largest of their kin.

All sums are exact (`msfusion.averaging.exact_sums`), so the order of updates decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from msfusion.averaging.exact_sums import ExactSum, exact_products, quotient
from msfusion.averaging.fusion import Accumulator, least_of, outline_of
from msfusion.width.copies import Along, Copies, beside, copies_in, factor_at
from msfusion.width.groups import State
from msfusion.width.slices import Cut


class KinAccumulator(Accumulator):
    """Sums up updates as they come, as `Accumulator` does; `result` needs as much memory again for the small model.

    `factors` say by how much parameters are larger where participants train them, by tensor.
    """

    def __init__(self, state: State, copies: Copies, factors: Mapping[str, Along]) -> None:
        super().__init__(state, copies.width_map, bundle_limit=0)
        self._copies, self._factors, self._any = copies, factors, False
        self._trained = frozenset(copies.width_map.parameters)

    def add_update(
        self,
        window: Mapping[str, Tensor],
        sub_state: State,
        weight: float,
        *,
        received: State,
        share: float = 1.0,
        source: str = "",
    ) -> None:
        """Add one participant's tensors, trained from those it `received`.

        Of an update with a `share` below 1 the rest counts as no change. Raises UpdateError as `Accumulator.add` does.
        """
        weight = self._counted(weight)
        cuts, held = self._fitting(window, sub_state, weight, source or "the update")
        number = copies_in(window, self._width_map, self._copies.sizes)
        copies = {name: self._number_of_copies(name, number, cuts[name]) for name in held}
        for name, total in self._weights.items():
            values = torch.full(outline_of(cuts[name], held=True), float(weight), dtype=torch.float64)
            total.add(cuts[name], [(values / copies[name]).to(total.device)])
        for name in self._sums:
            terms = [(held[name], weight * share)]
            if name in self._trained:
                terms.append((received[name], -weight * share))
            elif share < 1:
                terms.append((cuts[name].take(self._state[name]), weight * (1 - share)))
            self._include(name, cuts[name], terms, copies[name])
        for name, largest in self._largest.items():
            values = held[name].to(largest.device)
            cuts[name].put(largest, torch.maximum(cuts[name].take(largest), values))
        self._any = True

    def _counted(self, weight: float) -> float:
        """The weight that an update has in the sums."""
        return weight

    def _include(
        self, name: str, cut: Cut, terms: Sequence[tuple[Tensor, float]], copies: float | Tensor
    ) -> None:
        """Take in one participant's change to a tensor (of a statistic its value): the sum of tensors times factors."""
        total = self._sums[name]
        for values, factor in terms:
            total.add(cut, exact_products(_divided(values.detach().to(total.device), copies), factor))

    def result(self, apart: float = 0.0) -> dict[str, Tensor]:
        """The next state. `apart` says how far copies may come apart, from 0 (not at all) to 1."""
        if not self._any:
            return {name: tensor.clone() for name, tensor in self._state.items()}
        kin = {name: self._kin_weights(name, total) for name, total in self._weights.items()}
        fused: dict[str, Tensor] = {}
        for name, old in self._joined(self._state):
            if name in self._largest:
                fused[name] = self._most(name)
            elif name in self._trained:
                change = self._change(name, kin[self._alike[name]], apart)
                factor = factor_at(self._factors.get(name, {}), None, old.ndim)
                fused[name] = (old.double() + change / beside(factor, old)).to(old.dtype)
            else:
                fused[name] = self._value(name, kin[self._alike[name]], apart).to(old.dtype)
        return {name: fused[self._first(name)] for name in self._state}

    def _number_of_copies(self, name: str, number: Mapping[str, int], cut: Cut) -> float | Tensor:
        """How many kin of each of its entries a window holds."""
        return factor_at(self._copies.along(name, number), cut, len(cut.shape))

    def _kin_weights(self, name: str, weights: ExactSum) -> _KinWeights:
        high, low = self._folded(name, weights).total()
        largest = torch.zeros_like(high)
        each, _ = weights.total()
        for there, here in self._copies.pieces(name):
            here.put(largest, torch.maximum(here.take(largest), there.take(each)))
        return _KinWeights(high, low, largest)

    def _mean_of_kin(self, name: str, kin: _KinWeights) -> Float64[Tensor, "..."]:
        """The mean over the kin of each entry, in the shape of the large model."""
        mean = quotient(*self._folded(name, self._sums[name]).total(), kin.high, kin.low)
        return self._copies.spread(name, mean)

    def _own(self, name: str) -> tuple[Float64[Tensor, "..."], Float64[Tensor, "..."]]:
        """The sum over the holders of each entry, as two numbers."""
        return self._sums[name].total()

    def _change(self, name: str, kin: _KinWeights, apart: float) -> Float64[Tensor, "..."]:
        """What is added to a trained tensor, in the scale in which it is trained."""
        common = self._mean_of_kin(name, kin)
        if apart == 0:
            return common
        own, _ = self._own(name)
        weights, _ = self._weights[self._alike[name]].total()
        largest = self._copies.spread(name, kin.largest)
        return common + apart * (own - weights * common) / largest

    def _value(self, name: str, kin: _KinWeights, apart: float) -> Float64[Tensor, "..."]:
        """What a running statistic becomes."""
        common = self._mean_of_kin(name, kin)
        if apart == 0:
            return common
        weights, rest = self._weights[self._alike[name]].total()
        held = weights > 0
        own = quotient(*self._own(name), torch.where(held, weights, 1.0), rest)
        return torch.where(held, common + apart * (own - common), common)

    def _most(self, name: str) -> Tensor:
        """What a counter becomes."""
        largest = self._largest[name]
        small = torch.full(self._copies.small_shape(name), least_of(largest.dtype), dtype=largest.dtype)
        small = small.to(largest.device)
        for there, here in self._copies.pieces(name):
            here.put(small, torch.maximum(here.take(small), there.take(largest)))
        return self._copies.spread(name, small)

    def _folded(self, name: str, total: ExactSum) -> ExactSum:
        """A sum over the kin, still exact."""
        narrowed, small = self._copies.axes(name), self._copies.small_shape(name)
        shape = [small[axis] if axis in narrowed else length for axis, length in enumerate(total.shape)]
        folded = ExactSum(shape, total.device)
        for there, here in self._copies.pieces(name):
            for component in total.components:
                folded.add(here, [there.take(component)])
        return folded


@dataclass(frozen=True)
class _KinWeights:
    """Of each class of kin, on the axes that are narrowed: the sum of all weights, and the largest of one entry."""

    high: Float64[Tensor, "..."]
    low: Float64[Tensor, "..."]
    largest: Float64[Tensor, "..."]


def _divided(values: Tensor, by: float | Tensor) -> Tensor:
    """The values themselves where there is one copy, so that their products stay short."""
    return values if isinstance(by, float) and by == 1 else values.double() / beside(by, values)
