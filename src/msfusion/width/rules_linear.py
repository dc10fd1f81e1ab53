"""Rules for operators that sum over an axis: linear maps, convolutions, attention, recurrent layers; and norms."""

from __future__ import annotations

from string import ascii_letters

from torch import fx

from msfusion.width.analysis import Analysis, Outcome, operator_name, overload, rule
from msfusion.width.axes import Axes, Axis, freeze, fresh, unify
from msfusion.width.rules_elementwise import tensors_of
from msfusion.width.views import merge, split


@rule("linear")
def linear(analysis: Analysis, node: fx.Node) -> Outcome:
    """Input [..., i] and weight [o, i] give [..., o]."""
    source, weight = analysis.argument(node, "input"), analysis.argument(node, "weight")
    x, w = analysis.axes(source), analysis.axes(weight)
    unify(x[-1], w[-1])
    analysis.contract(node, weight, -1, (source, -1))
    return _plus_bias(analysis, node, [*x[:-1], *(Axis(a.terms) for a in w[:-1])], "bias")


def _plus_bias(analysis: Analysis, node: fx.Node, axes: Axes, name: str, dimension: int = -1) -> Axes:
    """A bias is added along one axis of the result."""
    bias = analysis.argument(node, name)
    if bias is not None:
        unify(axes[dimension], analysis.axes(bias)[0])
    return axes


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")
def matmul(analysis: Analysis, node: fx.Node) -> Outcome:
    """[..., m, k] times [..., k, n], with broadcast batches; vectors lose their axis."""
    return _product(analysis, node, *node.args[:2])  # type: ignore[arg-type]


def _product(analysis: Analysis, node: fx.Node, first: fx.Node, second: fx.Node) -> Axes:
    x, y = analysis.axes(first), analysis.axes(second)
    row = -2 if len(y) > 1 else -1
    unify(x[-1], y[row])
    analysis.contract(node, second, row, (first, -1))
    batch = analysis.broadcast([x[:-2], y[:-2]])
    return [Axis(a.terms) for a in (*batch, *x[:-1][-1:], *(y[-1:] if len(y) > 1 else []))]


@rule("addmm", "addbmm", "baddbmm", "addmv")
def addmm(analysis: Analysis, node: fx.Node) -> Outcome:
    """A product of matrices plus something that broadcasts."""
    if operator_name(node).startswith("addbmm"):
        return None
    product = _product(analysis, node, *node.args[1:3])  # type: ignore[arg-type]
    return analysis.broadcast([product, analysis.axes(analysis.argument(node, "self"))])


@rule("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
def grouped_mm(analysis: Analysis, node: fx.Node) -> Outcome:
    """Rows [n, k], sorted by expert, times the stacked experts' matrices [experts, k, m] give [n, m]."""
    source, weight, *_ = tensors_of(node)
    x, w = analysis.axes(source), analysis.axes(weight)
    if len(w) != 3 or len(x) not in (2, 3):
        return None
    freeze(w[0], "experts that are chosen by number")
    if len(x) == 3:
        unify(x[0], w[0])
    unify(x[-1], w[1])
    analysis.contract(node, weight, 1, (source, -1))
    product = [*x[:-1], Axis(w[2].terms)]
    bias = analysis.argument(node, "bias")
    return analysis.broadcast([product, analysis.axes(bias)]) if bias is not None else product


@rule("einsum")
def einsum(analysis: Analysis, node: fx.Node) -> Outcome:
    """Each letter is one axis; letters that the result lacks are summed over."""
    equation = str(node.args[0]).replace(" ", "")
    operands = [analysis.axes(n) for n in analysis.argument(node, "tensors")]
    equation = _without_dots(equation, [len(axes) for axes in operands])
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    axes: dict[str, Axis] = {}
    for letters, operand in zip(terms, operands, strict=True):
        for letter, axis in zip(letters, operand, strict=True):
            known = axes.get(letter)
            if known is None or known.size == 1:
                axes[letter] = axis
            elif axis.size != 1:
                unify(known, axis)
    for letter in axes.keys() - set(right):
        _contract_letter(analysis, node, terms, letter)
    return [Axis(axes[letter].terms) for letter in right]


def _without_dots(equation: str, ranks: list[int]) -> str:
    """The equation with letters for the axes that an ellipsis stands for, counted from the last."""
    if "..." not in equation:
        return equation
    left, arrow, right = equation.partition("->")
    free = [letter for letter in ascii_letters if letter not in equation]
    terms, most = left.split(","), 0
    for number, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        if "..." in term:
            dots = rank - len(term.replace("...", ""))
            most = max(most, dots)
            terms[number] = term.replace("...", "".join(reversed(free[:dots])))
    shared = "".join(reversed(free[:most]))
    if not arrow:
        letters = left.replace(".", "").replace(",", "")
        right = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return f"{','.join(terms)}->{right.replace('...', shared)}"


def _contract_letter(analysis: Analysis, node: fx.Node, terms: list[str], letter: str) -> None:
    """Note the sum over one letter; the last operand that has it is scaled."""
    operands = analysis.argument(node, "tensors")
    factors = [(operands[i], letters.index(letter)) for i, letters in enumerate(terms) if letter in letters]
    *others, (operand, dimension) = factors
    analysis.contract(node, operand, dimension, *others)


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(analysis: Analysis, node: fx.Node) -> Outcome:
    """Input [n, groups * i, ...]; weight [groups * o, i, ...], transposed [groups * i, o, ...]."""
    source, weight = analysis.argument(node, "input"), analysis.argument(node, "weight")
    x, w = analysis.axes(source), analysis.axes(weight)
    name = operator_name(node)
    transposed = "transpose" in name or bool(analysis.argument(node, "transposed", False))
    groups = analysis.argument(node, "groups", 1)
    sizes = analysis.shape(node)
    channel = len(x) - len(w) + 1
    if groups == 1:
        into, out = (0, 1) if transposed else (1, 0)
        unify(x[channel], w[into])
        analysis.contract(node, weight, into, (source, channel))
        channels = Axis(w[out].terms)
    else:
        channels_or_none = _grouped(analysis, node, x[channel], w, groups, transposed)
        if channels_or_none is None:
            return None
        channels = channels_or_none
    space = [fresh(size, "space") for size in sizes[channel + 1 :]]
    for axis in (*x[channel + 1 :], *w[2:]):
        freeze(axis, "space under a convolution")
    return _plus_bias(analysis, node, [*x[:channel], channels, *space], "bias", channel)


def _grouped(
    analysis: Analysis, node: fx.Node, x: Axis, w: Axes, groups: int, transposed: bool
) -> Axis | None:
    """Grouped convolutions are narrowed by whole groups: the channels of a group stay together."""
    inside = split(x.terms, [groups, x.size // groups])
    own = split(w[0].terms, [groups, w[0].size // groups])
    if inside is None or own is None:
        return None
    unify(inside[0], own[0])
    analysis.counted[node] = own[0]
    analysis.touched.append(inside[0])  # a group's outputs read this group's inputs alone
    if transposed:
        unify(inside[1], own[1])
        freeze(own[1], "inside one group of a convolution")
        freeze(w[1], "inside one group of a convolution")
        return Axis(merge([own[0], w[1]]))
    unify(inside[1], w[1])
    freeze(w[1], "inside one group of a convolution")
    return Axis(w[0].terms)


@rule("scaled_dot_product_attention", "_scaled_dot_product_attention_math")
def attention(analysis: Analysis, node: fx.Node) -> Outcome:
    """Query [..., heads, l, d], key [..., kv, s, d], value [..., kv, s, e]: d and e stay, heads are units."""
    q, k, v = (analysis.axes(analysis.argument(node, name)) for name in ("query", "key", "value"))
    for axis in (q[-1], k[-1], v[-1]):
        freeze(axis, "a head dimension")
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    if analysis.argument(node, "enable_gqa", False) and q[-3].size != k[-3].size:
        shared = split(q[-3].terms, [k[-3].size, q[-3].size // k[-3].size])
        if shared is None:
            return None
        freeze(shared[1], "the query heads of one key-value head")
        unify(k[-3], v[-3])
        unify(shared[0], k[-3])
    else:
        analysis.broadcast([q[:-2], k[:-2], v[:-2]])
    mask = analysis.argument(node, "attn_mask")
    if mask is not None:
        analysis.broadcast([[*q[:-1], k[-2]], analysis.axes(mask)])
    return [Axis(a.terms) for a in (*q[:-1], v[-1])]


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(analysis: Analysis, node: fx.Node) -> Outcome:
    """All layers and directions share one group of hidden units; the gates are blocks of it."""
    name = operator_name(node)
    if overload(node) != "input":
        return None
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    x = analysis.axes(node.args[0])
    states = analysis.argument(node, "hx") if name == "lstm" else [analysis.argument(node, "hx")]
    weights = analysis.argument(node, "params")
    layers, batch_first = analysis.argument(node, "num_layers"), analysis.argument(node, "batch_first")
    directions = 2 if analysis.argument(node, "bidirectional") else 1
    per_cell = len(weights) // (layers * directions)  # input, state, two biases, projection of the state
    projected = per_cell % 2 == 1
    outputs = analysis.axes(weights[1])[1]  # what a layer gives: its hidden units, or their projection
    hidden = analysis.axes(weights[per_cell - 1])[1] if projected else outputs
    below = x[-1]
    for layer in range(layers):
        for direction in range(directions):
            cell = weights[(layer * directions + direction) * per_cell :][:per_cell]
            _cell(analysis, node, cell[:-1] if projected else cell, gates, below, outputs, hidden)
            if projected:
                _projection(analysis, node, cell[-1], hidden, outputs)
        below = Axis(outputs.terms * directions)
    for state, axis in zip(states, (outputs, hidden), strict=False):  # of an LSTM the second is the cell's
        unify(analysis.axes(state)[-1], axis)
        for leading in analysis.axes(state)[:-2]:
            freeze(leading, "layers and directions")
    examples = [] if len(x) == 2 else [x[0 if batch_first else 1]]
    last = [fresh(layers * directions, "layers and directions"), *examples]
    final = [[*last, Axis(axis.terms)] for axis in (outputs, hidden)]
    return [[*x[:-1], below], *final[: len(states)]]


def _projection(analysis: Analysis, node: fx.Node, weight: fx.Node, hidden: Axis, outputs: Axis) -> None:
    """The hidden units of an LSTM's cell are mapped to fewer before they go on: [outputs, h]."""
    unify(analysis.axes(weight)[0], outputs)
    unify(analysis.axes(weight)[1], hidden)
    analysis.contract(node, weight, 1)


def _cell(
    analysis: Analysis,
    node: fx.Node,
    weights: list[fx.Node],
    gates: int,
    below: Axis,
    state: Axis,
    hidden: Axis,
) -> None:
    """One layer in one direction: w_ih [gates * h, i], w_hh [gates * h, state] and two biases [gates * h]."""
    blocks = Axis(tuple((*fresh(gates, "gates").terms[0], *term) for term in hidden.terms))
    if len(hidden.terms) > 1:
        freeze(hidden, "a recurrent state made of parts")
    unify(analysis.axes(weights[0])[1], below)
    unify(analysis.axes(weights[1])[1], state)
    for weight in weights[:2]:
        analysis.contract(node, weight, 1)
    for weight in weights:
        unify(analysis.axes(weight)[0], blocks)


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def recurrent_cell(analysis: Analysis, node: fx.Node) -> Outcome:
    """One step of one layer: input [n, i], state [n, h] (two of them for an LSTM)."""
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(operator_name(node), 1)
    x, given = analysis.axes(node.args[0]), analysis.argument(node, "hx")
    states = list(given) if isinstance(given, (list, tuple)) else [given]
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    weights = [tensor for name in names if (tensor := analysis.argument(node, name)) is not None]
    hidden = analysis.axes(weights[1])[1]
    _cell(analysis, node, weights, gates, x[-1], hidden, hidden)
    for state in states:
        analysis.broadcast([analysis.axes(state), [*x[:-1], hidden]])
    out = [*x[:-1], Axis(hidden.terms)]
    return [out for _ in states] if len(states) > 1 else out


@rule("bilinear")
def bilinear(analysis: Analysis, node: fx.Node) -> Outcome:
    """input1 [..., i], input2 [..., j] and weight [o, i, j] give [..., o]."""
    first, second, weight = (analysis.argument(node, name) for name in ("input1", "input2", "weight"))
    x, y, w = analysis.axes(first), analysis.axes(second), analysis.axes(weight)
    unify(x[-1], w[1])
    unify(y[-1], w[2])
    analysis.contract(node, weight, 1, (first, -1))
    analysis.contract(node, weight, 2, (second, -1))
    return _plus_bias(analysis, node, [*analysis.broadcast([x[:-1], y[:-1]]), Axis(w[0].terms)], "bias")
