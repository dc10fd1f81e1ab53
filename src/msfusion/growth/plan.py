"""How a source model's tensors become a target's: the index spaces that grow, and the layers that are mixed.

    theta_target = depth(width(theta_source))          (LiGO, arXiv 2303.00980, section 3)

Width comes first and belongs to the layers of the *source*, as in the paper (its released code mixes the layers first
and has width matrices for the layers of the target, which is another family of maps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from msfusion.errors import GrowthError
from msfusion.growth.axes import Role
from msfusion.growth.layers import Match
from msfusion.width.groups import State


@dataclass(frozen=True)
class Space:
    """An index space of the source and what it becomes: its factors, outermost first, in both models.

    `multiplied`: its innermost factor is within an attention head. `normalised`: a norm's weight or bias stands along
    it (a residual stream). `shared`: it stands in more than one block of a stack, or outside. `score`: the first or the
    second of two that are multiplied with each other along their innermost factor (queries and keys). `split`: over how
    many units of its outermost factor each of the source's is spread (key-value heads that then serve fewer queries).
    """

    name: str
    source_sizes: tuple[int, ...]
    target_sizes: tuple[int, ...]
    multiplied: bool = False
    normalised: bool = False
    shared: bool = False
    score: Literal["first", "second"] | None = None
    split: int = 1

    @property
    def source(self) -> int:
        """How many indices the source has."""
        return math.prod(self.source_sizes)

    @property
    def target(self) -> int:
        """How many indices the target has."""
        return math.prod(self.target_sizes)


@dataclass(frozen=True)
class Part:
    """A stretch of a source tensor's axis: `repeat` blocks of a space, or (`space` is None) kept as it is."""

    length: int
    space: str | None = None
    role: Role = "produce"
    repeat: int = 1


Matrices = Callable[[str, Role], Float[Tensor, "target source"]]
"""The matrix by which an index space grows, by its name and by what the tensor does along it."""


@dataclass(frozen=True)
class GrowthPlan:
    """What `correspond` found. All names are those of state dicts.

    `spaces`: the index spaces that grow, by name. `parts`: for each source tensor that grows, its axes.
    `matches`: target tensors and the source tensors that make them; `layers`: for each kind of module in a stack, how
    many layers the source and the target have; `buffers`: source tensors that do not train, and are copied.
    """

    spaces: Mapping[str, Space]
    parts: Mapping[str, tuple[tuple[Part, ...], ...]]
    matches: tuple[Match, ...]
    layers: Mapping[str, tuple[int, int]]
    buffers: frozenset[str]
    source_shapes: Mapping[str, tuple[int, ...]]
    target_shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]

    def grow(self, state: State, matrices: Matrices, mixing: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The target's tensors: every one in its `state_dict()`, the names of a tied tensor sharing one.

        `mixing` has for each kind of module in a stack a matrix [target layers, source layers].
        Raises GrowthError where the state is not the source's.
        """
        self.check(state)
        grown: dict[str, Tensor] = {}
        for match in self.matches:
            wide = [self._widen(state[name], name, matrices) for name in match.sources]
            if match.kind is None:
                deep = wide
            elif match.sources[0] in self.buffers:
                deep = [wide[k * len(wide) // len(match.targets)] for k in range(len(match.targets))]
            else:
                layers = mixing[match.kind].to(wide[0])
                deep = list(torch.tensordot(layers, torch.stack(wide), 1).unbind())
            grown.update(zip(match.targets, deep, strict=True))
        for name, first in self.aliases.items():
            grown[name] = grown[first]
        return {name: grown[name] for name in self.target_shapes}

    def roles(self, space: str) -> list[Role]:
        """What the source's tensors do along an index space, each once."""
        found = {
            part.role for axes in self.parts.values() for axis in axes for part in axis if part.space == space
        }
        return sorted(found)

    def origin(self, target: str) -> str:
        """The source tensor (the first layer's) from which a target tensor grows."""
        return next(match.sources[0] for match in self.matches if target in match.targets)

    def check(self, state: State) -> None:
        """Raise GrowthError, naming the tensor, unless the state has the source's tensors in the source's shapes."""
        for name, shape in self.source_shapes.items():
            if name not in state:
                raise GrowthError(
                    f"the source's state lacks the tensor {name!r}: load all of the model's tensors"
                )
            if tuple(state[name].shape) != shape:
                raise GrowthError(
                    f"tensor {name!r} has shape {list(state[name].shape)} where the source model has {list(shape)}: "
                    "it is not this model's state"
                )

    def _widen(self, tensor: Tensor, name: str, matrices: Matrices) -> Tensor:
        """Every axis multiplied by its matrices: W' = B_out W B_in^T, b' = B_out b, and so on."""
        for axis, parts in enumerate(self.parts.get(name, ())):
            if any(part.space for part in parts):
                pieces = torch.split(tensor, [part.length for part in parts], axis)
                grown = [_grow_part(x, axis, part, matrices) for x, part in zip(pieces, parts, strict=True)]
                tensor = torch.cat(grown, axis) if len(grown) > 1 else grown[0]
        return tensor


def _grow_part(x: Tensor, axis: int, part: Part, matrices: Matrices) -> Tensor:
    if part.space is None:
        return x
    matrix = matrices(part.space, part.role).to(x)
    if part.repeat > 1:
        blocks = [_multiplied(matrix, block, axis) for block in x.chunk(part.repeat, axis)]
        return torch.cat(blocks, axis)
    return _multiplied(matrix, x, axis)


def _multiplied(matrix: Float[Tensor, "target source"], x: Tensor, axis: int) -> Tensor:
    """A tensor with one axis multiplied by a matrix."""
    product: Tensor = torch.tensordot(matrix, x, ([1], [axis]))
    return product.movedim(0, axis)
