"""Rules for operators that rearrange: transpose, view, cut, join, repeat."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import fx

from msfusion.width.analysis import Analysis, Outcome, operator_name, overload, rule, shape_of
from msfusion.width.axes import Axes, Axis, cut_at, freeze, fresh, is_frozen, unify
from msfusion.width.rules_elementwise import dimensions, tensors_of
from msfusion.width.views import regroup, split


@rule(
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "adjoint",
    "matrix_H",
)
def permute(analysis: Analysis, node: fx.Node) -> Outcome:
    """Axes in another order; they are still the same axes of the state."""
    axes = analysis.axes(node.args[0])
    rank = len(axes)
    name = operator_name(node)
    order = list(range(rank))
    if name == "permute":
        order = dimensions(analysis, node, "dims")
    elif name in {"transpose", "swapaxes", "swapdims"}:
        given: list[Any] = list(node.args[1:3])
        a, b = (d % rank for d in given)
        order[a], order[b] = b, a
    elif name in {"movedim", "moveaxis"}:
        source, target = dimensions(analysis, node, "source"), dimensions(analysis, node, "destination")
        rest = iter(d for d in range(rank) if d not in source)
        order = [source[target.index(d)] if d in target else next(rest) for d in range(rank)]
    elif name == "numpy_T":
        order.reverse()
    elif rank >= 2:
        order[-2:] = order[-1], order[-2]
    return [axes[d] for d in order]


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def view(analysis: Analysis, node: fx.Node) -> Outcome:
    """A row-major view with other sizes."""
    if overload(node) == "dtype":
        return None
    return regroup(analysis.axes(node.args[0]), analysis.shape(node))


@rule("unsqueeze")
def unsqueeze(analysis: Analysis, node: fx.Node) -> Outcome:
    """A new axis of size 1."""
    axes = list(analysis.axes(node.args[0]))
    axes.insert(analysis.argument(node, "dim") % (len(axes) + 1), Axis(((),)))
    return axes


@rule("squeeze")
def squeeze(analysis: Analysis, node: fx.Node) -> Outcome:
    """Axes of size 1 vanish."""
    axes = analysis.axes(node.args[0])
    gone = {d for d in dimensions(analysis, node) if axes[d].size == 1}
    return [axis for d, axis in enumerate(axes) if d not in gone]


@rule("expand", "expand_as", "broadcast_to")
def expand(analysis: Analysis, node: fx.Node) -> Outcome:
    """Axes of size 1 are repeated: equal values, so any width will do."""
    sizes = analysis.shape(node)
    axes = analysis.axes(node.args[0])
    padded = [Axis(((),))] * (len(sizes) - len(axes)) + list(axes)
    result = [a if a.size == size else fresh(size, weak=True) for a, size in zip(padded, sizes, strict=True)]
    if operator_name(node).startswith("expand_as"):
        analysis.broadcast([result, analysis.axes(node.args[1])])
    return result


@rule("repeat", "tile")
def repeat(analysis: Analysis, node: fx.Node) -> Outcome:
    """Each axis is laid end to end with itself: an outer factor that is never narrowed."""
    axes = analysis.axes(node.args[0])
    sizes = analysis.shape(node)
    padded = [Axis(((),))] * (len(sizes) - len(axes)) + list(axes)
    return [_repeated(axis, size // axis.size, inner=False) for axis, size in zip(padded, sizes, strict=True)]


@rule("repeat_interleave")
def repeat_interleave(analysis: Analysis, node: fx.Node) -> Outcome:
    """Each index of an axis is repeated in place: an inner factor."""
    axes = list(analysis.axes(node.args[0]))
    if not isinstance(analysis.argument(node, "repeats"), int) or analysis.argument(node, "dim") is None:
        return None
    d = dimensions(analysis, node)[0]
    axes[d] = _repeated(axes[d], analysis.argument(node, "repeats"), inner=True)
    return axes


def _repeated(axis: Axis, times: int, inner: bool) -> Axis:
    if times == 1:
        return axis
    if axis.size == 1:  # equal values, as `expand` gives them
        return fresh(times, weak=True)
    if is_frozen(axis):
        return fresh(axis.size * times, "a repeated axis that is not narrowed")
    factor = fresh(times, "repeated").terms[0]
    if inner:
        return Axis(tuple((*term, *factor) for term in axis.terms))
    return Axis(axis.terms * times if len(axis.terms) > 1 else ((*factor, *axis.terms[0]),))


@rule("select", "unbind")
def select(analysis: Analysis, node: fx.Node) -> Outcome:
    """Single positions of an axis are picked out: it cannot be narrowed, unless all of them are alike."""
    axes = list(analysis.axes(node.args[0]))
    d = dimensions(analysis, node)[0]
    picked = axes.pop(d)
    if not (_of_one_value(node.args[0]) and analysis.argument(node, "index") in (0, -1)):
        freeze(picked, "indexed at fixed positions")
    values = node.meta["val"]
    return [list(axes) for _ in values] if isinstance(values, (tuple, list)) else axes


def _of_one_value(source: Any) -> bool:
    """Whether a tensor was just made of one value repeated (and perhaps sliced), and nobody writes into it."""
    while len(source.users) == 1 and getattr(source.target, "_schema", None) is not None:
        if operator_name(source) != "slice":
            return operator_name(source) in {"zeros_like", "ones_like", "full_like"}
        source = source.args[0]
    return False


@rule("slice", "narrow")
def slice_(analysis: Analysis, node: fx.Node) -> Outcome:
    """A stretch of an axis: the cuts become borders of its parts."""
    axes = list(analysis.axes(node.args[0]))
    d = dimensions(analysis, node)[0] if axes else 0
    axis, size = axes[d], analysis.shape(node)[d]
    if any(isinstance(analysis.argument(node, name), fx.Node) for name in ("start", "end", "length")):
        freeze(axis, "sliced up to a length that varies")
    elif size == axis.size:
        return axes
    if size == 0:
        axes[d] = Axis(())
        return axes
    start, step = analysis.argument(node, "start"), analysis.argument(node, "step", 1)
    if step != 1 or is_frozen(axis):
        freeze(axis, "sliced")
        axes[d] = fresh(size, "a slice of an axis that is not narrowed")
        return axes
    begin = max(0, (start or 0) + (axis.size if (start or 0) < 0 else 0))
    pieces = cut_at(axis, [begin, begin + size])
    axes[d] = pieces[1] if pieces else fresh(size, "split inside a unit")
    if pieces:
        analysis.pieces[node] = pieces
    return axes


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split_(analysis: Analysis, node: fx.Node) -> Outcome:
    """An axis is cut into consecutive pieces."""
    axes = analysis.axes(node.args[0])
    d = dimensions(analysis, node)[0]
    sizes = [shape_of(value)[d] for value in node.meta["val"]]
    pieces = None if is_frozen(axes[d]) else cut_at(axes[d], list(accumulate(sizes))[:-1])
    pieces = pieces or [fresh(size, "a piece of an axis that is not narrowed") for size in sizes]
    analysis.pieces[node] = pieces
    return [[*axes[:d], piece, *axes[d + 1 :]] for piece in pieces]


@rule("cat", "concat", "concatenate")
def cat(analysis: Analysis, node: fx.Node) -> Outcome:
    """Axes are laid end to end; the others are united."""
    parts = [analysis.axes(n) for n in tensors_of(node)]
    rank = len(parts[0])
    d = analysis.argument(node, "dim", 0) % rank
    parts = [axes for axes in parts if len(axes) == rank and axes[d].size] or parts
    result: Axes = []
    for position in range(rank):
        columns = [axes[position] for axes in parts]
        if position == d:
            result.append(Axis(tuple(term for axis in columns for term in axis.terms)))
        else:
            for other in columns[1:]:
                unify(columns[0], other)
            result.append(columns[0])
    return result


@rule("stack")
def stack(analysis: Analysis, node: fx.Node) -> Outcome:
    """Tensors are united on a new axis."""
    axes = analysis.broadcast([analysis.axes(n) for n in tensors_of(node)])
    d = analysis.argument(node, "dim", 0) % (len(axes) + 1)
    axes.insert(d, fresh(len(tensors_of(node)), "stacked"))
    return axes


@rule(
    "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "replication_pad1d"
)
def pad(analysis: Analysis, node: fx.Node) -> Outcome:
    """Zeros before and after an axis are parts of their own; any other padding depends on the position."""
    axes = list(analysis.axes(node.args[0]))
    amounts: list[Any] = list(analysis.argument(node, "pad") or analysis.argument(node, "padding"))
    by_constant = operator_name(node).startswith("constant") or analysis.argument(node, "mode") == "constant"
    sizes = analysis.shape(node)
    for index in range(len(amounts) // 2):
        d = len(axes) - 1 - index
        before, after = amounts[2 * index : 2 * index + 2]
        if before == 0 and after == 0:
            continue
        if (
            is_frozen(axes[d])
            or not by_constant
            or not all(isinstance(a, int) and a >= 0 for a in (before, after))
        ):
            freeze(axes[d], "padded")
            axes[d] = fresh(sizes[d], "a padded axis")
            continue
        first, last = (fresh(n, weak=True).terms if n else () for n in (before, after))
        axes[d] = Axis((*first, *axes[d].terms, *last))
        pieces = analysis.pieces.setdefault(node, [Axis(())] * len(amounts))
        pieces[2 * index : 2 * index + 2] = Axis(first), Axis(last)
    return axes


@rule("unfold")
def unfold(analysis: Analysis, node: fx.Node) -> Outcome:
    """Windows of an axis: their number stands where the axis was, their positions last."""
    axes, sizes = list(analysis.axes(node.args[0])), analysis.shape(node)
    d = dimensions(analysis, node, "dimension")[0]
    freeze(axes[d], "cut into windows")
    axes[d] = fresh(sizes[d], "windows")
    return [*axes, fresh(sizes[-1], "the positions of a window")]


@rule("im2col")
def im2col(analysis: Analysis, node: fx.Node) -> Outcome:
    """Windows of an image as columns: [n, channels * positions of a window, windows]."""
    *batch, channels, height, width = analysis.axes(node.args[0])
    *_, rows, windows = analysis.shape(node)
    for axis in (height, width):
        freeze(axis, "cut into windows")
    inside = fresh(rows // channels.size, "the positions of a window").terms[0]
    column = Axis(tuple((*term, *inside) for term in channels.terms))
    return [*batch, column, fresh(windows, "windows")]


@rule("col2im")
def col2im(analysis: Analysis, node: fx.Node) -> Outcome:
    """Columns of windows put back, with sums where they overlap: [n, channels, height, width]."""
    *batch, column, windows = analysis.axes(node.args[0])
    *_, channels, height, width = analysis.shape(node)
    parts = split(column.terms, [channels, column.size // channels])
    if parts is None:
        return None
    freeze(parts[1], "the positions of a window")
    freeze(windows, "windows")
    return [*batch, parts[0], fresh(height, "space"), fresh(width, "space")]


@rule("view_as_complex", "view_as_real")
def complex_(analysis: Analysis, node: fx.Node) -> Outcome:
    """The pair of real and imaginary part comes and goes."""
    axes = analysis.axes(node.args[0])
    if operator_name(node).startswith("view_as_real"):
        return [*axes, fresh(2, "real and imaginary part")]
    freeze(axes[-1], "real and imaginary part")
    return list(axes[:-1])


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(analysis: Analysis, node: fx.Node) -> Outcome:
    """Channels become space (or back) in whole channels of the smaller count."""
    axes = analysis.axes(node.args[0])
    sizes = analysis.shape(node)
    *batch, channels, _, _ = axes
    if operator_name(node).startswith("pixel_unshuffle"):
        square = fresh(sizes[-3] // channels.size, "pixels of one channel").terms[0]
        out = Axis(tuple((*term, *square) for term in channels.terms))
    else:
        parts = split(channels.terms, [sizes[-3], channels.size // sizes[-3]])
        if parts is None:
            return None
        freeze(parts[1], "pixels of one channel")
        out = parts[0]
    return [*batch, out, *(fresh(size, "space") for size in sizes[-2:])]
