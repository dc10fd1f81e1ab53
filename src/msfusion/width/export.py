"""Exporting a model: once in training mode, from which the evaluation graph is derived where that is possible.

`torch.export` gives the graph with the model's own operators (`linear`, `conv2d`, `batch_norm`, attention stay whole).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msfusion.errors import UntraceableModelError
from msfusion.width.graph import Program, Signature, named_arguments
from msfusion.width.mode import mode
from msfusion.width.outputs import Outputs, as_names
from msfusion.width.regions import clean
from msfusion.width.twin import evaluation_twin


def export_program(
    model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any], outputs: Outputs | None = None
) -> Program:
    """Export the model in training and evaluation mode, with all or some of its outputs.

    Raises UntraceableModelError naming module and operation.
    """
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (tuple(example_inputs), {})
    args, kwargs = _at_least_two_examples(args, kwargs)
    signature = inspect.signature(model.forward)
    try:
        named = named_arguments(signature, signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise UntraceableModelError(
            f"{type(model).__name__} cannot be called with the example inputs: {error}"
        ) from None
    named = {name: value for name, value in named.items() if value is not None}
    flat, spec = pytree.tree_flatten(tuple(named.values()))
    call = Signature(signature, tuple(named), spec, tuple(flat))
    program = Program({}, model, {}, call, args, kwargs, as_names(outputs))
    program.graphs[True] = clean(program, _export(model, args, kwargs, True))
    program.graphs[False] = evaluation_twin(program, program.graphs[True]) or clean(
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
        if "/torch/" not in filename and "msfusion/width" not in filename:
            lines = inspect.getframeinfo(trace, context=1).code_context or [""]
            place = f"{lines[0].strip()!r} ({filename.rsplit('/', 1)[-1]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
