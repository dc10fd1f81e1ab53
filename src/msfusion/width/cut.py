"""Cutting a model in two at a named module: a client part with the first layers, a server part with the rest.

The server part is what follows from the named module's output; the client part is everything else that depends on
the inputs. So whatever the later layers need besides (the branch of a skip connection that begins before
the cut, an attention mask) is computed by the client and crosses too, and the inputs themselves stay where they
are. What depends on no input (position numbers, a causal mask) is computed where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from msfusion.errors import CutError
from msfusion.width.generate import Forward, compile_graph
from msfusion.width.graph import Graph, Program, name_of
from msfusion.width.groups import WidthMap
from msfusion.width.halves import Crossing, Halves, check_crossing
from msfusion.width.mode import mode
from msfusion.width.outputs import selected
from msfusion.width.submodel import copy_tensors, resized, traced_from
from msfusion.width.tensors import place_tensor, state_tensors


class ClientPart(nn.Module):
    """The first layers. It is called as the model is and returns the tensors that cross, in order."""

    def __init__(self, program: Program, forwards: Mapping[bool, Forward]) -> None:
        super().__init__()
        self._program, self._forwards = program, forwards

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """What crosses to the server part. TypeError where the call does not fit the traced one."""
        return tuple(self._forwards[self.training](self, *self._program.inputs(self, args, kwargs)))


class ServerPart(nn.Module):
    """The rest. It is called with the tensors that cross and returns what the model returns."""

    def __init__(
        self,
        specs: Mapping[bool, pytree.TreeSpec],
        forwards: Mapping[bool, Forward],
        crossing: Mapping[bool, tuple[Crossing, ...]],
    ) -> None:
        super().__init__()
        self._specs, self._forwards, self._crossing = specs, forwards, crossing

    def forward(self, *crossing: Tensor) -> Any:
        """The model's output, from what crossed. TypeError where that is not what the client part gives."""
        check_crossing(crossing, self._crossing[self.training])
        spec = self._specs[self.training]
        outputs = self._forwards[self.training](self, *crossing)
        return outputs[0] if spec.is_leaf() else pytree.tree_unflatten(list(outputs), spec)


@dataclass(frozen=True)
class Cut:
    """A model in two parts. Their `state_dict()`s have the model's names and together all of them."""

    client: ClientPart
    server: ServerPart
    crossing: tuple[Crossing, ...]

    def copy_of_client(self) -> ClientPart:
        """A client part with tensors of its own; the traced program is shared."""
        copy = ClientPart(self.client._program, self.client._forwards)
        copy_tensors(self.client, copy)
        return copy

    def copy_of_server(self) -> ServerPart:
        """A server part with tensors of its own; the compiled program is shared."""
        copy = ServerPart(self.server._specs, self.server._forwards, self.server._crossing)
        copy_tensors(self.server, copy)
        return copy

    def join(self) -> dict[str, Tensor]:
        """The state dict of the whole model."""
        return {**self.client.state_dict(), **self.server.state_dict()}

    def sample(self, examples: int) -> tuple[tuple[Tensor, ...], Any]:
        """What crosses for so many examples (those of tracing, repeated), and what the model returns for them."""
        program = self.client._program

        def repeated(value: Any) -> Any:
            return (
                value[torch.arange(examples) % len(value)]
                if isinstance(value, Tensor) and value.dim()
                else value
            )

        args, kwargs = pytree.tree_map(repeated, (program.args, program.kwargs))
        parts = nn.ModuleList([self.client, self.server])
        with torch.no_grad(), mode(parts, False):
            crossing = self.client(*args, **kwargs)
            return crossing, self.server(*crossing)

    def outline(self) -> str:
        """What the model computes in training and the tensors that it holds, as text: equal for equal models."""
        graph = self.client._program.graphs[True].graph
        operators = [
            f"{name_of(node.target)}{fx.map_arg((node.args, node.kwargs), lambda _: '_')}"
            for node in graph.nodes
            if node.op == "call_function"
        ]
        tensors = [f"{name}: {tensor.dtype}{list(tensor.shape)}" for name, tensor in self.join().items()]
        return "\n".join([*operators, *sorted(tensors)])


def cut(model: nn.Module, width_map: WidthMap, at: str) -> Cut:
    """Cut a traced model after the module named `at`; tensors are copied, not shared.

    Raises CutError where there is no such module, nothing would be left on one side, a parameter is needed on
    both sides, an input of floating point numbers would have to cross, or the parts do not give what the
    model gives.
    """
    program, _ = traced_from(model, width_map)
    halves = {training: Halves(_plain(program, training), at, program) for training in (True, False)}
    crossing = halves[True].crossing
    if [each.dtype for each in crossing] != [each.dtype for each in halves[False].crossing]:
        raise CutError(
            f"the model cannot be cut at '{at}': in training other tensors cross than in evaluation"
        )
    client = ClientPart(program, {key: compile_graph(half.client) for key, half in halves.items()})
    specs = {key: program.graphs[key].out_spec for key in halves}
    server = ServerPart(
        specs,
        {key: compile_graph(half.server) for key, half in halves.items()},
        {key: half.crossing for key, half in halves.items()},
    )
    _share_out(model, width_map, program, client, server, halves.values(), at)
    result = Cut(client.train(model.training), server.train(model.training), crossing)
    _check(result, model, program, at)
    return result


def _plain(program: Program, training: bool) -> Graph:
    """The graph of a mode at full width, good for any number of examples."""
    traced = program.graphs[training]
    graph, copies = resized(program, training)
    return Graph(graph, [copies[node] for node in traced.inputs], traced.out_spec, traced.sizes)


def _share_out(
    model: nn.Module,
    width_map: WidthMap,
    program: Program,
    client: ClientPart,
    server: ServerPart,
    halves: Iterable[Halves],
    at: str,
) -> None:
    """Give each part copies of the tensors that it reads, under the model's names."""
    read: dict[str, set[str]] = {"client": set(), "server": set()}
    for half in halves:
        read["client"].update(str(n.target) for n in half.client.nodes if n.op == "get_attr")
        read["server"].update(str(n.target) for n in half.server.nodes if n.op == "get_attr")
    states = state_tensors(model)
    made: dict[tuple[str, str], Tensor] = {}
    for name, tensor in states.items():
        first = width_map.aliases.get(name, name)
        sides = [part for part, names in read.items() if first in names] or [_nearest(first, read)]
        if len(sides) == 2 and tensor.requires_grad:
            raise CutError(
                f"the model cannot be cut at '{at}': both sides need the parameter '{name}'; "
                "untie it, or cut elsewhere"
            )
        for side in sides:
            if (side, first) not in made:
                value = tensor.detach().clone()
                trained = isinstance(tensor, nn.Parameter)
                made[side, first] = nn.Parameter(value, tensor.requires_grad) if trained else value
            place_tensor(client if side == "client" else server, name, made[side, first], True)
    own = dict(model.named_buffers())
    for name, constant in program.constants.items():
        for part, names in ((client, read["client"]), (server, read["server"])):
            if name in names:
                place_tensor(part, name, own.get(name, constant).detach().clone(), False)


def _nearest(name: str, read: Mapping[str, set[str]]) -> str:
    """The side of a tensor that no graph reads: that of its module, or of the module around it."""
    path = name.rpartition(".")[0]
    while path:
        for side, names in read.items():
            if any(other.startswith(f"{path}.") for other in names):
                return side
        path = path.rpartition(".")[0]
    return "server"


def _check(result: Cut, model: nn.Module, program: Program, at: str) -> None:
    """CutError unless the parts give, one after the other, what the model gives (up to rounding)."""
    parts = nn.ModuleList([result.client, result.server])
    with torch.no_grad(), mode(model, False), mode(parts, False):
        answer = model(*program.args, **program.kwargs)
        expected = pytree.tree_leaves(selected(answer, program.outputs, model))
        found = pytree.tree_leaves(result.server(*result.client(*program.args, **program.kwargs)))
    for wanted, given in zip(expected, found, strict=True):
        if isinstance(wanted, Tensor) and not torch.allclose(wanted, given, rtol=1e-5, atol=1e-6):
            raise CutError(f"the model cannot be cut at '{at}': its parts do not give what it gives")
