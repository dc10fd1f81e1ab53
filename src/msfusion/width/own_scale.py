"""Which parameter can hold the factor K/w of a sum, so that a slice's parameters are those of a model of its own.

With the factor in the operator, an optimiser whose steps do not depend on the gradient's size (Adam) changes what is
summed K/w times as much as it would in a model that is only w units wide. So the factor is folded into a parameter
wherever one can hold it:

- *the weight that is summed over*, where every use of it is such a sum over that axis (linear maps, convolutions,
  recurrent and bilinear layers). Not an embedding that is also the output layer: it is looked up as well.
- *what feeds the sum*, where a norm, a linear map or a product with a weight stands before it and nothing else reads
  its result: its weight and bias (the norm before a tied output layer).

The other sums (over activations alone, of a norm that is computed from a weight) keep their factor in the operator.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx
from torch._ops import OpOverload

from msfusion.width.analysis import Analysis, Contraction, arguments, has_tensor, operator_name
from msfusion.width.axes import Axis, Product, find, resolved

TensorAxis = tuple[str, int]
"""A tensor by its first name, and one of its axes."""

_IN_PASSING = {
    "dropout", "alias", "clone", "contiguous", "to", "_to_copy", "view", "reshape", "_unsafe_view", "flatten",
    "unflatten", "permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "movedim",
    "squeeze", "unsqueeze", "slice", "select", "narrow", "expand",
}  # fmt: skip
"""What makes no difference to a factor on its way: twice the input gives twice the output."""

_FEEDERS = {
    "layer_norm": ("weight", "bias"),
    "rms_norm": ("weight",),
    "linear": ("weight", "bias"),
    "batch_norm": ("weight", "bias"),
    "mul": ("self", "other"),
}
"""Operators whose result doubles where all of these parameters double."""


@dataclass(frozen=True)
class OwnScale:
    """Slices in the scale of a model of these widths, by group: sorted pairs of a group's name and its units."""

    sizes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Folding:
    """The axes along which parameters hold factors, and the sums whose factor they hold."""

    axes: frozenset[TensorAxis]
    sums: frozenset[Contraction]
    left: tuple[fx.Node, ...]
    """The operators whose factor no parameter holds."""


def folding(analysis: Analysis) -> Folding:
    """Where the factors of a model's sums can be held. Worked out once for each analysis."""
    if analysis.folding is None:
        analysis.folding = _folding(analysis)
    return analysis.folding


def _folding(analysis: Analysis) -> Folding:
    """Both graphs must agree: a parameter holds the same factor in training and in evaluation."""
    graphs = {node: mode for mode, graph in analysis.program.graphs.items() for node in graph.graph.nodes}
    sums = [(node, each) for node, found in analysis.contractions.items() for each in found]
    narrowed = [(node, each) for node, each in sums if each.power != 0 and _narrowed(analysis, each.axis)]
    held = {each: _held(analysis, node, each) for node, each in narrowed}
    modes: dict[tuple[TensorAxis, ...], set[bool]] = {}
    for node, each in narrowed:
        modes.setdefault(held[each], set()).add(graphs[node])
    agreed = {pairs for pairs, seen in modes.items() if pairs and len(seen) == len(analysis.program.graphs)}
    return Folding(
        axes=frozenset(pair for pairs in agreed for pair in pairs),
        sums=frozenset(each for _, each in narrowed if held[each] in agreed),
        left=tuple(node for node, each in narrowed if held[each] not in agreed),
    )


def _narrowed(analysis: Analysis, axis: Axis) -> bool:
    return any(find(atom) in analysis.program.groups for product in resolved(axis) for atom in product)


def _held(analysis: Analysis, node: fx.Node, each: Contraction) -> tuple[TensorAxis, ...]:
    """The axes of parameters that hold a sum's factor; none where there are none."""
    if each.power != 1:
        return ()
    candidates = [
        pair
        for factor, dimension in each.factors
        for pair in sorted(analysis.axes(factor)[dimension].origin)
        if _is_parameter(analysis, pair[0]) and _only_summed(analysis, pair)
    ]
    if candidates:
        return tuple(candidates) if len(candidates) == 1 else ()
    for factor, dimension in each.factors:
        if factor in analysis.dependent:
            pairs = _fed(analysis, node, factor, analysis.axes(factor)[dimension])
            if pairs:
                return pairs
    return ()


def _is_parameter(analysis: Analysis, name: str) -> bool:
    tensor = dict(analysis.program.model.named_parameters(remove_duplicate=False)).get(name)
    return tensor is not None


def _only_summed(analysis: Analysis, pair: TensorAxis) -> bool:
    """Whether every use of a tensor is a sum over this axis, in which it stands once."""
    uses = list(_uses(analysis, pair[0]))
    return bool(uses) and all(
        sum(
            source is factor and pair in analysis.axes(factor)[dimension].origin
            for each in analysis.contractions.get(user, ())
            for factor, dimension in each.factors
        )
        == 1
        and all(each.power == 1 for each in analysis.contractions[user])
        for user, source in uses
    )


def _uses(analysis: Analysis, name: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operators that use a tensor, under any of its names, each with what it takes for it."""
    for graph in analysis.program.graphs.values():
        for node in graph.graph.nodes:
            if node.op == "get_attr" and _first_name(analysis, str(node.target)) == name:
                yield from _used(node)


def _used(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    for user in node.users:
        if user.op == "output":
            yield user, node
        elif not has_tensor(user.meta.get("val")):
            continue  # asks for a size
        elif _passes(user) or _is_piece(user):
            yield from _used(user)
        else:
            yield user, node


def _passes(node: fx.Node) -> bool:
    """Whether a factor of its only tensor is one of its result."""
    if not isinstance(node.target, OpOverload) or len(_tensors(node)) != 1:
        return False
    return operator_name(node) in _IN_PASSING or operator_name(node) in {"mul", "div"}


def _is_piece(node: fx.Node) -> bool:
    """Whether a node cuts a tensor in pieces (the projections of an attention), or is one of them."""
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, OpOverload) and operator_name(node) in {
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
    }


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]


def _first_name(analysis: Analysis, name: str) -> str:
    """The first name of a tied tensor (axes know it; a scalar has none, and no axis to narrow)."""
    for axis in analysis.state.get(name, ()):
        for first, _ in axis.origin:
            return first
    return name


def _fed(analysis: Analysis, consumer: fx.Node, factor: fx.Node, axis: Axis) -> tuple[TensorAxis, ...]:
    """The parameters of what stands before a sum and feeds it alone; none where nothing such does."""
    node = factor
    while True:
        readers = [user for user in node.users if user.op == "output" or has_tensor(user.meta.get("val"))]
        if readers != [consumer]:
            return ()
        if not _passes(node):
            break
        consumer, (node,) = node, _tensors(node)
    if not isinstance(node.target, OpOverload):
        return ()
    given = arguments(node)
    names = _FEEDERS.get(operator_name(node).removesuffix("_"), ())
    own = [
        given[name] for name in names if isinstance(given.get(name), fx.Node) and given[name].op == "get_attr"
    ]
    if not own or len(_tensors(node)) - len(own) not in (1, 3):  # batch_norm has two buffers beside its input
        return ()
    pairs = []
    for source in own:
        name = _first_name(analysis, str(source.target))
        users = {user for user, _ in _uses(analysis, name)}
        dimension = 0 if operator_name(node) == "linear" else len(analysis.state[name]) - 1
        alike = _terms(analysis.state[name][dimension]) == _terms(axis)
        if not alike or not _is_parameter(analysis, name) or not _same_place(users, node):
            return ()
        pairs.append((name, dimension))
    return tuple(pairs)


def _same_place(users: set[fx.Node], node: fx.Node) -> bool:
    """Whether a parameter is used by this operator alone, or by its twin in the graph of the other mode."""
    return all(user is node or user.name == node.name for user in users)


def _terms(axis: Axis) -> list[tuple[int, ...]]:
    def known(product: Product) -> tuple[int, ...]:
        return tuple(id(find(atom)) for atom in product)

    return [known(product) for product in resolved(axis)]
