"""The traced graph of a model: exported once in training and once in evaluation mode, cleaned for our use.

`torch.export` gives the graph with the model's own operators (`linear`, `conv2d`, `batch_norm`, attention stay whole).
Here its regions (`no_grad`, `autocast`) are inlined, its run-time assertions dropped, and its parameters and buffers
read from the module by their own names.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from msfusion.errors import UntraceableModelError

aten = torch.ops.aten

_ASSERTIONS = {
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
}


@dataclass
class Graph:
    """One traced forward pass. `inputs` are the placeholders; state is read by `get_attr` nodes."""

    graph: fx.Graph
    inputs: list[fx.Node]
    out_spec: pytree.TreeSpec

    @property
    def outputs(self) -> list[Any]:
        """The flat outputs: nodes, or constants."""
        node = next(iter(reversed(self.graph.nodes)))
        assert node.op == "output"
        return list(node.args[0])


@dataclass
class Program:
    """What tracing a model gives: both graphs, the tensors they read, and how the model is called."""

    graphs: dict[bool, Graph]  # by training mode
    model: nn.Module
    constants: dict[str, Tensor]  # read by the graphs but not in the state dict
    call: Signature
    args: tuple[Any, ...]  # the example's inputs, as the model was called
    kwargs: dict[str, Any]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # compiled sub-models, by window sizes

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a graph may read, by name: the state dict's, then the constants."""
        return {**dict(self.model.state_dict(keep_vars=True)), **self.constants}


@dataclass(frozen=True)
class Signature:
    """How the model was called for tracing, so that a sub-model can be called in any equivalent way."""

    signature: inspect.Signature
    names: tuple[str, ...]
    spec: pytree.TreeSpec
    example: tuple[Any, ...]  # the flat inputs of the example

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs of a call, in the graph's order. TypeError where it does not fit the traced call."""
        if not kwargs and len(args) == len(self.names) == len(self.example):
            return list(args)
        bound = self.signature.bind(*args, **kwargs).arguments
        given = {name: value for name, value in _named(self.signature, bound).items() if value is not None}
        if set(given) != set(self.names):
            raise TypeError(
                f"the sub-model was traced with the inputs {', '.join(self.names)} but called with "
                f"{', '.join(given) or 'none'}; call it with the same ones, or trace the model with these"
            )
        flat, spec = pytree.tree_flatten(tuple(given[name] for name in self.names))
        if spec != self.spec:
            raise TypeError("the sub-model was called with inputs nested otherwise than the traced ones")
        return flat


def _named(signature: inspect.Signature, bound: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with those of *args numbered and those of **kwargs by their own names."""
    named: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}[{i}]": v for i, v in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def export_program(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any]) -> Program:
    """Export the model in training and evaluation mode. Raises UntraceableModelError naming module and operation."""
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (tuple(example_inputs), {})
    args, kwargs = _at_least_two_examples(args, kwargs)
    signature = inspect.signature(model.forward)
    from msfusion.width.twin import evaluation_twin  # which builds on this module

    try:
        named = _named(signature, signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise UntraceableModelError(
            f"{type(model).__name__} cannot be called with the example inputs: {error}"
        ) from None
    named = {name: value for name, value in named.items() if value is not None}
    flat, spec = pytree.tree_flatten(tuple(named.values()))
    call = Signature(signature, tuple(named), spec, tuple(flat))
    program = Program({}, model, {}, call, args, kwargs)
    program.graphs[True] = _clean(program, _export(model, args, kwargs, True))
    program.graphs[False] = evaluation_twin(program, program.graphs[True]) or _clean(
        program, _export(model, args, kwargs, False)
    )
    return program


def _at_least_two_examples(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a batch of one repeated: export takes an axis of size 1 for a constant."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not tensors or any(x.dim() == 0 or x.shape[0] != 1 for x in tensors):
        return args, kwargs
    repeated = pytree.tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) else x, (args, kwargs))
    return repeated[0], repeated[1]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Any:
    """One export, with free batch and time axes; the model's mode is put back afterwards."""
    auto = torch.export.Dim.AUTO

    def axes(value: Any) -> Any:
        """Examples and time are free; an axis of size 1 is a constant to export."""
        return (
            {i: auto for i in range(min(2, value.dim())) if value.shape[i] > 1}
            if isinstance(value, Tensor)
            else None
        )

    shapes = pytree.tree_map(axes, kwargs or args)
    with mode(model, training), _module_stack(model) as stack, torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # export warns of what it does to its own copies
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise _untraceable(model, stack, error) from error


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in one mode, put back afterwards; and torch's transformers without what cannot be traced.

    That is the fused kernels of nn.TransformerEncoder, and the look at a mask's values for whether it is causal (the
    mask is applied either way).
    """
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    detect = transformer._detect_is_causal_mask
    try:
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
        model.train(training)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward is running; it stays as it was where an error struck."""
    stack: list[str] = []
    names = {module: name or "the model itself" for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names[module])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    handles = []
    for module in names:
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _untraceable(model: nn.Module, stack: list[str], error: Exception) -> UntraceableModelError:
    where = stack[-1] if stack else "the model itself"
    modules: dict[str, nn.Module] = dict(model.named_modules())
    kind = type(modules.get(where, model)).__name__
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UntraceableModelError(
        f"{type(model).__name__} cannot be traced: module {where!r} ({kind}) failed on the operation "
        f"{_operation(error)}: {type(error).__name__}: {cause}"
    )


def _operation(error: BaseException) -> str:
    """The line of the user's code that failed: the innermost frame outside torch."""
    place = "unknown"
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if f"{'/torch/'}" not in filename and "msfusion/width" not in filename:
            lines = inspect.getframeinfo(trace, context=1).code_context or [""]
            place = f"{lines[0].strip()!r} ({filename.rsplit('/', 1)[-1]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


def _clean(program: Program, exported: Any) -> Graph:
    """Our form of an exported graph: see the module's docstring."""
    graph: fx.Graph = exported.graph
    _inline_regions(exported.graph_module, graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and _schema_name(node.target) in _ASSERTIONS:
            graph.erase_node(node)
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
    return Graph(graph, inputs, exported.call_spec.out_spec)


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
