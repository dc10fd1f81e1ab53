"""The evaluation graph, derived from the training graph by switching its flags.

Export takes most of the time of a trace, and the two modes of nearly every model differ only in the flags of dropout,
batch norm, attention and recurrent layers. So one export is enough: the derived graph is checked against the model's
own answer, and only where they differ is the model exported a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from msfusion.errors import UntraceableModelError
from msfusion.width.execute import execute
from msfusion.width.graph import Graph, Program
from msfusion.width.mode import mode
from msfusion.width.outputs import selected

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
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            if node.target._schema.is_mutable and not node.users and _counts_steps(node):
                graph.erase_node(node)
            elif node.target._schema.name in _FLAGGED:
                _switch_off(node)
    twin = Graph(graph, [copies[node] for node in training.inputs], training.out_spec)
    return twin if _agrees(program, twin) else None


def _counts_steps(node: fx.Node) -> bool:
    """Whether a node updates a tensor of the model in place (batch norm's counter of steps)."""
    target = node.args[0]
    return isinstance(target, fx.Node) and target.op == "get_attr"


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
    """Whether the graph gives bit for bit what the model gives in evaluation mode."""
    tensors = program.tensors()
    model: nn.Module = program.model
    state = torch.get_rng_state()
    with torch.no_grad(), mode(model, False):
        inputs = [value.clone() if isinstance(value, Tensor) else value for value in program.call.example]
        expected = _answer(program)
        torch.set_rng_state(state)
        if not all(map(_same, expected, _answer(program))):
            raise UntraceableModelError(
                f"{type(model).__name__} cannot be traced: module 'the model itself' gives another answer when it is "
                "called again in evaluation mode (operation: its forward keeps something between calls)"
            )
        torch.set_rng_state(state)
        try:
            found = execute(twin.graph, inputs, tensors.get)
        except Exception:  # a flag that may not be switched: the model has to be exported again
            found = []
    torch.set_rng_state(state)
    return len(expected) == len(found) and all(map(_same, expected, found))


def _answer(program: Program) -> list[Any]:
    """The model's own flat outputs for the example."""
    return pytree.tree_leaves(
        selected(program.model(*program.args, **program.kwargs), program.outputs, program.model)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)
