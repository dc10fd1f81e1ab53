"""Sizes that depend on data: measured on the example, so that rules can follow what has them.

How many positions a mask picks, or how many tokens an expert gets, `torch.export` leaves open. The axes of such sizes
are never narrowed; but what stands beside them (the features of the tokens picked) may be, and for that the rules
need every tensor's sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from msfusion.width.execute import call_operator, execute
from msfusion.width.graph import Graph, Program


def measure(program: Program, graph: Graph) -> None:
    """Note in a graph's symbols the sizes that the example gives them, where they depend on its data."""
    if not any(_open_sizes(node) for node in graph.graph.nodes):
        return
    tensors = program.tensors()

    def measured(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = call_operator(node, args, kwargs)
        for size, real in zip(_sizes(node.meta.get("val")), _sizes(value), strict=False):
            if depends_on_data(size) and size.node.expr.is_symbol:
                size.node.shape_env.set_real_tensor_prop_unbacked_vals(size.node.expr, int(real))
        return value

    def copied(value: Any) -> Any:
        """The graph may write into what it reads."""
        return value.detach().clone() if isinstance(value, Tensor) else value

    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            inputs = [copied(value) for value in program.call.example]
            execute(graph.graph, inputs, lambda name: copied(tensors.get(name)), measured)
    except Exception:
        return  # what was not measured stays unknown: the rules freeze what it touches
    finally:
        torch.set_rng_state(state)


def _open_sizes(node: fx.Node) -> bool:
    return any(map(depends_on_data, _sizes(node.meta.get("val"))))


def _sizes(value: Any) -> Iterator[Any]:
    """All sizes in a node's value, and the values that are sizes themselves."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield from leaf.shape
        elif isinstance(leaf, (int, torch.SymInt)):
            yield leaf


def depends_on_data(size: Any) -> bool:
    """Whether a traced size is known only once the model has run."""
    return isinstance(size, torch.SymInt) and size.node.hint is None
