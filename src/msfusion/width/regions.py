"""An exported graph in our form: regions (`no_grad`, `autocast`) are inlined, run-time assertions dropped, and
parameters and buffers read from the module by their own names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from msfusion.width.graph import Graph, Program
from msfusion.width.outputs import keep_outputs
from msfusion.width.strides import free_of_strides

aten = torch.ops.aten

_ASSERTIONS = {
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
}


def clean(program: Program, exported: Any) -> Graph:
    """Our form of an exported graph. Tensors outside the state dict are noted as the program's constants."""
    graph: fx.Graph = exported.graph
    _inline_regions(exported.graph_module, graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and _schema_name(node.target) in _ASSERTIONS:
            graph.erase_node(node)
    spec = keep_outputs(graph, exported.call_spec.out_spec, program.outputs, program.model)
    graph.eliminate_dead_code()
    states = program.model.state_dict(keep_vars=True)
    owners = {id(tensor): name for name, tensor in reversed(list(states.items()))}
    targets = {
        spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target is not None
    }
    inputs: list[fx.Node] = []
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        target = targets.get(node.name)
        if target is None:
            inputs.append(node)
            continue
        if node.users:
            if target not in states:
                program.constants[target] = _constant(exported, program.model, target)
            with graph.inserting_before(node):
                attribute = graph.create_node("get_attr", owners.get(id(states.get(target)), target))
            attribute.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    free_of_strides(graph)
    return Graph(graph, inputs, spec)


def _constant(exported: Any, model: nn.Module, target: str) -> Tensor:
    """A tensor that the graph reads but the state dict does not have: a non-persistent buffer or a constant."""
    value: Tensor | None = exported.constants.get(target)
    if value is None:
        value = dict(model.named_buffers())[target]
    return value.detach()


def _schema_name(target: Any) -> str:
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _inline_regions(owner: nn.Module, graph: fx.Graph) -> None:
    """Write the bodies of `no_grad` and `autocast` regions into the graph itself."""
    regions: dict[Any, Callable[[fx.Graph, fx.Node, nn.Module], None]] = {
        torch.ops.higher_order.wrap_with_set_grad_enabled: _inline_grad_mode,
        torch.ops.higher_order.wrap_with_autocast: _inline_autocast,
    }
    while region := next((n for n in graph.nodes if n.op == "call_function" and n.target in regions), None):
        regions[region.target](graph, region, owner)


def _inline_grad_mode(graph: fx.Graph, region: fx.Node, owner: nn.Module) -> None:
    """Without gradients: the outputs are detached, which is the same to whatever reads them."""
    enabled, body, *args = region.args
    outputs = _paste(graph, region, _body(owner, body), args)
    with graph.inserting_before(region):
        for index, output in enumerate(outputs):
            if not enabled and isinstance(output, fx.Node) and isinstance(output.meta.get("val"), Tensor):
                outputs[index] = graph.call_function(aten.detach.default, (output,))
                outputs[index].meta.update(output.meta)
    _replace_region(graph, region, outputs)


def _inline_autocast(graph: fx.Graph, region: fx.Node, owner: nn.Module) -> None:
    """The region's autocast setting is entered and left in the graph."""
    device, dtype, enabled, cache, body, *args = region.args
    with graph.inserting_before(region):
        token = graph.call_function(torch.amp.autocast_mode._enter_autocast, (device, dtype, enabled, cache))
    outputs = _paste(graph, region, _body(owner, body), args)
    with graph.inserting_before(region):
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (token,))
    _replace_region(graph, region, outputs)


def _body(owner: nn.Module, node: Any) -> fx.GraphModule:
    body = owner.get_submodule(node.target)
    assert isinstance(body, fx.GraphModule)
    _inline_regions(body, body.graph)
    return body


def _paste(graph: fx.Graph, region: fx.Node, body: fx.GraphModule, args: list[Any]) -> list[Any]:
    """Copy a region's nodes in front of it; returns its flat outputs."""
    arguments = iter(args)
    copies: dict[fx.Node, Any] = {}
    outputs: list[Any] = []
    with graph.inserting_before(region):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(arguments)
            elif node.op == "output":
                outputs = list(fx.map_arg(node.args[0], lambda n: copies[n]))
            else:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
    return outputs


def _replace_region(graph: fx.Graph, region: fx.Node, outputs: list[Any]) -> None:
    for user in list(region.users):
        assert user.target is operator.getitem
        index: Any = user.args[1]
        user.replace_all_uses_with(outputs[index])
        graph.erase_node(user)
    graph.erase_node(region)
