"""How an axis of a source's tensor grows into the target's: which stretches of it lie in which index space.

An *index space* is what one matrix of the operator maps. It is finer than a width group where units are thick: queries,
keys and values are all indexed by heads, but their rows within a head are not the same, and LiGO gives each its own
matrix. The traced axes tell which are alike: values and the input of the output projection share the atoms of their
unit, queries and keys are only multiplied with each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx
from torch._ops import OpOverload

from msfusion.errors import GrowthError
from msfusion.width.analysis import Analysis, arguments, operator_name
from msfusion.width.axes import Atom, Product, find, resolved, size_of
from msfusion.width.groups import WidthMap
from msfusion.width.memo import once_per_map

Role = Literal["produce", "contract", "scale", "shift"]
"""What a tensor does along an axis of an index space: it writes it (weights, biases, embeddings), sums over it, or
multiplies or shifts what stands there (a norm's weight and bias)."""

_MULTIPLIED = "a head dimension"  # the reason for which such an axis is frozen contains this
_IN_PASSING = {
    "to", "_to_copy", "type_as", "view", "reshape", "expand", "unsqueeze", "squeeze", "slice", "select", "t",
    "transpose", "permute", "clone", "detach", "alias", "contiguous",
}  # fmt: skip
_NORMS = {"layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm", "group_norm", "batch_norm"}


@dataclass(frozen=True)
class Stretch:
    """A stretch of an axis: `repeat` blocks of one index space, or (`key` is None) indices that are kept.

    `sizes` are the factors of the index space, outermost first: (heads, head_dim), or (key-value heads, queries per
    key-value head, head_dim). `multiplied`: its innermost factor belongs to an attention head.
    """

    length: int
    key: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()
    repeat: int = 1
    multiplied: bool = False


def stretches(width_map: WidthMap, tensor: str, axis: int) -> list[Stretch]:
    """The stretches of an axis of a traced model's tensor, neighbours joined where nothing tells them apart."""
    found: list[Stretch] = []
    for product in resolved(analysis_of(width_map).state[tensor][axis]):
        stretch = _stretch(product)
        bare = stretch.multiplied and len(stretch.sizes) == 1
        if found and stretch.key is None and found[-1].key is None:
            found[-1] = Stretch(found[-1].length + stretch.length)
        elif found and bare and found[-1].multiplied and len(found[-1].sizes) == 1 and found[-1].key:
            length = found[-1].length + stretch.length  # the halves of a head that positions rotate
            found[-1] = replace(
                found[-1], length=length, key=found[-1].key + (stretch.key or ()), sizes=(length,)
            )
        else:
            found.append(stretch)
    return found


def analysis_of(width_map: WidthMap) -> Analysis:
    """The axes behind a width map. GrowthError where it was not traced."""
    if width_map.program is None or width_map.program.analysis is None:
        raise GrowthError("only traced width maps tell how a model grows; make them with msfusion.trace")
    return width_map.program.analysis


def _stretch(product: Product) -> Stretch:
    atoms = [find(atom) for atom in product]
    length = size_of(product)
    key = tuple(id(atom) for atom in atoms)
    for position, atom in enumerate(atoms):
        if atom.frozen is None:
            sizes = tuple(a.size for a in atoms[position:])
            return Stretch(length, key, sizes, size_of(product[:position]), len(sizes) > 1)
    if atoms and all(_MULTIPLIED in (reason or "") for atom in atoms for reason in _reasons(atom)):
        return Stretch(length, key, tuple(a.size for a in atoms), multiplied=True)
    return Stretch(length)


def _reasons(atom: Atom) -> Iterator[str | None]:
    """Why an atom is frozen; where it is a sum (a rotated head's halves), why its parts are."""
    if atom.terms is None:
        yield atom.frozen
    for term in atom.terms or ():
        for part in term:
            yield from _reasons(find(part))


def role(width_map: WidthMap, tensor: str, axis: int) -> Role:
    """What a tensor does along one of its axes. A tied embedding writes its features, although it also reads them."""
    uses = readers(width_map)[width_map.aliases.get(tensor, tensor)]
    operators = {operator for operator, _ in uses}
    if (tensor, axis) in width_map.contracting and "embedding" not in operators:
        return "contract"
    if operators & {"mul", "mul_"} or any(o in _NORMS and argument == "weight" for o, argument in uses):
        return "scale"
    if any(o in _NORMS and argument == "bias" for o, argument in uses):
        return "shift"
    return "produce"


@once_per_map
def readers(width_map: WidthMap) -> dict[str, list[tuple[str, str]]]:
    """For each tensor (by its first name) the operators that read it, each with the argument that it is there."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in width_map.shapes}
    for node in analysis_of(width_map).program.graphs[False].graph.nodes:
        if node.op == "get_attr" and node.target in width_map.shapes:
            name = str(node.target)
            found[width_map.aliases.get(name, name)] += _readers(node)
    return found


def _readers(node: fx.Node) -> Iterator[tuple[str, str]]:
    for user in node.users:
        if not isinstance(user.target, OpOverload):
            continue
        name = operator_name(user)
        if name in _IN_PASSING:
            yield from _readers(user)
        else:
            yield name, next((a for a, value in arguments(user).items() if value is node), "")
