"""Why what would be run is not the user's model: which module, which operation, in a sentence."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from msfusion.errors import UntraceableModelError
from msfusion.width.analysis import modules_of
from msfusion.width.answers import answer_of_model, copies_of, seeded, short_answer
from msfusion.width.chance import random_states
from msfusion.width.execute import call_operator, execute
from msfusion.width.graph import Program
from msfusion.width.mode import mode

_WHOLE = "the model itself"
_ALIKE = 1e-3  # two tensors with the same sums, relative to their size, are taken for the same


def refusal(program: Program, where: str, what: str) -> UntraceableModelError:
    """The error that names a module and what it does."""
    return UntraceableModelError(f"{type(program.model).__name__} cannot be traced: module {where!r} {what}")


def difference(program: Program, training: bool, kind: str, name: str, size: float) -> UntraceableModelError:
    """The error for a comparison that failed: an "answer", a "tensor" after a step or a "gradient"; `name` is whose."""
    much = f"by {size:.1e} of its spread" if size < float("inf") else "in its shape, type or finiteness"
    if kind == "gradient":
        return refusal(
            program, name.rpartition(".")[0] or _WHOLE,
            f"trains otherwise than its graph: the gradient of {name!r} differs {much} (operation: gradients that are "
            "not those of its operators)",
        )  # fmt: skip
    if kind == "tensor":
        return refusal(
            program, name.rpartition(".")[0] or _WHOLE,
            f"changes its tensor {name!r} otherwise than its graph in {in_words(training)} mode, {much} "
            "(operation: an update that tracing does not see)",
        )  # fmt: skip
    return refusal(
        program, where_answers_differ(program) or _WHOLE,
        f"answers otherwise than its graph in {in_words(training)} mode, {much} (operation: something that Python "
        "decided while tracing)",
    )  # fmt: skip


def in_words(training: bool) -> str:
    """The name of a mode."""
    return "training" if training else "evaluation"


def name_of(program: Program, module: nn.Module) -> str:
    """A module's name within the model."""
    names = {m: name for name, m in program.model.named_modules()}
    return names.get(module) or _WHOLE


# -- answers ----------------------------------------------------------------------------------------------------------


def where_answers_differ(program: Program) -> str | None:
    """The first module, from the inside, whose output is nowhere among what its graph computes in evaluation mode.

    None where every output is found: then Python decides something between the modules.
    """
    computed = _computed(program)
    found: list[str] = []

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        name = name_of(program, module)
        tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
        if name in computed and not all(
            any(_alike(_sums(x), other) for other in computed[name]) for x in tensors
        ):
            found.append(name)

    with mode(program.model, False), torch.no_grad(), _hooked(program.model, lambda *_: None, leave):
        answer_of_model(program, copies_of(program))
    return found[0] if found else None


def _computed(program: Program) -> dict[str, list[tuple[Any, ...]]]:
    """What leaves each module in the graph, as shapes and sums."""
    computed: dict[str, list[tuple[Any, ...]]] = {}

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = call_operator(node, args, kwargs)
        outside = set.intersection(*(set(modules_of(user)) for user in node.users)) if node.users else set()
        left = [module for module in modules_of(node) if module not in outside]
        for tensor in pytree.tree_leaves(result) if left else ():
            if isinstance(tensor, Tensor):
                for module in left:
                    computed.setdefault(module, []).append(_sums(tensor))
        return result

    tensors = copies_of(program)
    inputs = [tensor.clone() for tensor in program.call.example]
    with torch.no_grad(), seeded(program):
        execute(program.graphs[False].graph, inputs, tensors.get, call)
    return computed


def _sums(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from others at little cost: its shape, and the sums of its entries and of their sizes."""
    values = (
        (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().nan_to_num(0.0, 0.0, 0.0)
    )
    return tuple(tensor.shape), float(values.sum()), float(values.abs().sum())


def _alike(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    scale = max(one[2], two[2], 1e-12)
    return one[0] == two[0] and all(
        abs(a - b) <= _ALIKE * scale for a, b in zip(one[1:], two[1:], strict=True)
    )


# -- random numbers ---------------------------------------------------------------------------------------------------


def where_random(program: Program) -> tuple[str, list[str]]:
    """The module in whose forward Python's or NumPy's random state changes, and the lines of Python that draw."""
    found: list[str] = []
    lines: list[str] = []
    states: list[Any] = []

    def enter(module: nn.Module, _: Any) -> None:
        states.append(random_states())

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if states.pop() != random_states():
            found.append(name_of(program, module))

    def watch(frame: FrameType, event: str, called: Any) -> None:
        drawn = event == "c_call" and isinstance(getattr(called, "__self__", None), random.Random)
        if not drawn or called.__name__ in ("getstate", "setstate"):
            return
        while frame.f_back is not None and frame.f_code.co_filename == random.__file__:
            frame = frame.f_back
        file = frame.f_code.co_filename
        if not file.startswith("<@beartype"):
            lines.append(f"{frame.f_code.co_name}, {file.rsplit('/', 1)[-1]}:{frame.f_lineno}")

    profile = sys.getprofile()
    try:
        sys.setprofile(watch)
        with _hooked(program.model, enter, leave):
            short_answer(program)
            short_answer(program)
    finally:
        sys.setprofile(profile)
    return (found or [_WHOLE])[0], lines


@contextmanager
def _hooked(model: nn.Module, enter: Any, leave: Any) -> Iterator[None]:
    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = [
    "difference",
    "in_words",
    "name_of",
    "refusal",
    "where_answers_differ",
    "where_random",
]
