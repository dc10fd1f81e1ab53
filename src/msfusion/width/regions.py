"""An exported graph in our form: regions (`no_grad`, `autocast`) are inlined, run-time assertions dropped, and
parameters and buffers read from the module by their own names. What the export says of sizes is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from msfusion.width.call import Signature, Sizes
from msfusion.width.generate import GRAD_MODE
from msfusion.width.graph import Graph, Program
from msfusion.width.strides import free_of_strides
from msfusion.width.tensors import state_tensors

aten = torch.ops.aten

PREFIX = "model."
"""Where the model stands in the `Caller` that is exported."""

_ASSERTIONS = {
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
}


def clean(program: Program, exported: Any, spec: pytree.TreeSpec, assigned: Sequence[str]) -> Graph:
    """Our form of an export of a `Caller`. Tensors outside the state dict are noted as the program's constants.

    The last outputs of the export are new values of the buffers named in `assigned`; they become operators that
    write into these buffers, as the rest of a model's updates are.
    """
    graph: fx.Graph = exported.graph
    _inline_regions(exported.graph_module, graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and _schema_name(node.target) in _ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    states = {n: t for n, t in state_tensors(program.model).items() if n in program.names}
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
        own = target.startswith(PREFIX)
        name = target.removeprefix(PREFIX) if own else _free_name(target, states)
        if node.users:
            if name not in states:
                program.constants[name] = _constant(exported, program.model, target, name)
            with graph.inserting_before(node):
                attribute = graph.create_node("get_attr", owners.get(id(states.get(name)), name))
            attribute.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    for node in graph.nodes:
        node.meta["nn_module_stack"] = _own_modules(node.meta.get("nn_module_stack"))
    free_of_strides(graph)
    _write_assigned(graph, owners, states, assigned)
    sizes = sizes_of(exported, program.call)
    return Graph(graph, inputs, spec, sizes)


def _free_name(target: str, states: Mapping[str, Tensor]) -> str:
    """The name of a constant that export made, unlike any of the model's own."""
    return target if target not in states else _free_name(target + "_", states)


def _own_modules(stack: Any) -> dict[str, Any]:
    """The modules of a node by the model's own names (the model is a child of what was exported)."""
    if not isinstance(stack, dict):
        return {}
    inside = [
        (key, (path.removeprefix(PREFIX), kind))
        for key, (path, kind) in stack.items()
        if path.startswith(PREFIX)
    ]
    return dict(inside)


def _write_assigned(
    graph: fx.Graph, owners: Mapping[int, str], states: Mapping[str, Tensor], assigned: Sequence[str]
) -> None:
    """Write the new values of buffers at the end of the graph; what reads them reads the values from before."""
    output = next(iter(reversed(graph.nodes)))
    values = list(output.args[0])
    split = len(values) - len(assigned)
    output.args = (values[:split],)
    for name, value in zip(assigned, values[split:], strict=True):
        target = owners.get(id(states.get(name)), name)
        first = next(iter(graph.nodes))
        readers = [node for node in graph.nodes if node.op == "get_attr" and node.target == target]
        with graph.inserting_before(first):
            buffer = graph.create_node("get_attr", target)
            buffer.meta.update(value.meta)
            before = graph.call_function(aten.clone.default, (buffer,))
        before.meta.update({"val": readers[0].meta["val"] if readers else value.meta["val"]})
        buffer.meta = dict(before.meta)
        for node in readers:
            node.replace_all_uses_with(before)
            graph.erase_node(node)
        with graph.inserting_before(output):
            written = graph.call_function(
                aten.copy_.default, (buffer, value if value is not buffer else before)
            )
        written.meta.update({"val": before.meta["val"], GRAD_MODE: False})


def _constant(exported: Any, model: nn.Module, target: str, name: str) -> Tensor:
    """A tensor that the graph reads but the state dict does not have: a non-persistent buffer or a constant."""
    value: Tensor | None = exported.constants.get(target)
    if value is None:
        value = dict(model.named_buffers())[name]
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
    """Operators of a region remember whether it records gradients; the compiled graph switches them off and on."""
    enabled, body, *args = region.args
    before = set(graph.nodes)
    outputs = _paste(graph, region, _body(owner, body), args)
    for node in graph.nodes:
        if node not in before:
            node.meta.setdefault(GRAD_MODE, bool(enabled))  # a region inside this one has said so already
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


def sizes_of(exported: Any, call: Signature) -> Sizes:
    """Which sizes of the inputs an export left free, and under which conditions."""
    symbolic = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    sizes: list[Any] = [size for value in symbolic if isinstance(value, Tensor) for size in value.shape]
    environment = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    if environment is None:
        return Sizes(call)
    free: dict[Any, tuple[int, int]] = {}
    for symbol, sources in environment.var_to_sources.items():
        for (
            source
        ) in sources:  # TensorPropertySource(GetItemSource(LocalSource("tensors"), number), SIZE, axis)
            number, axis = getattr(getattr(source, "base", None), "index", None), getattr(source, "idx", None)
            if isinstance(number, int) and isinstance(axis, int):
                free[symbol] = (number, axis)
    bounds = {symbol: _bounds(environment.var_to_range[symbol]) for symbol in free}
    return Sizes(call, free, tuple(guard.expr for guard in environment.guards), bounds)


def _bounds(interval: Any) -> tuple[int, int | None]:
    """The smallest and largest size; 2 is where export begins by itself, and says nothing of the model."""
    low = int(interval.lower)
    high = int(interval.upper) if interval.upper.is_Integer else None
    return (1 if low == 2 else low), high
