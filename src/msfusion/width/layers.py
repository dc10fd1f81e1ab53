"""A model that runs layer by layer, with each tensor read when an operator needs it and dropped afterwards.

So nobody has to hold the whole model at any time: only the graph, one layer, and what is between two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from msfusion.width.execute import Call, call_operator, execute_together
from msfusion.width.graph import Program
from msfusion.width.submodel import resized

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""What a model is called with: positional arguments, and those with names."""


class LayerByLayer:
    """A traced model in evaluation mode. `read` gives a tensor of its state dict by name.

    Several calls go through a layer together, so it is read once for all of them.
    """

    def __init__(self, program: Program, read: Callable[[str], Tensor], call: Call = call_operator) -> None:
        self._program, self._read, self._call = program, read, call
        self._graph, _ = resized(program, False)
        own = dict(program.model.named_buffers())
        self._constants = {name: own.get(name, tensor) for name, tensor in program.constants.items()}
        uses = (source for node in self._graph.nodes for source in node.all_input_nodes)
        names = (str(source.target) for source in uses if source.op == "get_attr")
        self._reads = [name for name in names if name not in self._constants]

    def answers(self, calls: Sequence[Arguments]) -> list[Any]:
        """What the model returns for each call.

        The same is read in the same order whatever the calls, also where there are none, or one of them fails.
        """
        done = 0

        def read(name: str) -> Tensor:
            nonlocal done
            if name in self._constants:
                return self._constants[name]
            done += 1
            return self._read(name)

        try:
            return self._answers(calls, read)
        except Exception:
            for name in self._reads[done:]:
                self._read(name)
            raise

    def _answers(self, calls: Sequence[Arguments], read: Callable[[str], Tensor]) -> list[Any]:
        graph = self._program.graphs[False]
        flat = [self._program.call.flatten(args, kwargs) for args, kwargs in calls]
        for tensors in flat:
            graph.sizes.check(tensors, self._program.model)
        made = execute_together(self._graph, flat, read, self._call)
        return [graph.packed(outputs) for outputs in made]
