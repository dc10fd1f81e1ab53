"""What tracing a model gives: its graphs in both modes, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from msfusion.width.analysis import Analysis
    from msfusion.width.axes import Atom

Forward = Callable[..., tuple[Any, ...]]
"""A compiled graph: a function of the sub-model and the flat inputs, that gives the flat outputs."""

Compiled = tuple[Mapping[bool, Forward], Mapping[str, Tensor]]
"""The functions by training mode, and the factors of width scaling that they read."""


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
    outputs: tuple[str | int, ...] | None = None  # those that count; None where all do
    analysis: Analysis | None = None  # the axes of every tensor, once `trace` has found them
    groups: dict[Atom, str] = field(default_factory=dict)  # which width group an atom of these axes is
    compiled: dict[Hashable, Compiled] = field(
        default_factory=dict, repr=False
    )  # by window sizes and scaling

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
        given = {
            name: value for name, value in named_arguments(self.signature, bound).items() if value is not None
        }
        if set(given) != set(self.names):
            raise TypeError(
                f"the sub-model was traced with the inputs {', '.join(self.names)} but called with "
                f"{', '.join(given) or 'none'}; call it with the same ones, or trace the model with these"
            )
        flat, spec = pytree.tree_flatten(tuple(given[name] for name in self.names))
        if spec != self.spec:
            raise TypeError("the sub-model was called with inputs nested otherwise than the traced ones")
        return flat


def named_arguments(signature: inspect.Signature, bound: Mapping[str, Any]) -> dict[str, Any]:
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
