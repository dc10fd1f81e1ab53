"""Rules for norms and distances along a width: with w of K units a p-norm is (w/K)**(1/p) of the whole one's."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from msfusion.width.analysis import Analysis, Contraction, Outcome, operator_name, rule
from msfusion.width.axes import Axes, Axis, freeze, unify
from msfusion.width.rules_elementwise import dimensions, reduced_axes, tensors_of


@rule("norm", "linalg_vector_norm", "frobenius_norm")
def norm(analysis: Analysis, node: fx.Node) -> Outcome:
    """The p-norm over some axes, or over all."""
    source = tensors_of(node)[0]
    name = {"norm": "p", "linalg_vector_norm": "ord"}.get(operator_name(node), "")
    over = dimensions(analysis, node)
    _sum_of_powers(analysis, node, [source], over, analysis.argument(node, name, 2) if name else 2)
    return reduced_axes(analysis, node, over)


@rule("linalg_norm", "linalg_matrix_norm")
def linalg_norm(analysis: Analysis, node: fx.Node) -> Outcome:
    """A vector's p-norm, or the root of the sum of a matrix's squares; other norms of matrices have no rule."""
    over, order = dimensions(analysis, node), analysis.argument(node, "ord")
    matrix = len(over) > 1 and (analysis.argument(node, "dim") is not None or order is not None)
    if matrix and order not in (None, "fro"):
        return None
    _sum_of_powers(analysis, node, tensors_of(node)[:1], over, None if order == "fro" else order)
    return reduced_axes(analysis, node, over)


@rule("renorm", "embedding_renorm")
def bounded_norm(analysis: Analysis, node: fx.Node) -> Outcome:
    """Slices along one axis, or rows that are looked up, are shortened to a p-norm of at most a bound."""
    by_rows = operator_name(node).startswith("embedding")
    source, axes = tensors_of(node)[0], analysis.axes(node.args[0])
    kept = 0 if by_rows else analysis.argument(node, "dim") % len(axes)
    order = float(analysis.argument(node, "norm_type" if by_rows else "p"))
    power = 0.0 if order == float("inf") else 1 / order
    for d, axis in enumerate(axes):
        if d != kept:
            analysis.touched.append(axis)
            analysis.bounded.setdefault(node, []).append(Contraction(source, d, axis, power))
    if by_rows:
        freeze(axes[0], "looked up by index (a vocabulary)")
    return [Axis(axis.terms) for axis in axes]


def _sum_of_powers(
    analysis: Analysis,
    node: fx.Node,
    operands: Iterable[fx.Node],
    over: Iterable[int],
    order: float | int | None,
) -> None:
    """Note that the root of a sum of p-th powers is taken; where p is no positive number, the axes stay."""
    order = 2.0 if order is None else float(order)
    for operand in dict.fromkeys(operands):  # a tensor's distance to itself is scaled once
        for d in over:
            if order > 0:
                analysis.contract(node, operand, d, power=0.0 if order == float("inf") else 1 / order)
            else:
                freeze(analysis.axes(operand)[d], f"{order:g}-norm over this axis")


@rule("cdist", "_cdist_forward")
def cdist(analysis: Analysis, node: fx.Node) -> Outcome:
    """x1 [..., m, d] and x2 [..., n, d] give the distances [..., m, n]."""
    first, second = (analysis.argument(node, name) for name in ("x1", "x2"))
    x, y = analysis.axes(first), analysis.axes(second)
    unify(x[-1], y[-1])
    _sum_of_powers(analysis, node, (first, second), (-1,), analysis.argument(node, "p"))
    batch = analysis.broadcast([x[:-2], y[:-2]])
    return [Axis(axis.terms) for axis in (*batch, x[-2], y[-2])]


@rule("pdist")
def pdist(analysis: Analysis, node: fx.Node) -> Outcome:
    """The distances of all pairs of rows, one after the other."""
    _sum_of_powers(analysis, node, (node.args[0],), (-1,), analysis.argument(node, "p"))  # type: ignore[arg-type]
    freeze(analysis.axes(node.args[0])[0], "taken in pairs")
    return analysis.frozen(node, "pairs of rows")


@rule("pairwise_distance")
def pairwise_distance(analysis: Analysis, node: fx.Node) -> Outcome:
    """The p-norm of x1 - x2 over the last axis."""
    first, second = (analysis.argument(node, name) for name in ("x1", "x2"))
    shared = analysis.broadcast([analysis.axes(first), analysis.axes(second)])
    _sum_of_powers(analysis, node, (first, second), (-1,), analysis.argument(node, "p"))
    return [*shared[:-1], *([Axis(((),))] if analysis.argument(node, "keepdim") else [])]


@rule("cosine_similarity")
def cosine_similarity(analysis: Analysis, node: fx.Node) -> Outcome:
    """x1 . x2 / (|x1| |x2|) over one axis: the same at any scale, so it is not scaled."""
    first, second = (analysis.argument(node, name) for name in ("x1", "x2"))
    shared: Axes = analysis.broadcast([analysis.axes(first), analysis.axes(second)])
    d = analysis.argument(node, "dim", 1) % len(shared)
    analysis.touched.append(shared.pop(d))
    return shared


@rule("dist")
def dist(analysis: Analysis, node: fx.Node) -> Outcome:
    """The p-norm of x - y over all axes."""
    first, second = tensors_of(node)
    x, y = analysis.axes(first), analysis.axes(second)
    if [axis.size for axis in x] != [axis.size for axis in y]:
        return None
    analysis.broadcast([x, y])
    _sum_of_powers(analysis, node, (first, second), range(len(x)), analysis.argument(node, "p"))
    return []
