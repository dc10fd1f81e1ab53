"""Running a traced graph one operator after the other, with each value dropped as soon as nothing needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    return execute_together(graph, [inputs], read, call)[0]


def execute_together(
    graph: fx.Graph, inputs: Sequence[Iterable[Any]], read: Callable[[str], Any], call: Call = call_operator
) -> list[list[Any]]:
    """The flat outputs for several calls, whose operators take turns: what one reads is there for all calls.

    Without a call everything is read all the same, in the same order.
    """
    calls = [_Values(iter(given)) for given in inputs]
    waiting = Counter({node: len(node.users) for node in graph.nodes})
    for node in graph.nodes:
        state = {
            source: read(str(source.target)) for source in node.all_input_nodes if source.op == "get_attr"
        }
        if node.op == "output":
            return [values.of(node.args[0], state) for values in calls]
        for values in calls:
            values.run(node, state, call)
        for source in node.all_input_nodes:
            waiting[source] -= 1
            if not waiting[source]:
                for values in calls:
                    values.drop(source)
    raise AssertionError("a graph ends with its outputs")


class _Values:
    """What the operators of one call have given that is still needed."""

    def __init__(self, inputs: Iterator[Any]) -> None:
        self._inputs, self._values = inputs, dict[fx.Node, Any]()

    def run(self, node: fx.Node, state: Mapping[fx.Node, Any], call: Call) -> None:
        if node.op == "placeholder":
            self._values[node] = next(self._inputs)
        elif node.op != "get_attr":  # state is read when an operator needs it, and dropped after
            args, kwargs = self.of((node.args, node.kwargs), state)
            self._values[node] = call(node, tuple(args), dict(kwargs))

    def of(self, arguments: Any, state: Mapping[fx.Node, Any]) -> Any:
        """Arguments with values in place of nodes."""
        made = fx.map_arg(arguments, lambda node: state[node] if node in state else self._values[node])
        return list(made) if isinstance(made, list | tuple) else made

    def drop(self, node: fx.Node) -> None:
        self._values.pop(node, None)
