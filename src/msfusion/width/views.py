"""The axes of a row-major view (reshape, flatten, unflatten) of a tensor whose axes are known."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from msfusion.width.axes import (
    Atom,
    Axes,
    Axis,
    Product,
    expand,
    factor,
    freeze,
    fresh,
    frozen_reason,
    is_frozen,
    replace,
    resolved,
    size_of,
    unify,
)


def merge(axes: Sequence[Axis]) -> tuple[Product, ...]:
    """The terms of the row-major flattening of several axes."""
    outer, *inner = axes
    rest: list[Atom] = []
    for axis in inner:
        terms = resolved(axis)
        if len(terms) == 1:
            rest.extend(terms[0])
        else:  # a sum inside a product stays one opaque factor
            composed = Atom(axis.size)
            replace(composed, terms)
            if is_frozen(axis):
                composed.frozen = frozen_reason(terms[0]) or "never narrowed"
            rest.append(composed)
    return tuple((*term, *rest) for term in resolved(outer))


def split(terms: tuple[Product, ...], sizes: Sequence[int]) -> list[Axis] | None:
    """The axes of sizes `sizes` whose row-major flattening is `terms`; None where a unit is torn."""
    terms = tuple(t for term in terms for t in expand(term))
    if len(terms) == 1:
        parts = factor(terms[0], sizes)
        return None if parts is None else [Axis((part,)) for part in parts]
    inner = prod(sizes[1:])
    outer: list[Product] = []
    common: list[Axis] | None = None
    for term in terms:
        if size_of(term) % inner:
            return None
        parts = factor(term, [size_of(term) // inner, *sizes[1:]])
        if parts is None:
            return None
        outer.append(parts[0])
        tail = [Axis((part,)) for part in parts[1:]]
        for ours, theirs in zip(common or tail, tail, strict=True):
            unify(ours, theirs)
        common = common or tail
    return [Axis(tuple(outer)), *(common or [])]


def regroup(axes: Sequence[Axis], sizes: Sequence[int]) -> Axes:
    """The axes of a row-major view with the given sizes; what cannot be followed is frozen, on both sides."""
    result: dict[int, Axis] = {}
    ours = [axis for axis in axes if axis.size != 1]
    theirs = [position for position, size in enumerate(sizes) if size != 1]
    while ours and theirs:
        block, targets = [ours.pop(0)], [theirs.pop(0)]
        while (have := prod(a.size for a in block)) != (want := prod(sizes[t] for t in targets)):
            if have < want:
                block.append(ours.pop(0))
            else:
                targets.append(theirs.pop(0))
        if len(block) == len(targets) == 1:
            result[targets[0]] = block[0]
            continue
        parts = None if all(map(is_frozen, block)) else split(merge(block), [sizes[t] for t in targets])
        if parts is None:
            for axis in block:
                freeze(axis, "reshaped across its units")
            reason = next(why for axis in block for term in axis.terms if (why := frozen_reason(term)))
            parts = [fresh(sizes[t], reason) for t in targets]
        result.update(zip(targets, parts, strict=True))
    return [result.get(position, Axis(((),))) for position in range(len(sizes))]
