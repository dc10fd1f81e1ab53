"""The evaluation graph, derived from the training graph by switching its flags.

Export takes most of the time of a trace, and the two modes of nearly every model differ only in the flags of dropout,
batch norm, attention and recurrent layers. So one export is enough: the derived graph is checked against the model's
own answer, and only where they differ is the model exported a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from msfusion.width.answers import answer_of_model, copies_of, seeded
from msfusion.width.execute import execute
from msfusion.width.graph import Graph, Program
from msfusion.width.mode import mode

_FLAGS: dict[str, Any] = {"train": False, "training": False, "dropout_p": 0.0}
_FLAGGED = {
    "aten::dropout", "aten::dropout_", "aten::alpha_dropout", "aten::feature_dropout", "aten::feature_alpha_dropout",
    "aten::batch_norm", "aten::scaled_dot_product_attention", "aten::rrelu", "aten::rrelu_",
    "aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu",
}  # fmt: skip


def evaluation_twin(program: Program, training: Graph) -> Graph | None:
    """The training graph with all flags switched off, if it answers exactly as the model in evaluation mode does."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    output = graph.graph_copy(training.graph, copies)
    graph.output(output)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            if node.target._schema.is_mutable and not node.users and _updates_state(node):
                graph.erase_node(node)
            elif node.target._schema.name in _FLAGGED:
                _switch_off(node)
    graph.eliminate_dead_code()
    if any(_draws(node) for node in graph.nodes):
        return None  # random numbers that only training may draw could agree by chance
    twin = Graph(graph, [copies[node] for node in training.inputs], training.out_spec, training.sizes.copy())
    return twin if not program.without_values and _agrees(program, twin) else None


def _updates_state(node: fx.Node) -> bool:
    """Whether a node updates a tensor of the model in place (a counter of steps, a moving average)."""
    target: Any = node.args[0]
    while isinstance(target, fx.Node) and target.op == "call_function" and target.args:
        schema = getattr(target.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            break
        target = target.args[0]
    return isinstance(target, fx.Node) and target.op == "get_attr"


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers, and has no flag by which it has been told not to."""
    return (
        isinstance(node.target, OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
        and node.target._schema.name not in _FLAGGED
    )


def _switch_off(node: fx.Node) -> None:
    args = list(node.args)
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name not in _FLAGS:
            continue
        if position < len(args):
            args[position] = _FLAGS[argument.name]
        elif argument.name in node.kwargs:
            node.kwargs = {**node.kwargs, argument.name: _FLAGS[argument.name]}
    node.args = tuple(args)


def _agrees(program: Program, twin: Graph) -> bool:
    """Whether the graph gives bit for bit what the model gives in evaluation mode, and changes what it changes."""
    with mode(program.model, False), torch.no_grad():
        tensors = copies_of(program)
        expected, changed = answer_of_model(program, tensors), tensors
        tensors = copies_of(program)
        inputs = [value.clone() for value in program.call.example]
        try:
            with seeded(program):
                found = execute(twin.graph, inputs, tensors.get)
        except Exception:  # a flag that may not be switched: the model has to be exported again
            return False
    return (
        len(expected) == len(found)
        and all(map(_same, expected, found))
        and all(_same(changed[name], tensors[name]) for name in tensors)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = a.detach(), b.detach()
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)
