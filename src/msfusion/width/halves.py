"""A traced graph divided at a module: who computes which operator, and the two graphs that result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, fx

from msfusion.errors import CutError
from msfusion.width.analysis import module_of, modules_of
from msfusion.width.graph import Graph, Program
from msfusion.width.tensors import state_tensors


@dataclass(frozen=True)
class Crossing:
    """A tensor that the client part hands to the server part in every call.

    `shape` has the sizes of its axes as traced, None where one varies (the examples, or time). A `size` is a
    number that was traced rather than a tensor, and crosses as one without axes.
    """

    name: str  # the operation that made it
    module: str
    dtype: torch.dtype
    gradient: bool  # whether a gradient comes back
    shape: tuple[int | None, ...] = ()
    size: bool = False


def check_crossing(given: Sequence[Tensor], crossing: Sequence[Crossing]) -> None:
    """TypeError where tensors do not fit what crosses: their number, their types, and the sizes that are fixed."""
    if len(given) != len(crossing):
        raise TypeError(f"the server part is called with {len(given)} tensors, but {len(crossing)} cross")
    for number, (tensor, known) in enumerate(zip(given, crossing, strict=True)):
        alike = tensor.dtype == known.dtype or (
            tensor.is_floating_point() and known.dtype.is_floating_point
        )  # a part may have been converted to another precision
        fits = tensor.dim() == len(known.shape) and all(
            wanted in (None, size) for size, wanted in zip(tensor.shape, known.shape, strict=True)
        )
        if not (alike and fits):
            wanted = ["any" if size is None else size for size in known.shape]
            raise TypeError(
                f"tensor {number} of those that cross, from module {known.module!r}, has type {tensor.dtype} and sizes "
                f"{list(tensor.shape)}, but must have {known.dtype} and {wanted}"
            )


class Halves:
    """A graph divided at a module: who computes which node, and the two graphs that result."""

    def __init__(self, graph: Graph, at: str, program: Program) -> None:
        self.graph, self.at, self.program = graph, at, program
        states = state_tensors(program.model)
        self.trainable = {name for name, tensor in states.items() if tensor.requires_grad}
        self.on_server, self.on_client = self._divide()
        self.crossing_nodes = self._find_crossing()
        self.client, self.server = self._client_graph(), self._server_graph()

    @property
    def crossing(self) -> tuple[Crossing, ...]:
        """What crosses, in order."""
        return tuple(self._described(node) for node in self.crossing_nodes)

    def _divide(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes of the server and those of the client; what depends on no input may be on both sides."""
        nodes = [node for node in self.graph.graph.nodes if node.op == "call_function"]
        inside = {node for node in nodes if self.at in modules_of(node)}
        if not inside:
            raise CutError(_no_such_module(self.at, nodes))
        boundary = {node for node in inside if any(user not in inside for user in node.users)}
        reading: set[fx.Node] = set(self.graph.inputs)
        server: set[fx.Node] = set()
        for node in nodes:
            sources = set(node.all_input_nodes)
            if sources & reading:
                reading.add(node)
            if sources & (server | boundary) and node not in inside:
                server.add(node)
        client = {node for node in nodes if node in reading and node not in server}
        if any(set(node.all_input_nodes) & server for node in client):
            raise CutError(f"the model cannot be cut at '{self.at}': it runs this module more than once")
        self._place_free([node for node in nodes if node not in reading], client, server)
        return server, client

    def _place_free(self, free: list[fx.Node], client: set[fx.Node], server: set[fx.Node]) -> None:
        """Put the nodes that depend on no input where they are needed.

        What both sides need is computed on both, unless a parameter is behind it: then on the client, and it
        crosses. What nobody needs (a counter of steps) stays with its module.
        """
        for_client, for_server = _needed(client, free), _needed(server, free)
        client_modules = {name for node in client for name in modules_of(node)[-1:]}
        for node in free:
            if node in for_client:
                client.add(node)
            if node in for_server and not (node in for_client and self._trains(node)):
                server.add(node)
            if node not in for_client and node not in for_server:
                (client if client_modules.intersection(modules_of(node)[-1:]) else server).add(node)

    def _trains(self, node: fx.Node) -> bool:
        """Whether a parameter that trains is behind a node."""
        behind = [node]
        while behind:
            source = behind.pop()
            if source.op == "get_attr" and str(source.target) in self.trainable:
                return True
            behind.extend(source.all_input_nodes)
        return False

    def _find_crossing(self) -> list[fx.Node]:
        """What the server, or the output, needs of the client, in the graph's order."""
        wanted = {value for value in self.graph.outputs if isinstance(value, fx.Node)}
        for node in self.on_server:
            wanted.update(node.all_input_nodes)
        crossing = [
            node
            for node in self.graph.graph.nodes
            if node in wanted and node not in self.on_server and node.op not in ("get_attr", "output")
        ]
        for node in crossing:
            value = node.meta.get("val")
            if node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point():
                name = self.program.call.name_of(self.graph.inputs.index(node))
                raise CutError(
                    f"the model cannot be cut at '{self.at}': what follows needs the input '{name}' itself, "
                    "which must not leave a participant; cut further back"
                )
        if not self.on_server:
            raise CutError(f"nothing is left for the server after '{self.at}': cut earlier")
        return crossing

    def _client_graph(self) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.graph.nodes:
            read = node.op == "get_attr" and any(user in self.on_client for user in node.users)
            if node.op == "placeholder" or read or node in self.on_client:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(
            [
                copies[node] if _is_tensor(node) else graph.call_function(torch.tensor, (copies[node],))
                for node in self.crossing_nodes
            ]
        )
        return graph

    def _server_graph(self) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        given = [graph.placeholder(f"crossing_{index}") for index in range(len(self.crossing_nodes))]
        for node, placeholder in zip(self.crossing_nodes, given, strict=True):
            if not _is_tensor(node):
                copies[node] = graph.call_function(int, (placeholder,))
            elif any(_changes(user, node) for user in node.users if user in self.on_server):
                copies[node] = graph.call_method(
                    "clone", (placeholder,)
                )  # what was received is not overwritten
            else:
                copies[node] = placeholder
        for node in self.graph.graph.nodes:
            read = node.op == "get_attr" and any(user in self.on_server for user in node.users)
            if read or node in self.on_server:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[value] if isinstance(value, fx.Node) else value for value in self.graph.outputs])
        return graph

    def _described(self, node: fx.Node) -> Crossing:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return Crossing(node.name, module_of(node), torch.int64, False, size=True)
        shape = tuple(length if isinstance(length, int) else None for length in value.shape)
        gradient = value.dtype.is_floating_point and self._trains(node)
        return Crossing(node.name, module_of(node), value.dtype, gradient, shape)


def _needed(side: set[fx.Node], free: Iterable[fx.Node]) -> set[fx.Node]:
    """Which of the nodes that depend on no input a side needs, directly or for others of them."""
    found: set[fx.Node] = set()
    for node in reversed(list(free)):
        if any(user in side or user in found for user in node.users):
            found.add(node)
    return found


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _changes(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operator writes into a value."""
    schema = getattr(user.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    written = [
        position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return any(position < len(user.args) and user.args[position] is node for position in written)


def _no_such_module(at: str, nodes: Iterable[fx.Node]) -> str:
    known = list(dict.fromkeys(name for node in nodes for name in modules_of(node)))
    near = get_close_matches(at, known, 3, 0.5) or known[:8]
    return f"the model has no module '{at}' that computes something: cut at one such as {', '.join(near)}"
