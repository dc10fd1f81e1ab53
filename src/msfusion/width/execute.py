"""Running a traced graph one operator after the other, with each value dropped as soon as nothing needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

Call = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]


def call_operator(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the operator of a node gives."""
    target: Any = node.target
    return target(*args, **kwargs)


def execute(
    graph: fx.Graph, inputs: Iterable[Any], read: Callable[[str], Any], call: Call = call_operator
) -> list[Any]:
    """The flat outputs of a graph. `read` gives a tensor of the model by name; `call` applies an operator."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)

    def value(node: fx.Node) -> Any:
        return read(str(node.target)) if node.op == "get_attr" else values[node]

    waiting = Counter({node: len(node.users) for node in graph.nodes})
    for node in graph.nodes:
        if node.op == "output":
            return list(fx.map_arg(node.args[0], value))
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op != "get_attr":  # state is read when an operator needs it, and dropped after
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            values[node] = call(node, tuple(args), dict(kwargs))
        for source in node.all_input_nodes:
            waiting[source] -= 1
            if not waiting[source]:
                values.pop(source, None)
    raise AssertionError("a graph ends with its outputs")
