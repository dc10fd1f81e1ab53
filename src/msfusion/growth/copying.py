"""Growing by copies so that the larger model computes what the small one does (Net2Net, arXiv 1511.05641).

*Inside a block* (heads, hidden features) units are copied in turn, any number of them, and the weights that sum over
them are divided by the number of copies. *The residual stream* runs through norms, whose statistics must not change:

- `tile`: a multiple of the width; every unit is copied equally often, so mean and variance stay;
- `zero`: any width under RMSNorm: x' = c [x; 0] with c = (D'/D)^0.5 has the same mean square;
- `mean`: any width under LayerNorm in pre-norm models: x' = c [x; mean(x)] has the mean c mean(x) and the same
  variance, and the new units are 0 once normalised (the average expansion of LEMON, arXiv 2310.07999; the factor c,
  which is ours, makes it exact for any epsilon).

Copies that are read alike would get the same gradients and stay copies for good. So the weights that read them are
split unevenly, every entry at random: only the sum over the copies counts, and the function is still the same. Within
a head, no weights but the keys read what the queries write: the copies of a key's feature are split so.

*New layers* are identities: what they add to the stream is zero. That needs pre-norm: LayerNorm of what LayerNorm gave
is something else. A *tied embedding* is written with one matrix but read with another; the norm before the output layer
takes the factor between the two.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx

from msfusion.growth.axes import Role, analysis_of
from msfusion.growth.plan import GrowthPlan, Space
from msfusion.growth.starts import copied_from, source_layer
from msfusion.width.groups import State, WidthMap

StreamRule = Literal["tile", "zero", "mean"]
Order = Literal["stack", "interlace"]


@dataclass(frozen=True)
class Copy:
    """Growth by copies. Nothing in it trains.

    `stream` says how residual streams are widened; new layers follow in the order of `depth`, as identities or (with
    `identities` False) as plain copies, which is depth stacking and interlacing. `before_output` are the target's
    tensors that take the factor of a tied embedding. `unevenness` is how far the weights that read copies differ, in
    standard deviations of the weights; drawn from `seed`.
    """

    plan: GrowthPlan
    stream: StreamRule = "tile"
    depth: Order = "stack"
    identities: bool = True
    before_output: tuple[str, ...] = ()
    unevenness: float = 0.5
    seed: int = 0

    def materialise(self, state: State) -> dict[str, Tensor]:
        """The target's tensors, from the source's `state_dict()`. Raises GrowthError where that is another's."""
        grown = self.plan.grow(state, self.matrix, {kind: self.layers(kind) for kind in self.plan.layers})
        return self.finished(grown)

    def finished(self, grown: dict[str, Tensor]) -> dict[str, Tensor]:
        """The target's tensors as matrices made them, with what no matrix does: uneven splits and tied factors."""
        finished = dict(grown)
        for match in self.plan.matches:
            for source, name in zip(cycle(match.sources), match.targets, strict=False):
                for axis, start, origin, units in self._split(source):
                    finished[name] = self._uneven(finished[name], name, axis, start, origin, units)
        for name in self.before_output:
            finished[name] = finished[name] * self._tied_factor(name)
        return finished | {name: finished[first] for name, first in self.plan.aliases.items()}

    def _split(self, source: str) -> Iterator[tuple[int, int, Int[Tensor, " target"], int]]:
        """The stretches of a grown tensor that read copies: axis, start, of which unit each is a copy, units."""
        for axis, parts in enumerate(self.plan.parts[source]):
            start = 0
            for part in parts:
                space = self.plan.spaces[part.space] if part.space else None
                if space and part.repeat == 1:
                    if part.role == "contract" and self._is_copied(space):
                        yield axis, start, copied_from(space), space.source
                    elif space.score == "second" and space.target_sizes[-1] > space.source_sizes[-1]:
                        old, new = space.source_sizes[-1], space.target_sizes[-1]
                        within = torch.arange(space.target) // new * old + copied_from(space) % old
                        yield axis, start, within, space.target // new * old
                start += space.target * part.repeat if space else part.length

    def _is_copied(self, space: Space) -> bool:
        """Whether the new units of an index space are copies: of all but a stream that is padded."""
        return space.target > space.source and (self.stream == "tile" or not space.normalised)

    def _uneven(
        self, tensor: Tensor, name: str, axis: int, start: int, origin: Int[Tensor, " target"], units: int
    ) -> Tensor:
        """Noise along the copies of each unit that sums to zero over them."""
        length = len(origin)
        read = tensor.narrow(axis, start, length)
        seed = int.from_bytes(
            hashlib.sha256(f"{self.seed} {name} {axis} {start}".encode()).digest()[:7], "big"
        )
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(read.shape, generator=generator).to(read).movedim(axis, 0)
        origin = origin.to(read.device)
        zeros = torch.zeros_like(noise[:units])
        means = zeros.index_add(0, origin, noise) / zeros.index_add(0, origin, torch.ones_like(noise))
        noise = noise - means[origin]
        noise = noise.movedim(0, axis) * (self.unevenness * read.detach().std())
        pieces = torch.split(tensor, [start, length, tensor.shape[axis] - start - length], axis)
        return torch.cat([pieces[0], pieces[1] + noise, pieces[2]], axis)

    def matrix(self, name: str, role: Role) -> Float[Tensor, "target source"]:
        """The matrix by which an index space grows, for tensors that do this along it."""
        space = self.plan.spaces[name]
        if space.target > space.source and not self._is_copied(space):
            return self._stream_matrix(space, role)
        matrix = torch.nn.functional.one_hot(copied_from(space), space.source).double()
        old, new = space.source_sizes[-1], space.target_sizes[-1]
        if role == "contract":
            return matrix / matrix.sum(0)
        if space.score == "first":  # attention divides the scores by the root of the head dimension
            return matrix * math.sqrt(new / old)
        if space.score == "second":  # the scores sum over the copies within a head
            copies = torch.bincount(torch.arange(new) % old, minlength=old).clamp(min=1)
            return matrix / copies.repeat(space.source // old)
        return matrix

    def _stream_matrix(self, space: Space, role: Role) -> Float[Tensor, "target source"]:
        """The stream becomes c [x; 0 or mean(x)]; what is 0 after the norm may have any weight behind it."""
        factor = math.sqrt(space.target / space.source)
        copies = torch.nn.functional.one_hot(copied_from(space), space.source).double()
        if role == "scale":
            return copies
        if role == "contract":
            return copies / factor
        padded = torch.eye(space.target, space.source, dtype=torch.float64)
        if role == "produce" and self.stream == "mean":
            padded[space.source :] = 1.0 / space.source
        return padded * factor

    def _tied_factor(self, norm: str) -> float:
        """What an output layer should read, over what one does that is tied to the embedding: D/D' under each rule."""
        before, after = (
            math.prod(shapes[name])
            for shapes, name in (
                (self.plan.source_shapes, self.plan.origin(norm)),
                (self.plan.target_shapes, norm),
            )
        )
        return before / after

    def layers(self, kind: str) -> Float[Tensor, "target source"]:
        """Which source layer each target layer copies; none where an identity needs zeros."""
        source, target = self.plan.layers[kind]
        weights = torch.zeros(target, source, dtype=torch.float64)
        silent = self.identities and kind in self._adding()
        seen: set[int] = set()
        for layer in range(target):
            origin = source_layer(layer, source, target, self.depth)
            if not (silent and origin in seen):
                weights[layer, origin] = 1.0
            seen.add(origin)
        return weights

    def _adding(self) -> set[str]:
        """The kinds of modules that write what a block adds to the stream."""
        return {
            match.kind
            for match in self.plan.matches
            for axis in self.plan.parts[match.sources[0]]
            for part in axis
            if match.kind and part.space and part.role == "produce" and self.plan.spaces[part.space].shared
        }


def norms_before_output(plan: GrowthPlan, source: WidthMap) -> tuple[str, ...]:
    """The target's norm weights and biases right before an output layer that is tied to the embedding."""
    analysis = analysis_of(source)
    dependent = analysis.dependent
    tied = {*source.aliases, *source.aliases.values()}
    found: list[str] = []
    for node in analysis.program.graphs[False].graph.nodes:
        if node.op == "get_attr" and node.target in tied:
            for user in _readers(node):
                if user in dependent and any(d in dependent for d in user.all_input_nodes if d is not node):
                    found += [name for name in _norm_before(user, dependent, node) if name in source.shapes]
    targets = {name: match.targets for match in plan.matches for name in match.sources}
    return tuple(dict.fromkeys(grown for name in found for grown in targets[name]))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a tensor: transposed, reshaped or as it is, but not by looking rows up."""
    for user in node.users:
        name = str(user.target)
        if "embedding" in name:
            continue
        if len(user.all_input_nodes) == 1:
            yield from _readers(user)
        else:
            yield user


def _norm_before(reader: fx.Node, dependent: set[fx.Node], tied: fx.Node) -> list[str]:
    """The model's own tensors that the first operator before `reader` with any reads (a norm's weight and bias)."""

    def before(node: fx.Node) -> list[fx.Node]:
        return [
            n for n in node.all_input_nodes if n in dependent and isinstance(n.meta.get("val"), Tensor)
        ]  # and not sizes

    inputs = before(reader)
    while len(inputs) == 1:
        (node,) = inputs
        own = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr" and n is not tied]
        if own:
            return own
        inputs = before(node)
    return []
