"""Sub-models of equal shape run as one: what `torch.vmap` needs of a traced graph, and what forbids it.

Stacked sub-models give what each gives by itself, unless it draws random numbers, changes as it runs, or lets one
example's answer depend on the others of its mini-batch. Then stacking is refused: by what the graph says, and by a
trial on the example that was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from msfusion.errors import ConfigError
from msfusion.width.analysis import module_of

if TYPE_CHECKING:
    from msfusion.width.submodel import SubModel

_STATISTICS = {"aten::batch_norm": "training", "aten::instance_norm": "use_input_stats"}
"""Operators that collect running statistics, and the flag under which they do."""

_SWITCHES = ("p", "dropout_p", "dropout", "train", "training")
"""Arguments of a random operator: where one of them is 0 or False, nothing is drawn."""

TOLERANCE = 1e-4
"""Of the trial: rounding stays far below, a dependence on other examples far above."""


def size_of_axis(tensor: Tensor, axis: int) -> int:
    """The length of an axis (called in the graphs of sub-models: `torch.vmap` does not know aten.sym_size)."""
    return tensor.shape[axis]


def laid_out(operator: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An operator that orders memory (called in the graphs of sub-models); stacked, the order does not matter."""
    if torch._C._functorch.is_batchedtensor(tensor):
        kwargs.pop("memory_format", None)
    return operator(tensor, *args, **kwargs)


def stackable(graph: fx.Graph) -> fx.Graph:
    """The graph, changed in place, with operators that `torch.vmap` can follow where it cannot follow torch's."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.target = size_of_axis
        elif isinstance(node.target, OpOverload) and node.kwargs.get("memory_format") is not None:
            node.args, node.target = (node.target, *node.args), laid_out
    return graph


def run_stacked(model: SubModel, tensors: Mapping[str, Tensor], run: Callable[..., Any], *inputs: Any) -> Any:
    """`run(call, *inputs)` for each of several sub-models at once; `call` is the model with its own tensors.

    `tensors`, by name in the state dict (a tied one once), and the tensors in `inputs` have the sub-models on
    axis 0, and so has what comes back. `run` returns tensors. Gradients flow.
    """

    def one(own: Mapping[str, Tensor], *given: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, dict(own), args, kwargs)

        return run(call, *given)

    with sdpa_kernel(SDPBackend.MATH):  # products of matrices: the fused kernels would run one by one
        return vmap(one)(dict(tensors), *inputs)


def check_stackable(model: SubModel) -> None:
    """Raise ConfigError where sub-models like this one would not train stacked as they do one by one."""
    nodes = [node for node in model.program.graphs[True].graph.nodes if isinstance(node.target, OpOverload)]
    for reason_of in (_randomness, _statistics, _change):
        for node in nodes:
            if reason := reason_of(node):
                raise ConfigError(_sentence(f"module {module_of(node)!r} {reason}"))
    modes = model.training
    try:
        with torch.no_grad():
            _try(model.train())
    finally:
        model.train(modes)


def _randomness(node: fx.Node) -> str | None:
    """Whether an operator draws random numbers: the loop would draw others."""
    operator, given = node.target, _arguments(node)
    if torch.Tag.nondeterministic_seeded not in operator.tags:  # type: ignore[union-attr]
        return None
    if not all(given.get(name, True) for name in _SWITCHES):
        return None
    return f"draws random numbers (operation {operator}): set its probability, such as dropout, to 0"


def _statistics(node: fx.Node) -> str | None:
    """Whether an operator normalises over a mini-batch, as BatchNorm does."""
    flag = _STATISTICS.get(node.target._schema.name)  # type: ignore[union-attr]
    if flag is None or not _arguments(node).get(flag):
        return None
    return (
        f"normalises over the examples of a mini-batch (operation {node.target}): use GroupNorm or LayerNorm"
    )


def _change(node: fx.Node) -> str | None:
    """Whether an operator changes a tensor of the model."""
    if not node.target._schema.is_mutable or not node.args:  # type: ignore[union-attr]
        return None
    changed = node.args[0]
    if not isinstance(changed, fx.Node) or changed.op != "get_attr":
        return None
    return f"changes its tensor {changed.target!r} as it runs (operation {node.target})"


def _arguments(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by name, defaults included."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    known = {name: value for name, value in defaults.items() if value is not None}
    return {**known, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _try(model: SubModel) -> None:
    """Run two copies stacked, and one example beside others. Raises ConfigError where the answers differ."""
    args, kwargs = model.program.args, model.program.kwargs
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), (args, kwargs))
    expected = _answers(model, args, kwargs)
    parameters, buffers = stack_module_state([model, model])
    names = model.state_dict().keys()
    own = {name: tensor for name, tensor in {**parameters, **buffers}.items() if name in names}
    twice = pytree.tree_map_only(Tensor, lambda tensor: torch.stack([tensor, tensor]), (args, kwargs))
    try:
        found = run_stacked(model, own, lambda call, given: _answers(call, *given), twice)
    except Exception as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(_sentence(f"torch.vmap cannot run its sub-models ({cause})")) from error
    if not all(_alike(each[0], answer) for each, answer in zip(found, expected, strict=True)):
        raise ConfigError(_sentence("its sub-models give other answers under torch.vmap"))
    replaced = pytree.tree_map_only(
        Tensor, lambda tensor: torch.cat([tensor[:-1], tensor[:1]]), (args, kwargs)
    )
    for before, after in zip(expected, _answers(model, *replaced), strict=True):
        if before.ndim and not _alike(before[:-1], after[:-1]):
            raise ConfigError(
                _sentence(
                    "its answer to an example depends on the other examples of a mini-batch, "
                    "and stacked mini-batches are filled up to one size"
                )
            )


def _answers(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All floating point tensors that a model returns."""
    leaves = pytree.tree_leaves(call(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _alike(found: Tensor, expected: Tensor) -> bool:
    scale = 1.0 if not expected.numel() else max(1.0, float(expected.abs().max()))
    return torch.allclose(found, expected, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True)


def _sentence(reason: str) -> str:
    return f"this model's participants cannot be trained together, because {reason}; or set together to 1"
