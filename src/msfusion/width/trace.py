"""Finding the width map of a model."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from msfusion.errors import MsfusionError, UntraceableModelError
from msfusion.width import (
    rules_distance,
    rules_elementwise,
    rules_index,
    rules_linear,
    rules_norm,
    rules_shape,
)
from msfusion.width.analysis import Analysis
from msfusion.width.axes import Atom, Axes, Product, atoms_of, find, freeze, fresh, resolved, size_of
from msfusion.width.export import export_program
from msfusion.width.graph import Program
from msfusion.width.groups import Frozen, Group, Place, WidthMap
from msfusion.width.kept import kept
from msfusion.width.measure import measure
from msfusion.width.mode import warn_of_modes_by_hand, without_cache
from msfusion.width.outputs import Outputs
from msfusion.width.python_state import numbers_left_as_they_were
from msfusion.width.shared_memory import check_memory
from msfusion.width.short import short_example
from msfusion.width.tensors import left_as_it_was, state_tensors

# imported for their rules
_RULES = (rules_distance, rules_elementwise, rules_index, rules_linear, rules_norm, rules_shape)

_UNTOUCHED = "no part of the model's computation"


def trace(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any], outputs: Outputs | None = None
) -> WidthMap:
    """Find the width map of a model, prove it, and check that what will be run is what was proved.

    `example_inputs` are positional arguments (a tuple) or keyword arguments (a dict) of `model.forward`; sub-models
    take any number of examples, and any time where the model does. The model itself is only read. Its inputs, outputs
    and time are never narrowed; attention is narrowed by whole heads (key-value heads where queries share them).

    `outputs` names those of the model's outputs that count: `"logits"`, or the position in a tuple, or several of them.
    The others are dropped from what sub-models return (an output of the same kind), and so may be narrowed: an
    encoder-decoder that returns its encoder's last state beside its logits otherwise keeps that state's width.

    Raises UntraceableModelError, naming module and operation, where the model cannot be exported, where the map cannot
    be proved, or where its sub-models do not run.
    """
    from msfusion.width.check import check_runs_as_the_model
    from msfusion.width.submodel import check_narrow_shapes

    warn_of_modes_by_hand(model)
    with (
        numbers_left_as_they_were(model),
        left_as_it_was(model),
        without_cache(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what a model says of calls that are not the user's own
        try:
            program = export_program(model, example_inputs, outputs)
            check_memory(program)
            program.short = short_example(program)
            analysis = analyse(program)
            width_map = collect(program, analysis)
            width_map.prove()
            check_narrow_shapes(width_map)
            check_runs_as_the_model(width_map)
        except MsfusionError:
            raise
        except Exception as error:  # what nobody foresaw is the model's, until somebody looks at it
            cause = str(error).strip().partition("\n")[0][:300]
            raise UntraceableModelError(
                f"{type(model).__name__} cannot be traced: {type(error).__name__}: {cause}"
            ) from error
    program.kept = kept(model, program.uses)
    return width_map


def outline_of(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> str:
    """What a model computes, as text (`WidthMap.outline`). Of one that cannot be exported, its modules alone."""
    with left_as_it_was(model), without_cache(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return export_program(model, example_inputs).outline()
        except MsfusionError:
            return re.sub(r" at 0x[0-9a-f]+", "", repr(model))


def analyse(program: Program) -> Analysis:
    """Derive the axes of every tensor in both graphs of a program."""
    state: dict[str, Axes] = {}
    owners: dict[int, str] = {}
    for name, tensor in program.tensors().items():
        owner = owners.setdefault(id(tensor), name)
        state[name] = state[owner] if owner != name else _state_axes(name, tensor)
    analysis = Analysis(program, state)
    for training in (False, True):
        measure(program, program.graphs[training])
        analysis.run(program.graphs[training])
    return analysis


def _state_axes(name: str, tensor: Tensor) -> Axes:
    """One atom per axis; tensors of whole numbers (counters, masks, indices) are never narrowed."""
    reason = None if tensor.is_floating_point() or tensor.is_complex() else "a tensor of whole numbers"
    axes = [fresh(size, reason) for size in tensor.shape]
    return [type(axis)(axis.terms, frozenset({(name, d)})) for d, axis in enumerate(axes)]


def collect(program: Program, analysis: Analysis) -> WidthMap:
    """Read the groups off the analysed axes."""
    products = [product for axes in analysis.state.values() for axis in axes for product in resolved(axis)]
    contracted = analysis.contracted()
    for atom in {atom for product in products for atom in atoms_of((product,))}:
        if atom.weak:
            freeze(atom, "one value repeated")
        if find(atom) not in contracted and atom.terms is None:
            freeze(atom, _UNTOUCHED)
    _settle_units(products)
    states = {n: t for n, t in state_tensors(program.model).items() if n in program.names}
    atoms: dict[Atom, list[Place]] = {}
    frozen: list[Frozen] = []
    for name, axes in analysis.state.items():
        for axis_number, axis in enumerate(axes):
            offset = 0
            for product in resolved(axis):
                _stand(name, axis_number, offset, product, atoms, frozen)
                offset += size_of(product)
    tied = {t for t, n in Counter(id(tensor) for tensor in states.values()).items() if n > 1}
    made = analysis.origins() - {(n, a) for n, a in analysis.origins() if id(states.get(n)) in tied}
    names = _names(atoms, made)
    groups = [Group(names[atom], atom.size, tuple(places)) for atom, places in atoms.items()]
    program.analysis = analysis
    program.groups = {atom: names[atom] for atom in atoms}
    parameters = {id(p) for p in program.model.parameters()}
    first = {id(tensor): name for name, tensor in reversed(list(states.items()))}
    return WidthMap(
        groups=tuple(sorted(groups, key=lambda g: list(analysis.state).index(g.places[0].tensor))),
        shapes={name: tuple(t.shape) for name, t in states.items() if isinstance(t, Tensor)},
        parameters=tuple(name for name, tensor in states.items() if id(tensor) in parameters),
        frozen=tuple(f for f in frozen if f.tensor in states),
        aliases={name: first[id(tensor)] for name, tensor in states.items() if first[id(tensor)] != name},
        contracting=_by_every_name(analysis, states),
        constants={name: tuple(tensor.shape) for name, tensor in program.constants.items()},
        unknown=dict(analysis.unknown),
        program=program,
    )


def _by_every_name(analysis: Analysis, states: dict[str, Any]) -> frozenset[tuple[str, int]]:
    """The contracting axes, a tied tensor's under each of its names."""
    owned = {(id(states[name]), axis) for name, axis in analysis.origins() if name in states}
    return frozenset(
        (name, axis) for name, t in states.items() for axis in range(t.dim()) if (id(t), axis) in owned
    )  # fmt: skip


def _stand(
    name: str, axis: int, offset: int, product: Product, atoms: dict[Atom, list[Place]], frozen: list[Frozen]
) -> None:
    """Note which group, if any, stands at this stretch of an axis."""
    repeat = 1
    for position, atom in enumerate(product):
        if atom.frozen is None:
            thickness = size_of(product[position + 1 :])
            atoms.setdefault(atom, []).append(Place(name, axis, offset, atom.size, thickness, repeat))
            return
        repeat *= atom.size
    reason = next((atom.frozen for atom in product if atom.frozen), "a single index, with nothing to narrow")
    frozen.append(Frozen(name, axis, offset, size_of(product), reason))


def _settle_units(products: list[Product]) -> None:
    """In a product of free atoms only one can be a group; the ones inside it are its unit."""
    for product in products:
        for atom in product:
            if atom.terms is not None:
                freeze(atom, "joined to others inside a unit")
    while pairs := set(_free_pairs(products)):
        inner = {b for _, b in pairs}
        clear = sorted((b for a, b in pairs if a not in inner), key=lambda atom: atom.size)
        # where each of two stands inside the other (channels shuffled between groups), the smaller gives way
        for atom in clear or [min(inner, key=lambda atom: atom.size)]:
            freeze(atom, "inside the units of another group (a head dimension, a position in space)")


def _free_pairs(products: list[Product]) -> Iterator[tuple[Atom, Atom]]:
    for product in products:
        free = [atom for atom in product if atom.frozen is None]
        for inner in free[1:]:
            yield free[0], inner


def _names(atoms: dict[Atom, list[Place]], contracting: frozenset[tuple[str, int]]) -> dict[Atom, str]:
    """Each group is named after the first tensor that produces its units (a tied embedding does)."""
    names: dict[Atom, str] = {}
    for atom, places in atoms.items():
        made = [p for p in places if (p.tensor, p.axis) not in contracting] or places
        stem = made[0].tensor.removesuffix(".weight").removesuffix(".bias")
        name, number = stem, 2
        while name in names.values():
            name, number = f"{stem}:{number}", number + 1
        names[atom] = name
    return names


__all__ = ["analyse", "collect", "trace"]
