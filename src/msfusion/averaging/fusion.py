"""Overlap averaging: each entry of the global model becomes the weighted mean over the participants that held
it.

    theta[e]  <-  sum_{p holds e} a_p theta_p[e]  /  sum_{p holds e} a_p

An entry nobody held keeps its value, bit for bit. The sums are exact (`averaging.exact_sums`), so the result is
the same bit for bit whatever the order in which updates arrive; it is the exact mean, rounded to float64 and
then to the tensor's own type. With every ratio 1 this is FedAvg, and an update that changed nothing leaves
the state as it was.

Integers and booleans (`num_batches_tracked` of a BatchNorm) have no mean of their own type: they become the
largest value among the holders. A counter then never falls, and the result does not depend on the order
either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from msfusion.averaging.exact_sums import CHUNK, ExactSum, exact_products, quotient
from msfusion.averaging.flat_buffers import SMALL, bundles_of
from msfusion.errors import MsfusionError, UpdateError
from msfusion.width.groups import State, WidthMap, Window
from msfusion.width.slices import Cut, check_shape, plan

LARGEST = 2.0**960
"""Weights, and values times their weight, must stay below this (about 1e289), so that no sum can overflow."""


def fuse(
    state: State, width_map: WidthMap, updates: Iterable[tuple[Window, State, float]]
) -> dict[str, Tensor]:
    """The next global state, from updates of (window, the tensors trained under it, weight), in any order.

    `updates` may be a generator: only one is held at a time. `state` and the updates are left untouched; the
    result has the names, shapes, dtypes and devices of `state`. Raises UpdateError on the first update that
    does not fit.
    """
    accumulator = Accumulator(state, width_map)
    for number, (window, sub_state, weight) in enumerate(updates):
        accumulator.add(window, sub_state, weight, source=f"update {number}")
    return accumulator.result()


class Accumulator:
    """Sums up updates as they come. Its memory is that of one global model in float64 or two, however many
    come.

    `state` is the global state that the updates started from; it is read again by `result` and never written.
    Raises MsfusionError where the state does not fit the width map.
    """

    def __init__(self, state: State, width_map: WidthMap, *, bundle_limit: int = SMALL) -> None:
        for name, tensor in state.items():
            check_shape(name, tensor, width_map)
            if tensor.is_complex():
                raise MsfusionError(f"tensor {name!r} is complex, and complex tensors cannot be fused")
        self._state = state
        self._width_map = width_map
        distinct = [name for name in state if self._first(name) == name]
        self._bundles = bundles_of({name: state[name] for name in distinct}, bundle_limit)
        bundled = {name for bundle in self._bundles for name in bundle.positions}
        self._alone = [name for name in distinct if name not in bundled]
        self._prepare_sums()

    def _prepare_sums(self) -> None:
        """Sums that are still zero, one for each tensor that stands alone and for each bundle."""
        whole = self._joined_cuts(plan(self._width_map, {}))
        kinds: dict[int, str] = {}
        # tensors that are cut alike are held by the same participants, so they share one sum of weights
        self._alike = {name: kinds.setdefault(id(cut), name) for name, cut in whole.items()}
        self._weights: dict[str, ExactSum] = {}
        self._sums: dict[str, ExactSum] = {}
        self._largest: dict[str, Tensor] = {}
        for name, tensor in self._joined(self._state):
            if self._alike[name] == name:
                self._weights[name] = ExactSum(outline_of(whole[name]), tensor.device)
            if tensor.is_floating_point():
                self._sums[name] = ExactSum(tensor.shape, tensor.device)
            else:
                self._largest[name] = torch.full_like(tensor, least_of(tensor.dtype))

    def add(self, window: Mapping[str, Tensor], sub_state: State, weight: float, *, source: str = "") -> None:
        """Add one participant's tensors, trained under a window, with a weight such as the examples it saw.

        `source` says whose update it is, for the error message. Raises UpdateError where names, shapes,
        dtypes, the window or the weight do not fit, or a value is not finite; the accumulator is then as it
        was before.
        """
        cuts, held = self._fitting(window, sub_state, weight, source or "the update")
        for name, total in self._weights.items():
            shape = outline_of(cuts[name], held=True)
            total.add(
                cuts[name], [torch.full(shape, float(weight), dtype=torch.float64, device=total.device)]
            )
        for name, total in self._sums.items():
            total.add(cuts[name], exact_products(held[name].to(total.device), float(weight)))
        for name, largest in self._largest.items():
            values = held[name].to(largest.device)
            cuts[name].put(largest, torch.maximum(cuts[name].take(largest), values))

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
        """Add an update of which only a `share` counts, with the tensors of `rest` for the other part (None: all do).

        Raises UpdateError as `add` does.
        """
        self.add(window, sub_state, weight * share, source=source)
        if rest is not None:
            self.add(window, rest, weight * (1 - share))

    def result(self) -> dict[str, Tensor]:
        """The fused state: new tensors, the names of a tied one sharing theirs."""
        fused = {name: self._mean(name, old) for name, old in self._joined(self._state)}
        for bundle in self._bundles:
            fused |= bundle.parted(fused[bundle.name])
        return {name: fused[self._first(name)] for name in self._state}

    def memory(self) -> int:
        """The bytes that the accumulator holds, without the state."""
        sums = [*self._weights.values(), *self._sums.values()]
        tensors = [*self._largest.values(), *(part for total in sums for part in total.components)]
        tensors += [positions for bundle in self._bundles for positions in bundle.positions.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def _mean(self, name: str, old: Tensor) -> Tensor:
        """The weighted mean of one tensor or bundle; `old` where nobody held an entry."""
        new = torch.empty_like(old, memory_format=torch.contiguous_format)
        weights = self._weights[self._alike[name]]
        for rows in _row_chunks(old.shape):
            weight_high, weight_low = weights.total(rows if weights.shape[:1] == old.shape[:1] else ...)
            held = weight_high > 0
            if name in self._largest:
                averaged = self._largest[name][rows]
            else:
                # where nobody holds an entry any divisor will do
                divisor = torch.where(held, weight_high, 1.0)
                averaged = quotient(*self._sums[name].total(rows), divisor, weight_low).to(old.dtype)
            new[rows] = torch.where(held, averaged, old[rows])
        return new

    def _joined(self, tensors: State) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, each bundle as one. One at a time: bundles are copies."""
        for name in self._alone:
            yield name, tensors[name].detach()
        for bundle in self._bundles:
            yield bundle.name, bundle.joined(tensors)

    def _joined_cuts(self, cuts: Mapping[str, Cut]) -> dict[str, Cut]:
        """The cuts of what `_joined` yields."""
        joined = {bundle.name: bundle.cut(cuts) for bundle in self._bundles}
        return {name: cuts[name] for name in self._alone} | joined

    def _first(self, name: str) -> str:
        """The name under which a tied tensor is summed: its first one, if the state has that."""
        first = self._width_map.aliases.get(name, name)
        return first if first in self._state else name

    def _fitting(
        self, window: Mapping[str, Tensor], sub_state: State, weight: float, source: str
    ) -> tuple[dict[str, Cut], dict[str, Tensor]]:
        """The cuts and the tensors of an update as they are summed up; UpdateError where it does not fit."""
        cuts = self._joined_cuts(self._checked(window, sub_state, weight, source))
        held = dict(self._joined(sub_state))
        self._check_values(held, sub_state, weight, source)
        return cuts, held

    def _checked(
        self, window: Mapping[str, Tensor], sub_state: State, weight: float, source: str
    ) -> dict[str, Cut]:
        """Where each tensor's entries stand; UpdateError where the update does not fit."""
        if not (math.isfinite(weight) and 0 < weight < LARGEST):
            raise UpdateError(f"{source}: the weight must be a finite number greater than 0, not {weight}")
        try:
            cuts = plan(self._width_map, window)
        except MsfusionError as error:
            raise UpdateError(f"{source}: {error}") from error
        missing, unknown = self._state.keys() - sub_state.keys(), sub_state.keys() - self._state.keys()
        if missing:
            raise UpdateError(
                f"{source}: the update lacks {len(missing)} tensors, among them {min(missing)!r}"
            )
        if unknown:
            raise UpdateError(
                f"{source}: the update has a tensor {min(unknown)!r} that the global model has not"
            )
        for name, tensor in sub_state.items():
            first = sub_state[self._first(name)]
            problem = _form_problem(tensor, self._state[name].dtype, cuts[name])
            if not problem and tensor is not first and not (tensor == first).all():
                problem = "is tied to another name but has other values"
            if problem:
                raise UpdateError(f"{source}: tensor {name!r} {problem}")
        return cuts

    def _check_values(
        self, joined: Mapping[str, Tensor], sub_state: State, weight: float, source: str
    ) -> None:
        """UpdateError, naming the tensor, where a value is not finite or too large."""
        if not any(_value_problem(tensor, weight) for tensor in joined.values()):
            return
        for name, tensor in sub_state.items():
            if problem := _value_problem(tensor, weight):
                raise UpdateError(f"{source}: tensor {name!r} {problem}")


def _form_problem(tensor: Tensor, dtype: torch.dtype, cut: Cut) -> str | None:
    """What is wrong with an update's tensor whatever its values, as the end of a sentence."""
    if tensor.dtype != dtype:
        return f"has type {tensor.dtype}, but the global model has {dtype}"
    if tuple(tensor.shape) != cut.held_shape:
        return f"has shape {tuple(tensor.shape)}, but the window needs {cut.held_shape}"
    return None


def _value_problem(tensor: Tensor, weight: float) -> str | None:
    """What is wrong with an update's values, as the end of a sentence."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = (float(bound) for bound in torch.aminmax(tensor.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            return "has values that are not finite (NaN or infinite)"
        if max(-low, high) * weight >= LARGEST:
            return f"has values too large to be averaged with weight {weight}"
    return None


def outline_of(cut: Cut, held: bool = False) -> tuple[int, ...]:
    """The cut's full (or held) shape, with length 1 on all axes that are not narrowed."""
    shape = [1] * len(cut.shape)
    for axis, selection in cut.axes:
        shape[axis] = selection.held if held else selection.length
    return tuple(shape)


def _row_chunks(shape: Sequence[int]) -> Iterator[slice | EllipsisType]:
    """A tensor's rows, as many at a time as stay in the processor's cache with all that is worked out from
    them.
    """
    if len(shape) == 0:
        yield ...
        return
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def least_of(dtype: torch.dtype) -> int | bool:
    """The smallest value of a type of whole numbers or truth values."""
    return False if dtype == torch.bool else torch.iinfo(dtype).min
