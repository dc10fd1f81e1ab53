"""A model that says nothing until it is trained: the few tensors that make its logits are set to zero, the rest stays.

Which tensors these are is read from the traced graph, from the logits backwards: of a linear layer its weight and bias.
Where that weight has another use (a matrix that also embeds tokens), what goes into the layer is silenced instead: the
scale and shift of the normalisation before it. Either way the tensors have a gradient from the first step on. Names of
modules play no part.

But a scale of zero holds back the matrix behind it, which gets no gradient before the scale has grown, a learning rate
at a time. So when the training of such a block begins it is not silent but quiet: the scale is as large as its logits
let it be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from msfusion.errors import ConfigError
from msfusion.federated.states import loaded
from msfusion.objectives import logits_of
from msfusion.width.graph import Program
from msfusion.width.groups import State
from msfusion.width.submodel import SubModel

_SAME = {
    "alias", "clone", "contiguous", "detach", "dropout", "expand", "flatten", "gather", "index_select", "permute",
    "reshape", "select", "slice", "squeeze", "t", "to", "transpose", "unflatten", "unsqueeze", "view", "_to_copy",
    "_unsafe_view", "div", "gelu", "mean", "neg", "silu", "sum", "tanh",
}  # fmt: skip
"""Operators that make zero of zero in their first argument, and let gradients through it (so not relu)."""

_PRODUCTS = {
    "addmm", "baddbmm", "bmm", "linear", "matmul", "mm", "mul", "convolution", "conv1d", "conv2d", "conv3d",
}  # fmt: skip
_NORMS: Mapping[str, tuple[int, int | None]] = {
    "layer_norm": (2, 3),
    "group_norm": (2, 3),
    "rms_norm": (2, None),
    "batch_norm": (1, 2),
}
"""Where their scale and shift stand among the arguments."""


def silenced(model: SubModel, state: State, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """A state with which the model's logits are zero for every example; `aliases` as in a width map.

    Raises ConfigError where no tensors are found that do nothing but make the logits.
    """
    names = _Search(model.program, aliases).silencing()
    quiet = {
        name: torch.zeros_like(tensor) if aliases.get(name, name) in names else tensor
        for name, tensor in state.items()
    }
    if not names or _says_something(model, quiet):
        raise ConfigError(
            "method.start = 'blocks' needs a model whose logits are made by tensors with no other use, such as a last "
            "linear layer, so that a new block can begin without a say: use method.start = 'copies'"
        )
    return quiet


def makers_of_logits(program: Program, aliases: Mapping[str, str]) -> frozenset[str]:
    """The tensors, by their first names, that make a traced model's logits and do nothing else; empty without such."""
    return _Search(program, aliases).silencing()


QUIET = 0.1
"""How far the logits of a quiet model are from each other, in nats: it changes a probability by a tenth."""


def awake(model: SubModel, start: State, silent: State) -> dict[str, Tensor]:
    """The state in which the training of a model begins that was `start` before it was `silenced`.

    That is the silent one where a matrix was set to zero. Where just scales and shifts were they come back, smaller if
    the logits of the example that was traced would be further apart than `QUIET`.
    """
    zero = [name for name, tensor in silent.items() if not torch.equal(tensor, start[name])]
    if any(start[name].ndim > 1 for name in zero):
        return {**silent}
    apart = float(example_logits(model, start).std(-1).mean())
    share = min(1.0, QUIET / apart) if apart > 0 else 1.0
    return {name: tensor * share if name in zero else tensor for name, tensor in start.items()}


def _says_something(model: SubModel, state: State) -> bool:
    """Whether the logits of the example that was traced are anything but zero."""
    return bool(example_logits(model, state).ne(0).any())


def example_logits(model: SubModel, state: State) -> Tensor:
    """What a model with this state says of the example that was traced: in evaluation mode, without gradients."""
    loaded(model, state).eval()
    with torch.no_grad():
        return logits_of(model(*model.program.args, **model.program.kwargs))


class _Search:
    """For every node of the graph the fewest tensors that make it zero, where there are any."""

    def __init__(self, program: Program, aliases: Mapping[str, str]) -> None:
        self._graph, self._aliases = program.graphs[False], aliases
        self._uses: dict[str, int] = {}
        for node in self._graph.graph.nodes:
            if node.op == "get_attr":
                name = self._first(node)
                self._uses[name] = self._uses.get(name, 0) + len(node.users)
        self._trained = {
            aliases.get(name, name) for name, _ in program.model.named_parameters(remove_duplicate=False)
        }

    def silencing(self) -> frozenset[str]:
        """The tensors, by their first names, that make the logits; empty where there are none."""
        logits = next((each for each in self._graph.outputs if isinstance(each, fx.Node)), None)
        return self._zero(logits) or frozenset()

    def _first(self, node: fx.Node) -> str:
        return self._aliases.get(str(node.target), str(node.target))

    def _zero(self, node: Any) -> frozenset[str] | None:
        """The tensors that make a node zero; None where there are none, or it is none of ours."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            name = self._first(node)
            return frozenset([name]) if self._uses[name] == 1 and name in self._trained else None
        kind = _kind(node)
        if kind in _SAME:
            return self._zero(node.args[0])
        if kind in ("add", "sub"):
            return self._all(node.args[:2])
        if kind in _NORMS:
            return self._all([_argument(node, at) for at in _NORMS[kind] if at is not None], optional=1)
        if kind in _PRODUCTS:
            return self._product(kind, node)
        return None

    def _product(self, kind: str, node: fx.Node) -> frozenset[str] | None:
        """One of the two factors, the weight if possible, and what is added."""
        if kind in ("addmm", "baddbmm"):
            added, first, second = node.args[:3]
        else:
            first, second = node.args[:2]
            added = None if kind in ("bmm", "matmul", "mm", "mul") else _argument(node, 2)
        factor = self._zero(second)
        if factor is None:
            factor = self._zero(first)
        if added is None or factor is None:
            return factor
        bias = self._zero(added)
        return None if bias is None else factor | bias

    def _all(self, parts: Any, optional: int | None = None) -> frozenset[str] | None:
        """Everything that makes all of the parts zero; from `optional` on a part may be missing."""
        found: frozenset[str] = frozenset()
        for place, each in enumerate(parts):
            if each is None and optional is not None and place >= optional:
                continue
            names = self._zero(each)
            if names is None:
                return None
            found |= names
        return found


def _kind(node: fx.Node) -> str:
    """An operator's name without its namespace, overload and the underscore of an in-place one."""
    schema = getattr(node.target, "_schema", None)
    name = "" if schema is None else schema.name.partition("::")[2]
    return name if name.startswith("_") else name.removesuffix("_")


def _argument(node: fx.Node, place: int) -> Any:
    """A positional argument, given by position or by name; None where it is left out."""
    if place < len(node.args):
        return node.args[place]
    schema: Any = node.target._schema  # type: ignore[union-attr]
    return node.kwargs.get(schema.arguments[place].name)
