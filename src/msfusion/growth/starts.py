"""Where the matrices and depth vectors of a growth operator start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msfusion.errors import GrowthError
from msfusion.growth.plan import Space
from msfusion.setting import check, setting

WidthStart = Literal["copy", "average", "random"]
DepthStart = Literal["stack", "interlace", "stack_noisy", "interlace_noisy", "uniform", "random"]

_NOISE = 0.03  # the largest weight of another layer in the noisy starts, as in LiGO's released code


@dataclass(frozen=True)
class Start:
    """Where an operator starts.

    Width: "copy" (new rows are copies of old ones in turn, unit by unit), "average" (new rows are weighted averages of
    all old ones, weights drawn uniformly), "random" (the whole matrix Xavier-normal, as Fed-Grow's). `noise` is the
    norm of what is added to each new row of "copy": exact copies would get the same gradients and never differ.
    Depth: target layer k begins as source layer k mod L ("stack") or floor(k L / L') ("interlace"); the noisy variants
    add weights below 0.03 of the other layers; "uniform" averages all, "random" draws the weights.
    Raises GrowthError for other names, or a negative noise.
    """

    width: WidthStart = setting("copy", "new rows: copies of old ones, averages of all, or random")
    depth: DepthStart = setting(
        "stack", "which source layer a target layer begins as, or how it averages them"
    )
    noise: float = setting(
        0.1, "norm of what is added to each new row of copy, so that copies can differ", ge=0
    )

    def __post_init__(self) -> None:
        check(self, GrowthError)


def copied_from(space: Space) -> Int[Tensor, " target"]:
    """For each target index of a space the source index of which it is a copy: factor by factor, in turn.

    Where a key-value head's queries are spread over several, these are copies of it and take its queries in order.
    Where a factor shrinks although the whole grows (more heads of fewer features), all indices in turn.
    """
    shrinks = [new < old for old, new in zip(space.source_sizes, space.target_sizes, strict=True)]
    if shrinks[-1] or (space.split == 1 and any(shrinks)):
        return torch.arange(space.target) % space.source
    (outermost, *inner), (grown, *wide) = space.source_sizes, space.target_sizes
    head = torch.arange(grown) % (outermost * space.split)
    origin = head // space.split
    first = head % space.split * wide[0] if len(wide) == 2 else torch.zeros_like(origin)
    for old, new in zip(inner, wide, strict=True):
        origin = (origin[:, None] * old + (first[:, None] + torch.arange(new)) % old).flatten()
        first = torch.zeros_like(origin)
    return origin


def kept_rows(space: Space) -> Int[Tensor, " source"]:
    """For each source index the first target index that is a copy of it: the identity within the matrix."""
    origin = copied_from(space)
    rows = torch.full((space.source,), space.target)
    kept: Tensor = torch.scatter_reduce(rows, 0, origin, torch.arange(space.target), "amin")
    return kept


def width_start(space: Space, start: Start, generator: torch.Generator) -> Float[Tensor, "target source"]:
    """The matrix of an index space at the start."""
    if start.width == "random":
        deviation = math.sqrt(2.0 / (space.source + space.target))
        return torch.randn(space.target, space.source, generator=generator) * deviation
    origin = copied_from(space)
    matrix = torch.nn.functional.one_hot(origin, space.source).float()
    new = torch.ones(space.target, dtype=torch.bool)
    new[kept_rows(space)] = False
    rows = int(new.sum())
    if start.width == "average":
        weights = torch.rand(rows, space.source, generator=generator)
        matrix[new] = weights / weights.sum(1, keepdim=True)
    else:
        noise = torch.randn(rows, space.source, generator=generator)
        matrix[new] += noise * (start.noise / math.sqrt(space.source))
    return matrix


def source_layer(target_layer: int, source: int, target: int, order: str) -> int:
    """The source layer of which a target layer is a copy."""
    return target_layer % source if order.startswith("stack") else target_layer * source // target


def depth_start(
    source: int, target: int, start: DepthStart, generator: torch.Generator
) -> Float[Tensor, "target source"]:
    """The depth vectors of a kind of module at the start: target layer k is the sum over l of w[k, l] * layer l."""
    if start == "uniform":
        return torch.full((target, source), 1.0 / source)
    if start == "random":
        weights = torch.rand(target, source, generator=generator)
        return weights / weights.sum(1, keepdim=True)
    chosen = torch.tensor([source_layer(k, source, target, start) for k in range(target)])
    weights = torch.nn.functional.one_hot(chosen, source).float()
    if start.endswith("_noisy"):
        weights = torch.where(weights == 1, weights, torch.rand(weights.shape, generator=generator) * _NOISE)
        weights = weights / weights.sum(1, keepdim=True)
    return weights
