"""What tracing a model gives: its graphs in both modes, and how it is called."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from msfusion.digests import digest_of_tensors
from msfusion.width.call import Signature, Sizes
from msfusion.width.generate import Forward
from msfusion.width.kept import Kept, Uses
from msfusion.width.tensors import state_tensors

if TYPE_CHECKING:
    from msfusion.width.analysis import Analysis
    from msfusion.width.axes import Atom

Compiled = tuple[Mapping[bool, Forward], Mapping[str, Tensor]]
"""The functions by training mode, and the factors of width scaling that they read."""


@dataclass
class Graph:
    """One traced forward pass. `inputs` are the placeholders; state is read by `get_attr` nodes."""

    graph: fx.Graph
    inputs: list[fx.Node]
    out_spec: pytree.TreeSpec
    sizes: Sizes

    @property
    def outputs(self) -> list[Any]:
        """The flat outputs: nodes, or constants."""
        node = next(iter(reversed(self.graph.nodes)))
        assert node.op == "output"
        return list(node.args[0])

    def outline(self) -> str:
        """What is computed from what, a line an operator: equal for equal graphs, in any process."""
        numbers = {node: f"%{index}" for index, node in enumerate(self.graph.nodes)}
        return "\n".join(
            f"{numbers[node]} = {node.op} {name_of(node.target)}"
            f"{fx.map_arg((node.args, node.kwargs), lambda other: _Shown(numbers[other]))}"
            for node in self.graph.nodes
        )

    def packed(self, outputs: Any) -> Any:
        """The model's output, from the flat ones."""
        return outputs[0] if self.out_spec.is_leaf() else pytree.tree_unflatten(list(outputs), self.out_spec)


@dataclass
class Program:
    """What tracing a model gives: both graphs, the tensors they read, and how the model is called."""

    graphs: dict[bool, Graph]  # by training mode
    model: nn.Module
    constants: dict[str, Tensor]  # read by the graphs but not in the state dict
    call: Signature
    args: tuple[Any, ...]  # the example's inputs, as the model was called
    kwargs: dict[str, Any]
    names: tuple[str, ...]  # of the model's tensors; a buffer that is None before the first call is not one
    outputs: tuple[str | int, ...] | None = None  # those that count; None where all do
    short: tuple[Tensor, ...] = ()  # the example, cut short where the model is large
    checkpointing: list[str] = field(default_factory=list)  # modules whose activations are computed twice
    frozen_together: list[tuple[str, str]] = field(
        default_factory=list
    )  # share memory, which nothing changes
    uses: Uses = field(default_factory=Uses, repr=False)  # attributes that its forward reads and writes
    kept: Kept = field(default_factory=dict)  # what its modules are
    asks_for_autocast: str | None = None  # a module whose forward does
    analysis: Analysis | None = None  # the axes of every tensor, once `trace` has found them
    groups: dict[Atom, str] = field(default_factory=dict)  # which width group an atom of these axes is
    compiled: dict[Hashable, Compiled] = field(
        default_factory=dict, repr=False
    )  # by window sizes and scaling

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a graph may read, by name: the state dict's, then the constants."""
        own = state_tensors(self.model)
        return {**{name: own[name] for name in self.names if name in own}, **self.constants}

    def outline(self) -> str:
        """What the model computes in both modes, and the tensors that it holds: equal for equal models.

        Of constants it has the values, of the state dict's tensors only their names, types and shapes.
        """
        graphs = [f"training: {training}\n{graph.outline()}" for training, graph in self.graphs.items()]
        states = [
            f"{name}: {tensor.dtype}{list(tensor.shape)}{' trained' if tensor.requires_grad else ''}"
            for name, tensor in state_tensors(self.model).items()
        ]
        return "\n".join([*graphs, *states, f"constants: {digest_of_tensors(self.constants)}"])

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The inputs of the graph for a call of a module made from it. TypeError where it does not fit."""
        tensors = self.call.flatten(args, kwargs)
        if self._goes_by_precision and any(torch.is_autocast_enabled(t.device.type) for t in tensors):
            raise TypeError(
                f"module {self._goes_by_precision!r} converts numbers, or asks whether autocast is on, and that is "
                "fixed since the model was traced: call the sub-model outside of torch.autocast"
            )
        self.graphs[module.training].sizes.check(tensors, module)
        return tensors

    @cached_property
    def _goes_by_precision(self) -> str | None:
        """A module that asks for autocast, or converts to a precision that a call under autocast would not have."""
        from msfusion.width.analysis import module_of

        nodes = (node for graph in self.graphs.values() for node in graph.graph.nodes)
        cast = next((node for node in nodes if _is_cast(node)), None)
        return self.asks_for_autocast or (None if cast is None else module_of(cast))

    @property
    def without_values(self) -> bool:
        """Whether the model was traced on the meta device, where tensors have no values."""
        return any(tensor.is_meta for tensor in self.tensors().values())


class _Shown(str):
    """A text that is shown without quotation marks among the arguments of an operator."""

    __slots__ = ()

    __repr__ = str.__str__


def name_of(target: Any) -> str:
    """The name of what a node calls or reads; that of a plain function without its address."""
    return str(target) if isinstance(target, str | torch._ops.OpOverload) else str(target.__name__)


def _is_cast(node: fx.Node) -> bool:
    """Whether a node converts floating point numbers to another precision."""
    if node.op != "call_function" or not str(node.target).startswith(("aten.to.", "aten._to_copy.")):
        return False
    values = [node.meta.get("val"), getattr(node.args[0], "meta", {}).get("val")]
    return all(isinstance(each, Tensor) and each.is_floating_point() for each in values)
