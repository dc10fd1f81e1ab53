"""Exporting a model: once in training mode, from which the evaluation graph is derived where that is possible.

`torch.export` gives the graph with the model's own operators (`linear`, `conv2d`, `batch_norm`, attention stay whole).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as checkpoint_module

from msfusion.errors import UntraceableModelError
from msfusion.width.call import signature_of
from msfusion.width.causes import refusal
from msfusion.width.chance import NUMPY, Chances, random_states
from msfusion.width.graph import Graph, Program
from msfusion.width.mode import mode
from msfusion.width.outputs import Outputs, as_names, selected
from msfusion.width.own_gradients import noted_gradients
from msfusion.width.regions import clean
from msfusion.width.tensors import left_as_it_was, state_tensors
from msfusion.width.twin import evaluation_twin


def export_program(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any], outputs: Outputs | None = None
) -> Program:
    """Export the model in training and evaluation mode, with all or some of its outputs.

    Raises UntraceableModelError naming module and operation.
    """
    _check_model(model)
    args, kwargs = (
        ((), example_inputs) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    )
    args, kwargs = _at_least_two_examples(*_separate(args, dict(kwargs)))
    call = signature_of(model, args, kwargs)
    program = Program({}, model, {}, call, args, dict(kwargs), tuple(state_tensors(model)), as_names(outputs))
    program.graphs[True] = _export(program, True)
    program.graphs[False] = evaluation_twin(program, program.graphs[True]) or _export(program, False)
    return program


def _check_model(model: nn.Module) -> None:
    """Refuse what tracing would lose without a word."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UntraceableModelError(
                f"{kind} cannot be traced: module {name or 'the model itself'!r} is compiled by TorchScript; "
                "give the module that it was made from"
            )
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise UntraceableModelError(
                f"{kind} cannot be traced: module {name or 'the model itself'!r} has a hook on its gradient, which its "
                "sub-models would not have (operation register_full_backward_hook); remove the hook"
            )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UntraceableModelError(
                f"{kind} cannot be traced: the parameter {name!r} has a hook on its gradient, which its slices would "
                "not have (operation register_hook); remove the hook"
            )


def _separate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the example's tensors; one that is given twice becomes two, the second with its examples in turn.

    A model may ask whether two inputs are the same object (attention does, `q is k`), and later calls give others.
    """
    given: set[int] = set()

    def separate(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copy = leaf.detach().clone()
        if id(leaf) in given and leaf.dim() and leaf.layout is torch.strided:
            copy = copy.roll(1, 0)
        given.add(id(leaf))
        return copy.requires_grad_(leaf.requires_grad)

    separated: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(separate, (args, kwargs))
    return separated


def _at_least_two_examples(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a batch of one repeated: export takes an axis of size 1 for a constant."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not tensors or any(x.dim() == 0 or x.shape[0] != 1 for x in tensors):
        return args, kwargs
    repeated = pytree.tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) else x, (args, kwargs))
    return repeated[0], repeated[1]


@dataclass
class Seen:
    """What an export does not tell of a call: how the outputs are nested, and which buffers were assigned."""

    spec: pytree.TreeSpec | None = None
    assigned: tuple[str, ...] = ()


class Caller(nn.Module):
    """What is exported: the model called with the tensors of the example alone, in a fixed order.

    So inputs may have any names and come in any order, and whatever is no tensor is fixed. Buffers to which the model
    assigns new tensors are returned too, after its outputs: export itself forgets them.
    """

    def __init__(self, program: Program, seen: Seen) -> None:
        super().__init__()
        self.model, self.call, self.seen, self.outputs = program.model, program.call, seen, program.outputs

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        """The flat outputs, then the new values of the buffers that were assigned."""
        before = dict(self.model.named_buffers())
        answer = selected(self.call.call(self.model, tensors), self.outputs, self.model)
        outputs, self.seen.spec = pytree.tree_flatten(answer)
        after = dict(self.model.named_buffers())
        changed = {n: b for n, b in after.items() if n in before and b is not before[n]}
        self.seen.assigned = tuple(changed)
        return (*outputs, *changed.values())


def _export(program: Program, training: bool) -> Graph:
    """One export, with free batch and time axes; the model's mode is put back afterwards."""
    model = program.model
    auto = torch.export.Dim.AUTO
    device = "meta" if program.without_values else None
    inputs = tuple(tensor.to(device) if device else tensor for tensor in program.call.example)
    seen, chances, numbers = Seen(), Chances(), random_states()

    def export(axes: int) -> Any:
        shapes = tuple({i: auto for i in range(min(axes, x.dim())) if x.shape[i] > 1} for x in inputs)
        stack.clear()
        with left_as_it_was(model):  # export leaves tensors without values where the model assigned some
            return torch.export.export(Caller(program, seen), inputs, dynamic_shapes=(shapes,), strict=False)

    with (
        mode(model, training),
        _module_stack(model) as stack,
        _noted_checkpointing(program, stack),
        _noted_autocast(program, stack),
        noted_gradients(stack) as own_gradients,
        _idle_conversions(),
        _unlogged(),
        torch.enable_grad(),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),  # where a failing export prints its graph
    ):
        warnings.simplefilter("ignore")  # export warns of what it does to its own copies
        try:
            exported = export(2)
        except Exception as error:
            try:
                exported = _again(export, chances, error)
            except Exception as last:
                raise _untraceable(model, stack, last, _by_chance(chances, numbers)) from error
    if own_gradients:
        where, what = own_gradients[0]
        raise refusal(
            program, where, f"makes gradients of its own (operation: {what}): a graph has only those of its operators, "
            "so it would train otherwise; write it with operators whose gradients are right, or take it out"
        )  # fmt: skip
    assert seen.spec is not None
    return clean(program, exported, seen.spec, seen.assigned)


def _again(export: Callable[[int], Any], chances: Chances, error: Exception) -> Any:
    """An export that failed at a decision: with chances that are none or certain, then with the example's lengths.

    (A number that PyTorch computes from a length is known only where the length is fixed.) The last error is raised.
    """
    if not isinstance(error, GuardOnDataDependentSymNode):
        raise error
    with chances:
        with contextlib.suppress(GuardOnDataDependentSymNode):
            return export(2)
        return export(1)


def _by_chance(chances: Chances, numbers: dict[str, Any]) -> str:
    """Whether chance was the reason why an export failed, and what to do."""
    if random_states()[NUMPY] != numbers[NUMPY]:
        return "; it draws random numbers from numpy.random, which no graph can hold: draw them with torch"
    if chances.decided:
        return (
            "; chance decides what is run (LayerDrop, stochastic depth), which no graph can hold: take it out, or draw "
            "a number for each example and multiply by it (DropPath)"
        )
    return ""


@contextmanager
def _noted_checkpointing(program: Program, stack: list[str]) -> Iterator[None]:
    """Note the modules that use activation checkpointing: a graph keeps their activations instead.

    Both kinds are caught where `torch.utils.checkpoint.checkpoint` calls them, since models import it by name.
    """
    module: Any = checkpoint_module
    without, reentrant = module._checkpoint_without_reentrant_generator, module.CheckpointFunction

    def note() -> None:
        where = stack[-1] if stack else "the model itself"
        if where not in program.checkpointing:
            program.checkpointing.append(where)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return without(*args, **kwargs)

    class Noted:
        @staticmethod
        def apply(function: Any, _: bool, *args: Any) -> Any:
            note()
            return function(
                *args
            )  # the kind that runs it without gradients first, of which a graph needs nothing

    try:
        module._checkpoint_without_reentrant_generator, module.CheckpointFunction = noted, Noted
        yield
    finally:
        module._checkpoint_without_reentrant_generator, module.CheckpointFunction = without, reentrant


_ABOUT_AUTOCAST = ("is_autocast_enabled", "is_autocast_cpu_enabled", "get_autocast_dtype")


@contextmanager
def _noted_autocast(program: Program, stack: list[str]) -> Iterator[None]:
    """Note a module that asks whether autocast is on, by itself or through a library other than torch."""
    module: Any = torch
    questions = {name: getattr(module, name) for name in _ABOUT_AUTOCAST}

    def noting(asked: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            if not caller.startswith("torch.") and program.asks_for_autocast is None:
                program.asks_for_autocast = stack[-1] if stack else "the model itself"
            return asked(*args)

        return noted

    try:
        for name, asked in questions.items():
            setattr(module, name, noting(asked))
        yield
    finally:
        for name, asked in questions.items():
            setattr(module, name, asked)


@contextmanager
def _idle_conversions() -> Iterator[None]:
    """A module that converts itself in `forward` (`self.gate = self.gate.to(self.dtype)`) stays where it is so already.

    Export stands in for its parameters with values of its own, which a module cannot be given.
    """
    apply: Any = nn.Module._apply

    def idle(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors = [*module.parameters(recurse), *module.buffers(recurse)]
        if all(function(tensor) is tensor for tensor in tensors):
            return module
        converted: nn.Module = apply(module, function, recurse)
        return converted

    try:
        nn.Module._apply = idle  # type: ignore[method-assign]
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without the warnings that a failing export logs: its error becomes one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward is running; it stays as it was where an error struck."""
    stack: list[str] = []
    names = {module: name or "the model itself" for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names.get(module, type(module).__name__))  # export may run a copy of a shared module

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


def _untraceable(
    model: nn.Module, stack: list[str], error: Exception, why: str = ""
) -> UntraceableModelError:
    where = stack[-1] if stack else "the model itself"
    module = dict(model.named_modules()).get(where, model)
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UntraceableModelError(
        f"{type(model).__name__} cannot be traced: module {where!r} ({type(module).__name__}) failed on the operation "
        f"{_operation(error)}: {type(error).__name__}: {cause[:300]}{_advice(model, module, error) or why}"
    )


def _advice(model: nn.Module, module: nn.Module, error: Exception) -> str:
    """What to do about the known reasons why an export fails."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(module, nn.RNNBase) and any(
        isinstance(value, PackedSequence) for frame in frames for value in frame.f_locals.values()
    ):
        return "; the sizes of a packed sequence depend on its values: give the padded sequence to the layer instead"
    if "_apply(): Couldn't swap" in str(error):
        return "; forward converts a module of its own: call the model once before it is traced, and it stays converted"
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
        return "; momentum=None (a cumulative average) depends on a counter's value: give it a number, such as 0.1"
    config = getattr(model, "config", None)
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, 0):
            return f"; LayerDrop skips layers by chance, which no graph can hold: set config.{name} to 0"
    return ""


def _operation(error: BaseException) -> str:
    """The line of the user's code that failed: the innermost frame outside torch."""
    place = "unknown"
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if "/torch/" not in filename and "msfusion/width" not in filename and not filename.startswith("<"):
            lines = inspect.getframeinfo(trace, context=1).code_context or [""]
            place = f"{lines[0].strip()!r} ({filename.rsplit('/', 1)[-1]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
