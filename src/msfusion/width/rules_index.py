"""Rules for operators that look up or write at positions: the axis of the positions stays, the others pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from msfusion.width.analysis import Analysis, Outcome, operator_name, rule
from msfusion.width.axes import Axes, Axis, freeze, fresh, unify
from msfusion.width.rules_elementwise import dimensions

_LOOKED_UP = "looked up by index"
_VOCABULARY = "looked up by index (a vocabulary)"


@rule("embedding", "index_select")
def lookup(analysis: Analysis, node: fx.Node) -> Outcome:
    """One axis is looked up: a vocabulary, or the axis that is named."""
    embedding = operator_name(node) == "embedding"
    axes = list(analysis.axes(analysis.argument(node, "weight" if embedding else "self")))
    d = 0 if embedding else dimensions(analysis, node)[0]
    freeze(axes[d], _VOCABULARY if embedding else _LOOKED_UP)
    found = analysis.axes(analysis.argument(node, "indices" if embedding else "index"))
    return [Axis(axis.terms) for axis in (*axes[:d], *found, *axes[d + 1 :])]


@rule("index")
def index(analysis: Analysis, node: fx.Node) -> Outcome:
    """`x[i, j]` by whole numbers, or `x[mask]`, which takes as many axes as the mask has."""
    axes = analysis.axes(node.args[0])
    return _at(analysis, node, axes, analysis.shape(node))


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(analysis: Analysis, node: fx.Node) -> Outcome:
    """`x[i, j] = values`, or `x[mask] = values`."""
    axes = analysis.axes(node.args[0])
    values = analysis.axes(analysis.argument(node, "values"))
    target = _at(analysis, node, axes, None)
    analysis.broadcast([target, values])
    return [Axis(axis.terms) for axis in axes]


def _at(analysis: Analysis, node: fx.Node, axes: Axes, sizes: list[int] | None) -> Axes:
    """The axes of what stands at some positions; those of the positions are frozen.

    The axes of the positions stand where the first indexed axis was, or foremost where the indexed axes are apart.
    """
    rest: Axes = []
    found: list[Axes] = []
    where: list[int] = []  # for each index, how many axes that stay lie before it
    remaining = list(axes)
    for entry in analysis.argument(node, "indices"):
        if entry is None:
            rest.append(remaining.pop(0))
            continue
        masks = entry.meta["val"].dtype in (torch.bool, torch.uint8)
        for axis in remaining[: len(analysis.axes(entry)) if masks else 1]:
            freeze(axis, _LOOKED_UP)
        del remaining[: len(analysis.axes(entry)) if masks else 1]
        for axis in analysis.axes(entry) if masks else []:
            freeze(axis, "a mask that picks positions")
        found.append([Axis(((),))] if masks else analysis.axes(entry))
        where.append(len(rest))
    first = where[0] if len(set(where)) == 1 else 0
    positions = analysis.broadcast(found)
    if any(entry is not None and entry.meta["val"].dtype in (torch.bool, torch.uint8)
           for entry in analysis.argument(node, "indices")):  # fmt: skip
        positions = _picked(node, sizes, positions, first)
    rest += remaining
    return [Axis(axis.terms) for axis in (*rest[:first], *positions, *rest[first:])]


def _picked(node: fx.Node, sizes: list[int] | None, positions: Axes, first: int) -> Axes:
    """How many positions a mask picks depends on the data: the output says it, or nobody needs it."""
    if sizes is None:
        return [Axis(((),)) for _ in positions]
    return [fresh(size, "positions picked by a mask") for size in sizes[first : first + len(positions)]]


@rule("gather", "take_along_dim")
def gather(analysis: Analysis, node: fx.Node) -> Outcome:
    """`out[i, j] = x[index[i, j], j]`: the axis looked up stays, the others pass where the index covers them whole."""
    axes, dim = analysis.axes(node.args[0]), analysis.argument(node, "dim")
    index = analysis.axes(analysis.argument(node, "index" if operator_name(node) == "gather" else "indices"))
    if dim is None:
        return None
    return [Axis(axis.terms) for axis in _along(axes, index, dim)]


def _along(axes: Axes, index: Axes, dim: int) -> Axes:
    """Unite the axes of a tensor with those of an index into one of them; returns the index's as they are read."""
    read: Axes = []
    for position, (ours, theirs) in enumerate(zip(axes, index, strict=True)):
        if position == dim % len(axes):
            freeze(ours, _LOOKED_UP)
            freeze(theirs, _LOOKED_UP)
        elif ours.size == theirs.size:
            unify(ours, theirs)
        elif theirs.size == 1 or ours.size == 1:
            pass  # what is repeated, or read at its first position alone
        if position != dim % len(axes) and ours.size > theirs.size:
            freeze(ours, "indexed at its first positions alone")
            freeze(theirs, "indexed at its first positions alone")
        read.append(theirs)
    return read


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(analysis: Analysis, node: fx.Node) -> Outcome:
    """`x[index[i, j], j] = source[i, j]`, or added there."""
    axes, dim = analysis.axes(node.args[0]), analysis.argument(node, "dim")
    index = _along(axes, analysis.axes(analysis.argument(node, "index")), dim)
    source = analysis.argument(node, "src")
    if isinstance(source, fx.Node) and source.meta["val"].ndim:
        _along(analysis.axes(source), index, dim)
    return [Axis(axis.terms) for axis in axes]


@rule("index_add", "index_copy", "index_fill", "index_reduce")
def index_add(analysis: Analysis, node: fx.Node) -> Outcome:
    """Slices of `source` are written, or added, at positions of one axis."""
    axes, d = analysis.axes(node.args[0]), dimensions(analysis, node)[0]
    freeze(axes[d], _LOOKED_UP)
    source = analysis.argument(node, "source")
    if isinstance(source, fx.Node) and source.meta["val"].ndim == len(axes):
        theirs = analysis.axes(source)
        freeze(theirs[d], _LOOKED_UP)
        for position, axis in enumerate(axes):
            if position != d:
                unify(axis, theirs[position])
    elif isinstance(source, fx.Node):
        return None
    return [Axis(axis.terms) for axis in axes]


@rule("masked_scatter")
def masked_scatter(analysis: Analysis, node: fx.Node) -> Outcome:
    """`x[mask] = source`, in order: whole rows where the mask is one value repeated along the last axis."""
    axes, source = analysis.axes(node.args[0]), analysis.axes(analysis.argument(node, "source"))
    mask = analysis.argument(node, "mask")
    if source[-1].size != axes[-1].size or not _repeats_rows(mask):
        return None
    for axis in (*axes[:-1], *source[:-1], *analysis.axes(mask)[:-1]):
        freeze(axis, "a mask that picks positions")
    unify(axes[-1], source[-1])
    if analysis.axes(mask)[-1].size != 1:
        unify(axes[-1], analysis.axes(mask)[-1])
    return [Axis(axis.terms) for axis in axes]


def _repeats_rows(mask: Any) -> bool:
    """Whether a mask is known to be one value repeated along its last axis."""
    while isinstance(mask, fx.Node):
        value = mask.meta["val"]
        if value.shape and value.shape[-1] == 1:
            return True
        if getattr(mask.target, "_schema", None) is None or operator_name(mask) not in {
            "expand", "expand_as", "to", "_to_copy", "contiguous", "clone",
        }:  # fmt: skip
            return False
        mask = mask.args[0]
    return False


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(analysis: Analysis, node: fx.Node) -> Outcome:
    """Sums, means or maxima of embeddings, each feature by itself; the further outputs count positions."""
    outputs = analysis.frozen(node, "bags of indices")
    assert outputs is not None
    vocabulary, width = analysis.axes(analysis.argument(node, "weight"))
    freeze(vocabulary, _VOCABULARY)
    for name in ("indices", "offsets", "per_sample_weights"):
        if isinstance(analysis.argument(node, name), fx.Node):
            for axis in analysis.axes(analysis.argument(node, name)):
                freeze(axis, "bags of indices")
    bags: Any = outputs[0]
    return [[bags[0], Axis(width.terms)], *outputs[1:]]
