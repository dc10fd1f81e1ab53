"""A traced graph made free of strides: `view` becomes `reshape`, which runs whatever strides a kernel gives.

`torch.export` drops `.contiguous()` where the example's tensor was contiguous already, and leaves a `view` that holds
for the strides of one kernel on one device. A `reshape` gives the same values everywhere. It is a view where it can
be and a copy where not, which nobody notices unless one side is written in place and the other read afterwards: there
the `view` stays.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx
from torch._ops import OpOverload

aten = torch.ops.aten

_RESHAPES = {aten.view.default: aten.reshape.default, aten.view_as.default: aten.reshape_as.default}


def free_of_strides(graph: fx.Graph) -> None:
    """Replace each `view` of a graph by `reshape`, in place, but for those through which a write is seen."""
    views = [node for node in graph.nodes if node.target in _RESHAPES]
    if not views:
        return
    storage = _Storage(graph)
    for node in views:
        if not storage.seen_through(node):
            node.target = _RESHAPES[node.target]
            node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}


class _Storage:
    """Which values of a graph may share memory, and when it is written."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.aliases: dict[fx.Node, list[fx.Node]] = {}  # a value to those made of it in the same memory
        self.root: dict[fx.Node, fx.Node] = {}
        self.writes: dict[fx.Node, list[tuple[int, fx.Node]]] = {}  # by root: when, and through which value
        self.families: dict[fx.Node, set[fx.Node]] = {}
        for node in graph.nodes:
            source = next(_sources(node), None)
            if source is not None:
                self.aliases.setdefault(source, []).append(node)
            root = self.root[node] = node if source is None else self.root[source]
            self.families.setdefault(root, set()).add(node)
            for written in _written(node):
                self.writes.setdefault(self.root[written], []).append((self.position[node], written))

    def seen_through(self, view: fx.Node) -> bool:
        """Whether a value written on one side of a view is read on its other side later on."""
        root = self.root[view]
        writes = [entry for entry in self.writes.get(root, ()) if entry[0] > self.position[view]]
        if not writes:
            return False
        inside = self._made_of(view)
        outside = self.families[root] - inside
        return any(
            self._read_after(node, when)
            for when, written in writes
            for node in (outside if written in inside else inside)
        )

    def _made_of(self, node: fx.Node) -> set[fx.Node]:
        found, waiting = {node}, [node]
        while waiting:
            new = [alias for alias in self.aliases.get(waiting.pop(), ()) if alias not in found]
            found.update(new)
            waiting += new
        return found

    def _read_after(self, node: fx.Node, when: int) -> bool:
        """Tensors of the model and inputs are read by whoever comes after the graph."""
        return node.op in ("get_attr", "placeholder") or any(
            self.position[user] > when for user in node.users
        )


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The values in whose memory that of a node may stand."""
    if node.target is operator.getitem:
        yield node.args[0]  # type: ignore[misc]
    elif isinstance(node.target, OpOverload) and any(r.alias_info for r in node.target._schema.returns):
        for position, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None:
                value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                if isinstance(value, fx.Node):
                    yield value


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The values that an operator writes into."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            yield from (
                v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node)
            )
