"""Walking a traced graph: every operator's rule says how the axes of its inputs and outputs hang together.

A rule is a function of (analysis, node) that unites, splits and freezes axes and returns those of the output. The
rules stand in `rules_*.py`, by the operator's name in aten. An operator without a rule freezes whatever it touches:
that is safe, never wrong, and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from msfusion.width.axes import Axes, Axis, atoms_of, find, freeze, fresh, is_frozen, unify
from msfusion.width.graph import Graph, Program

if TYPE_CHECKING:
    from msfusion.width.own_scale import Folding

Outcome = Axes | list[Axes] | None
Rule = Callable[["Analysis", fx.Node], Outcome]

RULES: dict[str, Rule] = {}

_EMPTY_WELCOME = {"slice", "narrow", "split", "split_with_sizes", "cat", "embedding_bag"}
"""Operators whose rules know that a tensor may have no entries (what is left of a head that is rotated whole)."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by their aten names (all overloads; `add` serves `add_` too)."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


@dataclass(frozen=True)
class Contraction:
    """A sum over `axis`: `operand` is multiplied by (K/w)**power along `dimension` in a narrow model.

    `factors` are what is multiplied before it is summed, `operand` among them, each with the axis that is summed over.
    """

    operand: fx.Node
    dimension: int
    axis: Axis
    power: float = 1.0
    factors: tuple[tuple[fx.Node, int], ...] = ()


@dataclass
class Analysis:
    """The axes of every tensor in the traced graphs, and what the sub-models need to know about the operators."""

    program: Program
    state: dict[str, Axes]  # the axes of the model's own tensors
    values: dict[fx.Node, Outcome] = field(default_factory=dict)
    contractions: dict[fx.Node, list[Contraction]] = field(default_factory=dict)
    pieces: dict[fx.Node, list[Axis]] = field(
        default_factory=dict
    )  # slices: the axis before, inside and after
    counted: dict[fx.Node, Axis] = field(
        default_factory=dict
    )  # group_norm and convolutions: the axis of groups
    bounded: dict[fx.Node, list[Contraction]] = field(
        default_factory=dict
    )  # renorm: the axes over which the norm that is bounded is taken
    dependent: set[fx.Node] = field(default_factory=set)  # nodes whose value depends on the model's inputs
    unknown: dict[str, str] = field(
        default_factory=dict
    )  # operators that no rule could follow, and the first module they stood in
    touched: list[Axis] = field(default_factory=list)
    folding: Folding | None = None  # which parameters can hold the factors of sums, once it is asked for

    # -- what rules ask -----------------------------------------------------------------------------------------

    def axes(self, node: Any) -> Axes:
        """The axes of a tensor argument."""
        value = self.values[node]
        assert value is not None
        return value  # type: ignore[return-value]

    def shape(self, node: fx.Node) -> list[int]:
        """The output's sizes in the example."""
        return shape_of(node.meta["val"])

    def argument(self, node: fx.Node, name: str, default: Any = None) -> Any:
        """An argument of the operator by its name in the schema."""
        return arguments(node).get(name, default)

    def frozen(self, node: fx.Node, reason: str) -> Outcome:
        """Fresh frozen axes for all outputs."""
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return [fresh(size, reason) for size in shape_of(value)]
        if isinstance(value, (tuple, list)):
            return [[fresh(s, reason) for s in shape_of(v)] if isinstance(v, Tensor) else [] for v in value]
        return None

    # -- what rules do ------------------------------------------------------------------------------------------

    def broadcast(self, shapes: Sequence[Axes]) -> Axes:
        """Unite the axes of tensors that are combined element by element; returns the result's."""
        result: Axes = []
        for position in range(1, max(map(len, shapes), default=0) + 1):
            aligned = [axes[-position] for axes in shapes if len(axes) >= position]
            wide = [axis for axis in aligned if axis.size != 1] or aligned[:1]
            for other in wide[1:]:
                unify(wide[0], other)
            result.append(Axis(wide[0].terms))
        return result[::-1]

    def contract(
        self,
        node: fx.Node,
        operand: fx.Node,
        dimension: int,
        *others: tuple[fx.Node, int],
        power: float = 1.0,
    ) -> None:
        """Note that the operator sums over an axis of `operand`, multiplied with the others' (united already)."""
        factors = [(operand, dimension), *others]
        axes = [self.axes(factor)[d] for factor, d in factors]
        self.touched += axes
        if any(operator_name_of(_origin(factor)) == "eye" for factor, _ in factors):
            power = 0.0  # of the sum over a row of the identity one term is left, however wide it is
        self.contractions.setdefault(node, []).append(
            Contraction(
                operand,
                dimension % len(self.axes(operand)),
                axes[0],
                power,
                tuple((factor, d % len(self.axes(factor))) for factor, d in factors),
            )
        )
        activations = len(factors) > 1 and all(factor in self.dependent for factor, _ in factors)
        if activations and len({_origin(factor) for factor, _ in factors}) == len(factors):
            freeze(axes[0], "summed over in the product of two activations (a head dimension)")
        if len({factor for factor, _ in factors}) < len(factors):
            freeze(axes[0], "summed over in the product of a tensor with itself")

    # -- the walk -----------------------------------------------------------------------------------------------

    def run(self, graph: Graph) -> None:
        """Derive the axes of every node of one graph."""
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.dependent.add(node)
                self.values[node] = self.frozen(node, "an axis of the model's input")
            elif node.op == "get_attr":
                self.values[node] = self.state.get(node.target)
            elif node.op == "call_function":
                if any(source in self.dependent for source in node.all_input_nodes):
                    self.dependent.add(node)
                self.values[node] = self._apply(node)
        for output in graph.outputs:
            if isinstance(output, fx.Node) and self.values.get(output):
                for axis in self.axes(output):
                    freeze(axis, "an axis of the model's output")

    def _apply(self, node: fx.Node) -> Outcome:
        if not isinstance(node.target, OpOverload):
            return self._python_operator(node)
        name = base_name(node.target)
        if name.startswith("sym_") or not (
            has_tensor(node.meta.get("val")) or any(map(self.values.get, node.all_input_nodes))
        ):
            return None
        sizes = [size for n in (node, *node.all_input_nodes) for size in sizes_of(n.meta.get("val"))]
        if any(size < 0 or (size == 0 and name not in _EMPTY_WELCOME) for size in sizes):
            return self._give_up(node, name)  # empty, or of a size that depends on the data
        function = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if function is None and is_pointwise(node.target):
            function = RULES["pointwise"]
        try:
            outcome = function(self, node) if function else None
        except (
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            ValueError,
        ):  # a call the rule does not foresee
            outcome = None
        return outcome if self._fits(node, outcome) else self._give_up(node, name)

    def _python_operator(self, node: fx.Node) -> Outcome:
        name = str(getattr(node.target, "__name__", node.target))
        if name == "getitem":
            value = self.values.get(node.args[0])  # type: ignore[arg-type]
            return value[node.args[1]] if value else None  # type: ignore[index,return-value]
        return self._give_up(node, name) if any(map(self.values.get, node.all_input_nodes)) else None

    def _give_up(self, node: fx.Node, name: str) -> Outcome:
        known = name in RULES or name.removesuffix("_") in RULES
        reason = f"operator {name} {'is called as its rule does not foresee' if known else 'has no rule'}"
        self.unknown.setdefault(name, module_of(node))
        for source in node.all_input_nodes:
            self._freeze_value(source, reason)
        return self.frozen(node, reason)

    def _freeze_value(self, node: fx.Node, reason: str) -> None:
        value = self.values.get(node)
        for entry in value or []:
            for axis in entry if isinstance(entry, list) else [entry]:
                freeze(axis, reason)

    def _fits(self, node: fx.Node, outcome: Outcome) -> bool:
        """Whether a rule's outcome has the sizes that the operator really gave."""
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return isinstance(outcome, list) and [getattr(a, "size", None) for a in outcome] == shape_of(
                value
            )
        if isinstance(value, (tuple, list)):
            expected = [shape_of(v) if isinstance(v, Tensor) else [] for v in value]
            return isinstance(outcome, list) and [[a.size for a in axes] for axes in outcome] == expected  # type: ignore[union-attr]
        return True

    def contracted(self) -> set[Any]:
        """The atoms over which some operator sums."""
        return {find(atom) for axis in self.touched for atom in atoms_of(axis.terms)}

    def origins(self) -> frozenset[tuple[str, int]]:
        """The (tensor, axis) pairs of the state over which a linear map sums."""
        return frozenset(pair for axis in self.touched for pair in axis.origin)


_SAME_VALUES = {
    "permute", "transpose", "t", "numpy_T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims", "contiguous", "clone",
    "to", "_to_copy", "type_as",
}  # fmt: skip


def _origin(node: fx.Node) -> fx.Node:
    """The node of which this one has the values: its axes in another order, a copy, a cast."""
    while operator_name_of(node) in _SAME_VALUES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def operator_name_of(node: fx.Node) -> str:
    """The name of the aten operator that a node calls; empty where it calls none."""
    return operator_name(node) if isinstance(node.target, OpOverload) else ""


def shape_of(value: Tensor) -> list[int]:
    """The sizes of a traced tensor, in the example."""
    return [size if isinstance(size, int) else hint(size) for size in value.shape]


def sizes_of(value: Any) -> list[int]:
    """All sizes of all tensors in a node's value."""
    if isinstance(value, (tuple, list)):
        return [size for entry in value for size in sizes_of(entry)]
    return shape_of(value) if isinstance(value, Tensor) else []


def hint(size: Any) -> int:
    """The example's value of a symbolic size; -1 where it depends on data and was not measured."""
    known = getattr(size.node, "hint", None)
    if known is not None:
        return int(known)
    environment = size.node.shape_env
    value = size.node.expr.xreplace(environment.backed_var_to_val)
    value = value.xreplace(environment.real_tensor_prop_unbacked_vals)
    return int(value) if value.is_number else -1


def base_name(target: OpOverload) -> str:
    """An operator's name without name space and overload: `add_` for aten::add_.Tensor."""
    return target._schema.name.partition("::")[2]


def operator_name(node: fx.Node) -> str:
    """The name of the aten operator that a node calls, without name space and overload."""
    assert isinstance(node.target, OpOverload)
    return base_name(node.target)


def overload(node: fx.Node) -> str:
    """The name of the operator's overload: `input` for aten::lstm.input."""
    assert isinstance(node.target, OpOverload)
    return node.target._overloadname


def is_pointwise(target: OpOverload) -> bool:
    """Whether the operator works element by element (its in-place variant too)."""
    if torch.Tag.pointwise in target.tags:
        return True
    functional = getattr(torch.ops.aten, base_name(target).removesuffix("_"), None)
    return functional is not None and any(
        torch.Tag.pointwise in getattr(functional, overload).tags for overload in functional.overloads()
    )


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an aten call by their names in the schema, defaults included."""
    assert isinstance(node.target, OpOverload)
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif position < len(node.args):
            values[argument.name] = node.args[position]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def has_tensor(value: Any) -> bool:
    """Whether a node's value is or contains a tensor."""
    if isinstance(value, (tuple, list)):
        return any(has_tensor(entry) for entry in value)
    return isinstance(value, Tensor)


def modules_of(node: fx.Node) -> list[str]:
    """The names of the modules in which an operator was called, from the outside inwards; without the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values() if path] if isinstance(stack, dict) else []


def module_of(node: fx.Node) -> str:
    """The name of the module in whose forward an operator was called."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values()] if isinstance(stack, dict) else []
    known = bool(names) and not names[-1].startswith("_")  # torch.export has a name of its own for none
    return names[-1] if known and names[-1] else "the model itself"


__all__ = ["RULES", "Analysis", "Axes", "Axis", "Contraction", "is_frozen", "rule"]
