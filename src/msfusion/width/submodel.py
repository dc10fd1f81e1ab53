"""Sub-models: a model cut down to a window, running on the re-specialised graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from msfusion.errors import MsfusionError, UntraceableModelError
from msfusion.width.analysis import module_of
from msfusion.width.execute import call_operator, execute
from msfusion.width.generate import Forward, compile_graph
from msfusion.width.graph import Compiled, Program
from msfusion.width.groups import WidthMap, Window
from msfusion.width.kept import changed_since
from msfusion.width.measure import depends_on_data
from msfusion.width.own_scale import OwnScale
from msfusion.width.resize import Resizer, Widths
from msfusion.width.shared_memory import check_still_frozen
from msfusion.width.slices import checked_units, extract
from msfusion.width.stacked import stackable
from msfusion.width.tensors import place_tensor, state_tensors, tensor_at


class SubModel(nn.Module):
    """A model narrowed to a window. It is called as the model is, and returns what the model returns.

    Its `state_dict()` has the names of the model's with narrowed tensors. It trains, moves between devices and
    switches between training and evaluation as any module does.
    """

    def __init__(self, program: Program, forwards: Mapping[bool, Forward]) -> None:
        super().__init__()
        self._program, self._forwards = program, forwards

    @property
    def program(self) -> Program:
        """What tracing the model gave: graphs (as wide as the model), and how it is called."""
        return self._program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the sub-model. TypeError where the call does not fit the one that was traced."""
        inputs = self._program.inputs(self, args, kwargs)
        outputs = self._forwards[self.training](self, *inputs)
        return self._program.graphs[self.training].packed(outputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubModel:
        """Convert or move all tensors; a buffer with two names stays one (`nn.Module` makes two of it)."""
        first: dict[int, str] = {}
        tied = [
            (name, first[id(buffer)])
            for name, buffer in self.named_buffers(remove_duplicate=False)
            if first.setdefault(id(buffer), name) != name
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        persistent = state_tensors(self) if tied else {}
        for name, owner in tied:
            place_tensor(self, name, tensor_at(self, owner), name in persistent)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SubModel:
        """A copy with parameters of its own; the traced program is shared."""
        copy = SubModel(self._program, self._forwards)
        memo[id(self)] = copy
        copy_tensors(self, copy, memo)
        return copy.train(self.training)


def copy_tensors(source: nn.Module, target: nn.Module, memo: dict[int, Any] | None = None) -> None:
    """Give a module copies of another's parameters and buffers under their names, ties kept."""
    known: dict[int, Any] = {} if memo is None else memo
    for name, parameter in source.named_parameters(remove_duplicate=False):
        data = known.get(id(parameter))
        if data is None:
            data = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            known[id(parameter)] = data
        place_tensor(target, name, data, True)
    persistent = state_tensors(source)
    for name, buffer in source.named_buffers(remove_duplicate=False):
        data = known.setdefault(id(buffer), buffer.detach().clone())
        place_tensor(target, name, data, name in persistent)


def narrow(
    model: nn.Module, width_map: WidthMap, window: Window, scaling: bool | OwnScale = True
) -> SubModel:
    """Cut the sub-model that a window holds out of a model; the model's tensors are copied, not shared.

    `window` maps group names to the indices of the units held, any and in any order; a group that it does not name is
    held whole. With `scaling`, what is summed over a narrowed axis is multiplied by K/w, so that the sub-model
    answers as the whole model would; without, it is a model of its own (see docs/width-scaling.md). With an `OwnScale`
    only the part of the factors is in the operators that no parameter holds; the tensors are copied as they are.

    Raises MsfusionError for a window that does not fit, or a model that is not the traced one.
    """
    program, state = traced_from(model, width_map)
    sizes = {name: len(units) for name, units in checked_units(width_map, window).items()}
    forwards, scales = compiled(program, sizes, scaling)
    sub = SubModel(program, forwards)
    parts = extract({name: tensor.detach() for name, tensor in state.items()}, width_map, window)
    made: dict[str, nn.Parameter] = {}
    for name, tensor in parts.items():
        original = state[name]
        if isinstance(original, nn.Parameter):
            first = width_map.aliases.get(name, name)
            made.setdefault(first, nn.Parameter(tensor, original.requires_grad))
            place_tensor(sub, name, made[first], True)
        else:
            place_tensor(sub, name, tensor, True)
    own = dict(model.named_buffers())
    for name, constant in program.constants.items():
        place_tensor(sub, name, _cut(own.get(name, constant).detach(), width_map, name, window), False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, scale in scales.items():
        place_tensor(sub, name, scale.to(device), False)
    return sub.train(model.training)


def program_of(width_map: WidthMap) -> Program:
    """What tracing the model gave. MsfusionError for a map that was made by hand."""
    if width_map.program is None:
        raise MsfusionError("only a traced width map can narrow a model; make it with msfusion.trace")
    return width_map.program


def traced_from(model: nn.Module, width_map: WidthMap) -> tuple[Program, dict[str, Tensor]]:
    """What tracing gave, and the model's own tensors by name. MsfusionError where it is not the traced model,
    or where a tensor has been set free since then that shares its memory with another.
    """
    program = program_of(width_map)
    state = state_tensors(model)
    if program.without_values and not any(tensor.is_meta for tensor in state.values()):
        raise MsfusionError(
            f"this {type(model).__name__} was traced without values (on the meta device), which is enough to plan; "
            "trace it with its values to narrow or train it"
        )
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != dict(width_map.shapes):
        raise MsfusionError(
            f"this {type(model).__name__} is not the model of the width map: its tensors have other names or shapes; "
            "trace it again"
        )
    if (change := changed_since(model, program.kept)) is not None:
        raise MsfusionError(
            f"this {type(model).__name__} was changed after it was traced: {change}; trace it again"
        )
    check_still_frozen(program, model, state)
    return program, state


def _cut(tensor: Tensor, width_map: WidthMap, name: str, window: Window) -> Tensor:
    """A constant cut to a window (the reference implementation; constants are few)."""
    for axis, positions in width_map.axis_positions(name, window).items():
        tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor.clone()


def compiled(program: Program, sizes: Mapping[str, int], scaling: bool | OwnScale) -> Compiled:
    """The forward functions for these sizes, in both modes, and the factors they read; made once."""
    key = (tuple(sorted(sizes.items())), scaling)
    if key not in program.compiled:
        forwards: dict[bool, Forward] = {}
        scales: dict[str, Tensor] = {}
        for training in (True, False):
            resizer = _resizer(program, sizes, scaling)
            graph = resizer.run(program.graphs[training].graph)
            forwards[training] = compile_graph(stackable(graph))
            scales.update(resizer.scales)
        program.compiled[key] = (forwards, scales)
    return program.compiled[key]


def resized(program: Program, training: bool) -> tuple[fx.Graph, Mapping[fx.Node, Any]]:
    """A copy of a mode's graph at full width, fit for any device, and the copy of each of its nodes."""
    resizer = _resizer(program, {}, False)
    return resizer.run(program.graphs[training].graph), resizer.copies


def _resizer(program: Program, sizes: Mapping[str, int], scaling: bool | OwnScale) -> Resizer:
    assert program.analysis is not None, "a width map's program has been analysed"
    own = Widths(program.groups, dict(scaling.sizes)) if isinstance(scaling, OwnScale) else None
    return Resizer(program.analysis, Widths(program.groups, sizes), bool(scaling), own)


def check_narrow_shapes(width_map: WidthMap) -> None:
    """Run a half-wide sub-model without data and compare the shape of every value with the map's.

    Raises UntraceableModelError, naming module and operation, where one differs: no sub-model is silently wrong.
    """
    program = program_of(width_map)
    sizes = {group.name: -(-group.units // 2) for group in width_map.groups}
    for training in (True, False):
        resizer = _resizer(program, sizes, True)
        resizer.run(program.graphs[training].graph)
        sources = {copy: source for source, copy in resizer.copies.items() if isinstance(copy, fx.Node)}
        _check_graph(width_map, program, resizer, sources)


def _check_graph(
    width_map: WidthMap, program: Program, resizer: Resizer, sources: dict[fx.Node, fx.Node]
) -> None:
    """Run the resized graph on tensors without data; on the example itself where shapes depend on data."""
    analysis, widths = resizer.analysis, resizer.widths
    tensors = program.tensors()

    def checked(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source = sources.get(node)
        try:
            value = call_operator(node, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise
        except Exception as error:
            problem = str(error).strip().partition("\n")[0]
            raise _unfit(program, source or node, problem) from error
        if isinstance(value, Tensor) and source is not None and analysis.values.get(source):
            shape, expected = list(value.shape), [widths(axis) for axis in analysis.axes(source)]
            if len(shape) != len(expected) or any(
                found != wanted and not depends_on_data(traced)
                for found, wanted, traced in zip(shape, expected, source.meta["val"].shape, strict=True)
            ):
                raise _unfit(program, source, f"shape {shape} where {expected} was expected")
        return value

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            fakes: list[Tensor] = [mode.from_tensor(tensor) for tensor in program.call.example]
            execute(resizer.graph, fakes, lambda name: _fake_state(name, resizer, tensors), checked)
        return
    except (DataDependentOutputException, DynamicOutputShapeException):
        if program.without_values:
            return  # there is no data: as far as it can be known without
    window = {name: torch.arange(size) for name, size in widths.sizes.items()}

    def held(name: str) -> Any:
        return (
            _cut(tensors[name].detach(), width_map, name, window) if name in tensors else resizer.scales[name]
        )

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        inputs = [tensor.detach().clone() for tensor in program.call.example]
        execute(resizer.graph, inputs, held, checked)


def _fake_state(name: str, resizer: Resizer, tensors: Mapping[str, Tensor]) -> Any:
    if name in resizer.scales:
        return torch.empty(resizer.scales[name].shape)
    if name not in tensors:
        return None
    shape = [resizer.widths(axis) for axis in resizer.analysis.state[name]]
    return torch.empty(shape, dtype=tensors[name].dtype)


def _unfit(program: Program, node: fx.Node, problem: str) -> UntraceableModelError:
    return UntraceableModelError(
        f"{type(program.model).__name__} cannot be narrowed: its sub-models fail in module {module_of(node)!r} at "
        f"operation {node.target}: {problem}"
    )
