"""What a model answers, measured without changing it: on copies of its tensors, with its random numbers fixed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.utils import _pytree as pytree

from msfusion.width.graph import Graph, Program
from msfusion.width.outputs import selected

_SHARED = 2**26
"""Parameters of more entries than this in all are shared with the copies, unless the model changes them."""


def copies_of(program: Program, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors that the graphs read, by name, as tensors of their own that require gradients as they do.

    Large parameters share their values with the model's, which saves a second copy of the model. In another `dtype`,
    all of the model's floating point tensors are converted.
    """
    changed = {name for graph in program.graphs.values() for name in written_tensors(graph)}
    tensors = program.tensors()
    own = {id(t) for t in (*program.model.parameters(), *program.model.buffers())}
    large = sum(tensor.numel() for tensor in {id(t): t for t in tensors.values()}.values()) > _SHARED
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) in made:
            continue
        copy = tensor.detach()
        if dtype is not None and copy.is_floating_point() and id(tensor) in own:
            copy = copy.to(dtype)
        if copy.data_ptr() == tensor.data_ptr() and not (
            large and isinstance(tensor, torch.nn.Parameter) and name not in changed
        ):
            copy = copy.clone()
        made[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def written_tensors(graph: Graph) -> Iterator[str]:
    """The tensors of a model that operators write into, themselves or through a view (`self.stats[0].add_(x)`)."""
    for node in graph.graph.nodes:
        for source in _aliased(node, written=True):
            while source.op == "call_function" and (behind := list(_aliased(source))):
                source = behind[0]
            if source.op == "get_attr":
                yield str(source.target)


def _aliased(node: fx.Node, written: bool = False) -> Iterator[fx.Node]:
    """What an operator writes into, or else what its result can be a view of."""
    if node.target is operator.getitem and not written:
        yield node.args[0]  # type: ignore[misc]
    schema = getattr(node.target, "_schema", None)
    for number, argument in enumerate(schema.arguments if schema is not None else ()):
        source = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
        noted = argument.alias_info is not None and (argument.alias_info.is_write or not written)
        if isinstance(source, fx.Node) and (noted or (written and argument.name in _STATISTICS)):
            yield source


_STATISTICS = (
    "running_mean",
    "running_var",
)  # batch_norm and instance_norm write into them without saying so


@contextmanager
def seeded(program: Program) -> Iterator[None]:
    """Inside, torch's random numbers begin at a fixed seed; afterwards they go on as if nothing had been."""
    devices = {tensor.device.index for tensor in program.tensors().values() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        torch.manual_seed(0)
        yield


def answer_of_model(
    program: Program,
    tensors: dict[str, Tensor],
    inputs: Sequence[Tensor] | None = None,
    then: Callable[[list[Any]], None] | None = None,
) -> list[Any]:
    """The model's own flat outputs, computed with these tensors in place of its own.

    `then` is called with them while the tensors are still in place: activation checkpointing runs parts of the model
    again in the backward pass.
    Buffers among them change as the model changes them; one that it assigns anew is replaced in `tensors`.
    """
    given = {f"model.{name}": tensors[known] for name, known in _places(program) if known in tensors}
    called = [tensor.clone() for tensor in (program.call.example if inputs is None else inputs)]
    with seeded(program):
        # each place is given its tensor once: a module with two names would otherwise keep what it is given
        outputs = functional_call(_Call(program, then), given, tuple(called), tie_weights=False)
    after = {known: given[f"model.{name}"] for name, known in _places(program) if known in tensors}
    tensors.update({name: after[first] for name, first in _first_names(program).items() if first in after})
    tensors.update(after)
    answer: list[Any] = outputs
    return answer


def short_answer(program: Program) -> list[Any]:
    """The model's own flat outputs for the short example, on copies of its tensors and without gradients."""
    with torch.no_grad():
        return answer_of_model(program, copies_of(program), program.short)


def _places(program: Program) -> Iterator[tuple[str, str]]:
    """Where the model holds a tensor, each module by its first name, and the tensor's own first name."""
    first = _first_names(program)
    for path, module in program.model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{path}.{leaf}" if path else leaf
                yield name, first.get(name, name)


def _first_names(program: Program) -> dict[str, str]:
    """For each name of a parameter or buffer, the first name of that tensor."""
    model = program.model
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in reversed(named)}
    return {name: first[id(tensor)] for name, tensor in named}


class _Call(torch.nn.Module):
    """The model, called with the tensors of the traced call."""

    def __init__(self, program: Program, then: Callable[[list[Any]], None] | None) -> None:
        super().__init__()
        self.then = then
        self.model, self.call, self.outputs = program.model, program.call, program.outputs

    def forward(self, *tensors: Tensor) -> list[Any]:
        outputs = pytree.tree_leaves(selected(self.call.call(self.model, tensors), self.outputs, self.model))
        if self.then is not None:
            self.then(outputs)
        return outputs
