"""What a model answers, measured without changing it: on copies of its tensors, with its random numbers fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
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
    changed = {name for graph in program.graphs.values() for name in _changed(graph)}
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


def _changed(graph: Graph) -> Iterator[str]:
    """The tensors of the model that an operator writes into."""
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            yield from (str(source.target) for source in node.all_input_nodes if source.op == "get_attr")


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
    model = program.model
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    given = {f"model.{name}": tensors[name] for name in own if name in tensors}
    called = [tensor.clone() for tensor in (program.call.example if inputs is None else inputs)]
    with seeded(program):
        outputs = functional_call(_Call(program, then), given, tuple(called))
    tensors.update({name.removeprefix("model."): tensor for name, tensor in given.items()})
    answer: list[Any] = outputs
    return answer


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
