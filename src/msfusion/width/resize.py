"""Re-specialising a traced graph to other widths: the integers that depend on a narrowed axis are rewritten.

Export bakes sizes into the graph (`view(x, [s0, 768])`, `group_norm(x, 32)`, `split(x, 768)`). The analysis knows the
axes behind each of them, so each can be computed for any window. Sums over a narrowed axis are scaled, see
`docs/width-scaling.md`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from msfusion.width.analysis import Analysis, Contraction, arguments, operator_name
from msfusion.width.axes import Atom, Axes, Axis, Product, find, resolved
from msfusion.width.own_scale import folding

aten = torch.ops.aten


@dataclass(frozen=True)
class Widths:
    """How wide each axis is in a sub-model whose groups have the given sizes."""

    groups: Mapping[Atom, str]
    sizes: Mapping[str, int]

    def product(self, product: Product) -> int:
        """The width of a product."""
        width = 1
        for raw in product:
            atom = find(raw)
            if atom.terms is not None:
                width *= sum(self.product(term) for term in atom.terms)
            else:
                name = self.groups.get(atom)
                width *= atom.size if name is None else self.sizes.get(name, atom.size)
        return width

    def __call__(self, axis: Axis) -> int:
        """The width of an axis."""
        return sum(self.product(term) for term in axis.terms)


@dataclass
class Resizer:
    """Makes the graph of a sub-model; `scales` are the factors it reads where they differ along an axis.

    `own` are the widths of the model in whose scale the parameters are, where some of them hold the factors
    (`msfusion.width.own_scale`).
    """

    analysis: Analysis
    widths: Widths
    scaling: bool
    own: Widths | None = None
    graph: fx.Graph = field(default_factory=fx.Graph)
    copies: dict[fx.Node, Any] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    scaled: dict[tuple[fx.Node, Any], fx.Node] = field(default_factory=dict)

    def run(self, source: fx.Graph) -> fx.Graph:
        """Copy the graph and rewrite what depends on a width."""
        output = self.graph.graph_copy(source, self.copies)
        self.graph.output(output)
        self._free_devices()
        for node in source.nodes:
            if node.op != "call_function" or not isinstance(node.target, OpOverload):
                continue
            rewrite = _REWRITES.get(operator_name(node).removesuffix("_"))
            if rewrite is not None:
                with self.graph.inserting_before(self.copies[node]):
                    rewrite(self, node, self.copies[node])
            if self.scaling:
                for contraction in self.analysis.contractions.get(node, ()):
                    self._scale(node, contraction)
        return self.graph

    def changed(self, axes: Sequence[Axis]) -> bool:
        """Whether any of these axes is narrower than in the model."""
        return any(self.widths(axis) != axis.size for axis in axes)

    def axes(self, node: Any) -> Axes:
        """The axes of a node's tensor."""
        return self.analysis.axes(node)

    def _free_devices(self) -> None:
        """Tensors are made on the device where the sub-model is, not where the model was traced."""
        anchor = next(
            (n for n in self.graph.nodes if n.op == "get_attr" and n.target in self.analysis.state), None
        )
        makers = [n for n in self.graph.nodes if n.op == "call_function" and _devices(n)]
        if anchor is None or not makers:
            return
        with self.graph.inserting_after(anchor):
            device = self.graph.call_function(device_of, (anchor,))
        anchor_first = next(iter(self.graph.nodes))
        anchor_first.prepend(anchor)
        anchor.append(device)
        for node in makers:
            node.args = _replace_devices(node.args, device)
            node.kwargs = _replace_devices(dict(node.kwargs), device)

    def _scale(self, node: fx.Node, contraction: Contraction) -> None:
        """Multiply what is summed by K/w, part by part of the axis; leave out what a norm undoes."""
        axis, dimension, full = contraction.axis, contraction.dimension, Widths({}, {})
        if self.own is not None and contraction in folding(self.analysis).sums:
            full = self.own  # a parameter holds the rest of the factor
        parts = [(self.widths.product(term), full.product(term)) for term in resolved(axis)]
        if self.axes(contraction.operand)[dimension].size != axis.size:  # one factor for the whole axis
            parts = [(self.widths(axis), full(axis))]
        factors = [(whole / width) ** contraction.power for width, whole in parts]
        if all(factor == 1 for factor in factors):
            return
        uniform = len(set(factors)) == 1
        if uniform and self.own is None and _normalised_after(node):
            return
        consumer, operand = self.copies[node], self.copies[contraction.operand]
        operand = self.scaled.get((consumer, operand), operand)  # one operand may be summed over several axes
        with self.graph.inserting_before(consumer):
            factor: Any = factors[0]
            if not uniform:
                rank = len(self.axes(contraction.operand))
                vector = torch.cat(
                    [torch.full((width,), f) for (width, _), f in zip(parts, factors, strict=True)]
                )
                name = f"_width_scale_{len(self.scales)}"
                shape = [-1 if d == dimension else 1 for d in range(rank)]
                self.scales[name] = vector.reshape(shape)
                factor = self.graph.get_attr(name)
            scaled = self.graph.call_function(operator.mul, (operand, factor))
        consumer.replace_input_with(operand, scaled)
        self.scaled[consumer, self.copies[contraction.operand]] = scaled


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor is (called in the graphs of sub-models)."""
    return tensor.device


def _devices(node: fx.Node) -> bool:
    return any(isinstance(a, torch.device) for a in (*node.args, *node.kwargs.values()))


def _replace_devices(container: Any, device: fx.Node) -> Any:
    if isinstance(container, dict):
        return {k: device if isinstance(v, torch.device) else v for k, v in container.items()}
    return tuple(device if isinstance(v, torch.device) else v for v in container)


def _normalised_after(node: fx.Node) -> bool:
    """Whether the only reader is a norm without memory, which gives the same at any scale (and there is no bias)."""
    if (
        len(node.users) != 1
        or (len(node.args) > 2 and isinstance(node.args[2], fx.Node))
        or "bias" in node.kwargs
    ):
        return False
    (user,) = node.users
    return isinstance(user.target, OpOverload) and operator_name(user) in {
        "group_norm",
        "layer_norm",
        "rms_norm",
    }


Rewrite = Callable[[Resizer, fx.Node, fx.Node], None]
_REWRITES: dict[str, Rewrite] = {}


def _rewrites(*names: str) -> Callable[[Rewrite], Rewrite]:
    def register(function: Rewrite) -> Rewrite:
        _REWRITES.update(dict.fromkeys(names, function))
        return function

    return register


def _set(node: fx.Node, name: str, value: Any) -> None:
    """Change an argument by its name in the operator's schema."""
    assert isinstance(node.target, OpOverload)
    position = next(i for i, a in enumerate(node.target._schema.arguments) if a.name == name)
    if name in node.kwargs or position >= len(node.args):
        node.kwargs = {**node.kwargs, name: value}
    else:
        node.args = (*node.args[:position], value, *node.args[position + 1 :])


@_rewrites("view", "reshape", "_unsafe_view", "expand", "zeros", "ones", "full", "empty", "new_zeros", "new_ones",
           "new_full", "new_empty", "rand", "randn", "randint", "normal", "unflatten", "broadcast_to")  # fmt: skip
def _sizes(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    """A list of sizes, one for each axis of the output (of the unflattened axis)."""
    axes = resizer.axes(node)
    if not resizer.changed(axes):
        return
    name = next((name for name in ("size", "shape", "sizes") if name in arguments(node)), None)
    if name is None:  # torch.normal with tensors
        return
    given: Any = resizer.analysis.argument(copy, name)
    if operator_name(node) == "unflatten":
        first = resizer.analysis.argument(node, "dim") % len(resizer.axes(node.args[0]))
        axes = axes[first : first + len(given)]
    sizes = []
    for size, axis in zip(given, axes, strict=True):
        width = resizer.widths(axis)
        if size == -1 or width == axis.size:
            sizes.append(size)
        elif isinstance(size, int):
            sizes.append(width)
        else:  # a symbolic size that contains the width as a factor
            whole = resizer.graph.call_function(operator.mul, (size, width))
            sizes.append(resizer.graph.call_function(operator.floordiv, (whole, axis.size)))
    _set(copy, name, sizes)


@_rewrites("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _normalized_shape(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    shape: Any = resizer.analysis.argument(node, "normalized_shape")
    axes = resizer.axes(node.args[0])[-len(shape) :]
    if resizer.changed(axes):
        _set(copy, "normalized_shape", [resizer.widths(axis) for axis in axes])


@_rewrites(
    "group_norm",
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
def _groups(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    axis = resizer.analysis.counted.get(node)
    if axis is not None:
        _set(copy, "num_groups" if operator_name(node) == "group_norm" else "groups", resizer.widths(axis))


@_rewrites("slice", "narrow")
def _slice(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    pieces = resizer.analysis.pieces.get(node)
    if pieces is None or not resizer.changed(pieces):
        return
    start = resizer.widths(pieces[0])
    _set(copy, "start", start)
    if operator_name(node) == "narrow":
        _set(copy, "length", resizer.widths(pieces[1]))
    else:
        _set(copy, "end", start + resizer.widths(pieces[1]))


@_rewrites("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    pieces = resizer.analysis.pieces[node]
    if resizer.changed(pieces):
        dimension = resizer.analysis.argument(node, "dim", 0)
        copy.target = aten.split_with_sizes.default
        copy.args, copy.kwargs = (copy.args[0], [resizer.widths(piece) for piece in pieces], dimension), {}


@_rewrites("view_as_complex")
def _complex(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    """Its strides must be even, which those of a piece of a narrower tensor need not be."""
    if any(
        resizer.widths.sizes.get(name, atom.size) != atom.size for atom, name in resizer.widths.groups.items()
    ):
        copy.args = (resizer.graph.call_function(aten.contiguous.default, (copy.args[0],)),)


@_rewrites("eye")
def _identity(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    """As many rows, and columns, as its axes have."""
    for name, axis in zip(("n", "m"), resizer.axes(node), strict=True):
        if name in arguments(node) and resizer.changed([axis]):
            _set(copy, name, resizer.widths(axis))


@_rewrites("repeat", "tile")
def _repeats(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    """One value is repeated as often as the axis is wide; anything else as often as in the model."""
    axes, source = resizer.axes(node), resizer.axes(node.args[0])
    name = next(name for name in ("repeats", "dims") if name in arguments(node))
    times: list[Any] = list(resizer.analysis.argument(copy, name))
    for position in range(1, len(times) + 1):
        one = position > len(source) or source[-position].size == 1
        if one and resizer.changed([axes[-position]]):
            times[-position] = resizer.widths(axes[-position])
    if times != list(resizer.analysis.argument(copy, name)):
        _set(copy, name, times)


@_rewrites("repeat_interleave")
def _repeated(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    """The size of the output along the axis repeated, where it was told; and how often one value is repeated."""
    axes, dim = resizer.axes(node), resizer.analysis.argument(node, "dim")
    if dim is None or not resizer.changed([axes[dim]]):
        return
    if resizer.analysis.argument(node, "output_size") is not None:
        _set(copy, "output_size", resizer.widths(axes[dim]))
    if resizer.axes(node.args[0])[dim].size == 1:
        _set(copy, "repeats", resizer.widths(axes[dim]))


@_rewrites("renorm", "embedding_renorm")
def _bound(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    """The bound of a p-norm over a narrowed axis: w of K equal units have (w/K)**(1/p) of the whole's."""
    if not resizer.scaling:
        return
    factor = 1.0
    for contraction in resizer.analysis.bounded.get(node, ()):
        factor *= (resizer.widths(contraction.axis) / contraction.axis.size) ** contraction.power
    if factor != 1:
        name = next(name for name in ("maxnorm", "max_norm") if name in arguments(node))
        _set(copy, name, resizer.analysis.argument(node, name) * factor)


@_rewrites("squeeze")
def _squeeze(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    """Only the axes that had size 1 in the model vanish, not those narrowed to 1."""
    axes = resizer.axes(node.args[0])
    if node.target is aten.squeeze.default and resizer.changed(axes):
        copy.target = aten.squeeze.dims
        copy.args = (copy.args[0], [d for d, axis in enumerate(axes) if axis.size == 1])


@_rewrites("pad", "constant_pad_nd")
def _pad(resizer: Resizer, node: fx.Node, copy: fx.Node) -> None:
    pieces = resizer.analysis.pieces.get(node)
    if pieces is not None and resizer.changed(pieces):
        amounts: Any = resizer.analysis.argument(node, "pad")
        _set(copy, "pad", [resizer.widths(p) if p.terms else a for a, p in zip(amounts, pieces, strict=True)])
