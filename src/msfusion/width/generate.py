"""A traced graph as one flat Python function, which is what a sub-model runs.

The source code of that function holds no name that came from a model: modules, parameters and inputs are numbered.
A model's names are data (a folder's `config.json` can choose them), and data must never be run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from msfusion.width.tensors import tensor_at

GRAD_MODE = "gradients"
"""Key in a node's `meta`: False where the model ran the operator under `no_grad`, True under `enable_grad`."""


@dataclass(frozen=True)
class Forward:
    """A compiled graph. `function` takes the tensors named in `reads`, in order, then the inputs."""

    function: Callable[..., Sequence[Any]]
    reads: tuple[str, ...]
    switches: bool  # whether it switches gradients off and on again

    def __call__(self, module: nn.Module, *inputs: Any) -> Sequence[Any]:
        """The flat outputs, with the tensors that a module holds under these names."""
        return self.run([tensor_at(module, name) for name in self.reads], inputs)

    def run(self, tensors: Sequence[Tensor], inputs: Sequence[Any]) -> Sequence[Any]:
        """The flat outputs, for given tensors."""
        if not self.switches:
            return self.function(*tensors, *inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # put back even where an operator fails
            return self.function(*tensors, *inputs)


def compile_graph(graph: fx.Graph) -> Forward:
    """The graph as a function of the tensors that it reads and of its inputs."""
    reads = tuple(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"))
    numbered, switches = _numbered(graph, reads)
    code = numbered.python_code(root_module="self")
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<sub-model>", "exec"), names)  # the one place: operators and numbered names only
    function = names["forward"]
    return Forward(lambda *values: function(None, *values), reads, switches)


def _numbered(graph: fx.Graph, reads: Sequence[str]) -> tuple[fx.Graph, bool]:
    """A copy in which every name is a number, with the switches of gradients written out; and whether it has any."""
    made = fx.Graph()
    tensors = {name: made.placeholder(f"tensor_{number}") for number, name in enumerate(reads)}
    copies: dict[fx.Node, fx.Node] = {}
    inputs = (node for node in graph.nodes if node.op == "placeholder")
    copies.update({node: made.placeholder(f"input_{number}") for number, node in enumerate(inputs)})
    setting: bool | None = None
    token: fx.Node | None = None
    switches = False
    for number, node in enumerate(graph.nodes):
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            copies[node] = tensors[str(node.target)]
            continue
        wanted = node.meta.get(GRAD_MODE) if node.op != "output" else None
        if wanted is not setting:
            if token is not None:
                made.call_function(restore_gradients, (token,))
            token = None if wanted is None else made.call_function(switch_gradients, (wanted,))
            setting, switches = wanted, True
        arguments = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        copies[node] = made.create_node(node.op, node.target, *arguments, name=f"value_{number}")
    return made, switches


def switch_gradients(enabled: bool) -> bool:
    """Record operators for gradients, or do not; returns what was before (called in the graphs of sub-models)."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(enabled)
    return before


def restore_gradients(before: bool) -> None:
    """Undo `switch_gradients` (called in the graphs of sub-models)."""
    torch._C._set_grad_enabled(before)
