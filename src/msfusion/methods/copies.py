"""MSfusion from a grown start: the large model begins as copies of the small one, and its copies come apart later.

    theta        <-  copies of the first weights of `small`, what sums over copies divided by how many there are
    for each round t:
        for each participant p of the round:
            theta_p  <-  theta restricted to a window with one copy of each unit, in the small model's scale   assign
            theta_p  <-  theta_p after some steps on p's own data                                              train
        theta    <-  all copies moved by what everybody changed, and each by what its own holders changed      aggregate

Every slice is the small model, and so is the whole. While copies may not come apart, this is FedAvg of the small model,
in a state that has the large model's shape (docs/copies.md; the average: `msfusion.averaging.kin`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from msfusion.averaging.robust import kin_accumulator_for
from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.capacities import Capacities
from msfusion.federated.method import Answered, Task, blamed
from msfusion.federated.sharding import Sharding
from msfusion.federated.states import holding, loaded, with_aliases, without_aliases
from msfusion.methods.narrow import NarrowMethod, extended, weight_of
from msfusion.methods.parts.divided import check_divisible
from msfusion.methods.small import fresh_weights
from msfusion.objectives import logits_of
from msfusion.width.analysis import module_of
from msfusion.width.copies import Along, Copies, beside, factor_at
from msfusion.width.groups import State, WidthMap, Window
from msfusion.width.mode import mode
from msfusion.width.own_scale import Folding, OwnScale, folding
from msfusion.width.slices import plan
from msfusion.width.submodel import narrow, program_of
from msfusion.windows import (
    Overlap,
    Schedule,
    double_shift_for,
    held_sizes,
    small_sizes,
    transversal,
    window_size,
)

FARTHEST = 0.01
"""How far a slice may be from the whole, relative to the spread of the answers, for copies to be of use."""


@dataclass(frozen=True)
class CopiesSettings:
    """Copies may come apart from round `from_round` on, as far as `apart` says: 0 is not at all, 1 as holders want."""

    from_round: int = 0
    apart: float = 1.0

    def apart_in(self, round_index: int) -> float:
        """How far they may come apart in a round."""
        return self.apart if round_index >= self.from_round else 0.0


@dataclass(frozen=True, eq=False, repr=False)
class CopiesMethod(NarrowMethod):
    """MSfusion whose model begins as copies of a small one; its schedule must be one of transversals."""

    copies: Copies = field(kw_only=True)
    settings: CopiesSettings = field(kw_only=True)

    @property
    def scaling(self) -> OwnScale:
        """Parameters are in the small model's scale; a window of several copies has the rest in its operators."""
        return OwnScale(tuple(sorted(self.copies.sizes.items())))

    def initial_state(self) -> dict[str, Tensor]:
        """Copies of the weights with which the small model begins."""
        return self._copied(self._small_start())

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The participant's slice of the global state, in the small model's scale."""
        task = super().assign(state, round_index, participant)
        cuts = plan(self.width_map, self.window(round_index, participant))
        scaled = {
            name: _times(tensor, factor_at(self._factors[name], cuts[name], tensor.ndim))
            for name, tensor in task.tensors.items()
            if name in self._factors
        }
        return replace(task, tensors={**task.tensors, **scaled})

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """All copies move by the common change; from the round on in which they may, each by its holders' as well."""
        accumulator = kin_accumulator_for(state, self.copies, self._factors, self.average)
        latest = 0
        for task, update in answered:
            latest = max(latest, task.round_index)
            with blamed(update) as source:
                accumulator.add_update(
                    self.window(task.round_index, task.participant),
                    with_aliases(update.tensors, self.width_map.aliases),
                    weight_of(update, self.weighting),
                    received=task.tensors,
                    share=update.share,
                    source=source,
                )
        return accumulator.result(self.settings.apart_in(latest))

    def trained_at(self, ratio: float) -> nn.Module:
        """A model of the shapes that a participant of a ratio trains."""
        return narrow(self.model, self.width_map, _first(self.sizes(ratio)), self.scaling)

    def sizes(self, ratio: float) -> dict[str, int]:
        """How many units of each group a participant of a ratio holds."""
        assert self.capacities is not None
        return held_sizes(self.width_map, ratio, self.capacities.smallest)

    def rounded(self, ratio: float) -> dict[str, tuple[int, int, int]]:
        """The groups of which a ratio asks for more units than a window of copies can have: (held, asked for, all)."""
        held = self.sizes(ratio)
        asked = {group.name: window_size(ratio, group.units) for group in self.width_map.groups}
        return {
            group.name: (held[group.name], asked[group.name], group.units)
            for group in self.width_map.groups
            if held[group.name] != asked[group.name]
        }

    def left_in_operators(self) -> tuple[str, ...]:
        """The modules with a sum whose factor no parameter holds: there the small model has the factor K/w too."""
        return tuple(dict.fromkeys(module_of(node) for node in self._folding.left))

    def difference(self, example: Batch) -> float:
        """How far the answers of slices are from those of the whole, relative to the spread of these.

        The weights are moved off their first values, behind which a difference could hide.
        """
        state = self._copied(moved(self._small_start(), self.width_map))
        with torch.no_grad(), mode(self.model, False), holding(self.model, state) as model:
            whole = _answers(model, example)
        farthest = 0.0
        for participant in dict(zip(self.ratios, range(len(self.ratios)), strict=True)).values():
            for round_index in (0, 1):
                task = self.assign(state, round_index, participant)
                submodel = self._submodel(self.window(round_index, participant))
                loaded(submodel, with_aliases(task.tensors, self.width_map.aliases)).eval()
                with torch.no_grad():
                    answer = _answers(submodel, example)
                farthest = max(farthest, float((answer - whole).abs().max()))
        spread = float(whole.std())
        return farthest / spread if spread > 0 else farthest

    def check(self, example: Batch) -> None:
        """Raise ConfigError where slices of this model do not compute what the whole does."""
        difference = self.difference(example)
        if not difference < FARTHEST:
            raise ConfigError(
                f"method.start is 'copies', but slices of this {type(self.model).__name__} do not compute what the "
                f"whole does while all copies are equal (they are {difference:.2g} of the answers' spread away): "
                "something in it is not the same for all copies; choose method.start = 'fresh'"
            )

    def sharding(self) -> Sharding:
        """Rows of the whole model, all copies of a row together. Raises ConfigError where it cannot be divided."""
        check_divisible(self, CopiesMethod, self.average)
        divided = self._divided(lambda shard: {"copies": self.copies.in_shard(shard)})
        return replace(divided, classes=self.copies.classes)

    def _small_start(self) -> dict[str, Tensor]:
        return fresh_weights(self.model, self.width_map, _first(self.copies.sizes))

    def _copied(self, small: State) -> dict[str, Tensor]:
        """A small model's tensors as a state of the large one: what sums over copies is divided by their number."""
        aliases, copied = self.width_map.aliases, {}
        for name, tensor in small.items():
            if aliases.get(name, name) == name:
                large = self.copies.spread(name, tensor).clone()
                factor = factor_at(self._factors.get(name, {}), None, large.ndim)
                copied[name] = (large / factor).to(tensor.dtype) if self._factors.get(name) else large
        return {name: copied[aliases.get(name, name)] for name in small}

    @cached_property
    def _folding(self) -> Folding:
        analysis = program_of(self.width_map).analysis
        assert analysis is not None, "a traced map has been analysed"
        return folding(analysis)

    @cached_property
    def _factors(self) -> Mapping[str, Along]:
        """By how much parameters are larger in slices than in the whole: K/w along the axes that hold factors."""
        numbers = {group.name: group.units / self.copies.sizes[group.name] for group in self.width_map.groups}
        axes: dict[str, list[int]] = {}
        for name, axis in sorted(self._folding.axes):
            axes.setdefault(name, []).append(axis)
        along = {name: self.copies.along(name, numbers, held) for name, held in axes.items()}
        return {name: values for name, values in along.items() if values}


def copies_method(slices: NarrowMethod, settings: CopiesSettings) -> CopiesMethod:
    """A method of slices, whose model begins as copies of that of the smallest ratio instead.

    Its schedule must be one of transversals. Raises ConfigError where the model cannot be one of copies.
    """
    assert slices.capacities is not None
    sizes = small_sizes(slices.width_map, slices.capacities.smallest)
    return extended(slices, CopiesMethod, copies=Copies(slices.width_map, sizes), settings=settings)


def transversals(capacities: Capacities, overlap: Overlap | None, *, between_rounds: bool) -> Schedule:
    """The windows of MSfusion, each with one copy of every unit of the small model, or several."""
    windows = partial(transversal, smallest=capacities.smallest)
    return double_shift_for(capacities.typical, overlap, between_rounds=between_rounds, windows=windows)


def _answers(model: nn.Module, example: Batch) -> Tensor:
    """What a model returns for an example, as float32 at least."""
    said = logits_of(example.call(model))
    return said.to(torch.promote_types(said.dtype, torch.float32))


def _first(sizes: Mapping[str, int]) -> Window:
    """The first units of each group."""
    return {name: torch.arange(size) for name, size in sizes.items()}


def _times(tensor: Tensor, factor: float | Tensor) -> Tensor:
    return (tensor * beside(factor, tensor)).to(tensor.dtype)


def moved(state: State, width_map: WidthMap) -> dict[str, Tensor]:
    """A small model's state in which nothing is zero or one any more: a mistake could hide behind that."""
    generator, trained = torch.Generator().manual_seed(0), frozenset(width_map.parameters)
    found: dict[str, Tensor] = {}
    for name, tensor in without_aliases(state, width_map.aliases).items():
        found[name] = tensor
        if tensor.is_floating_point():
            noise = 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
            size = float(tensor.std()) if tensor.numel() > 1 else 0.0
            found[name] = tensor + (size or 0.3) * noise if name in trained else tensor * (1 + noise.abs())
    return {name: found[width_map.aliases.get(name, name)] for name in state}
