"""Axes as sums of products of atoms: the algebra in which width groups are found.

Each axis of each tensor in a traced graph is a concatenation (sum) of terms, and each term a row-major product of
atoms, outermost first: after `cat([x, y], 1)` the channel axis is x + y; after `view(B, T, heads, 64)` the last axis of
a projection was heads * 64. Atoms that an operation forces to be indexed alike are united (union-find); an atom that
turns out to be a sum or a product of smaller ones is replaced by them wherever it stands. What cannot be expressed so
is frozen: it keeps its width, with the reason. Freezing is always safe, because an axis that nobody narrows needs no
account of its inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod


class Atom:
    """A set of consecutive indices that is narrowed as one, or not at all. Mutable: atoms are united and split."""

    __slots__ = ("frozen", "parent", "size", "terms", "weak")

    def __init__(self, size: int, frozen: str | None = None, weak: bool = False) -> None:
        self.size = size
        self.parent: Atom | None = None
        self.terms: tuple[Product, ...] | None = (
            None  # what replaces this atom, once it is known to be composed
        )
        self.frozen = frozen  # why it is never narrowed
        self.weak = weak  # made by repeating one value (expand, zeros): no group unless it meets a real one


Product = tuple[Atom, ...]


@dataclass(frozen=True)
class Axis:
    """The terms of one axis. `origin`: the (tensor, axis) pairs of the state that this axis is, unchanged."""

    terms: tuple[Product, ...]
    origin: frozenset[tuple[str, int]] = frozenset()

    @property
    def size(self) -> int:
        """The number of indices."""
        return sum(size_of(term) for term in self.terms)


Axes = list[Axis]


def find(atom: Atom) -> Atom:
    """The representative of all atoms united with this one."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def size_of(product: Product) -> int:
    """The number of indices of a product."""
    return prod(atom.size for atom in product)


def fresh(size: int, frozen: str | None = None, weak: bool = False) -> Axis:
    """A new axis of one atom."""
    return Axis((((Atom(size, frozen, weak),)) if size != 1 else (),))


def expand(product: Product) -> tuple[Product, ...]:
    """The product with all replaced atoms written out: the sum of products it has become.

    An inner factor that became a sum stays as it is (a product of sums has no sum of products in this order); the
    factors of size 1 vanish.
    """
    done: list[Atom] = []
    for position, raw in enumerate(product):
        atom = find(raw)
        if atom.size == 1:
            continue
        if atom.terms is not None and (len(atom.terms) == 1 or not done):
            rest = product[position + 1 :]
            return tuple(t for term in atom.terms for t in expand((*done, *term, *rest)))
        done.append(atom)
    return (tuple(done),)


def resolved(axis: Axis) -> tuple[Product, ...]:
    """The axis's terms with all replaced atoms written out."""
    return tuple(t for term in axis.terms for t in expand(term))


def atoms_of(terms: Iterable[Product]) -> Iterator[Atom]:
    """Every atom in these terms, those inside a factor that is a sum included."""
    for term in terms:
        for product in expand(term):
            for atom in product:
                yield atom
                if atom.terms is not None:
                    yield from atoms_of(atom.terms)


def freeze(axis: Axis | Product | Atom, reason: str) -> None:
    """Never narrow any of this; the first reason given is kept."""
    if isinstance(axis, Atom):
        axis.frozen = axis.frozen or reason  # itself too, where it is a sum inside a product
        products: Iterable[Product] = ((axis,),)
    else:
        products = axis.terms if isinstance(axis, Axis) else (axis,)
    for atom in atoms_of(products):
        atom.frozen = atom.frozen or reason


def is_frozen(axis: Axis) -> bool:
    """Whether nothing of this axis can be narrowed."""
    return all(atom.frozen is not None for atom in atoms_of(axis.terms))


def frozen_reason(product: Product) -> str | None:
    """Why a product cannot be narrowed, if one of its atoms says so."""
    return next((atom.frozen for atom in atoms_of((product,)) if atom.frozen is not None), None)


def replace(atom: Atom, terms: tuple[Product, ...]) -> None:
    """From now on the atom stands for these terms (which have its size)."""
    assert atom.terms is None
    assert sum(size_of(term) for term in terms) == atom.size
    atom.terms = terms
    if atom.frozen is not None:
        for part in atoms_of(terms):
            part.frozen = part.frozen or atom.frozen
    if not atom.weak and len(terms) > 1:
        for term in terms:
            if term:
                find(term[0]).weak = False


def _unite(a: Atom, b: Atom) -> None:
    """Make two atoms of one size the same."""
    a, b = find(a), find(b)
    if a is b:
        return
    assert a.size == b.size
    if a.terms is not None and b.terms is not None:
        unify(Axis(a.terms), Axis(b.terms))
        a, b = find(a), find(b)
        if a is b:
            return
    if a.terms is not None:
        a, b = b, a
    reason = a.frozen or b.frozen
    weak = a.weak and b.weak
    a.parent = b
    b.weak = weak
    if reason is not None:
        freeze(b, reason)
        b.frozen = b.frozen or reason


def unify(first: Axis, second: Axis) -> None:
    """Force two axes of one size to be indexed alike; freezes both where their structures cannot be matched."""
    left, right = list(first.terms), list(second.terms)
    while left and right:
        left[:1], right[:1] = expand(left[0]), expand(right[0])
        longer, shorter = (left, right) if size_of(left[0]) >= size_of(right[0]) else (right, left)
        if size_of(longer[0]) == size_of(shorter[0]):
            _unify_products(left.pop(0), right.pop(0))
            continue
        parts = _cut(longer[0], size_of(shorter[0]))
        if parts is None:
            for product in (*left, *right):
                freeze(product, MISMATCH)
            return
        longer[:1] = parts


MISMATCH = "combined with a tensor whose parts do not line up with its own"


def _cut(product: Product, head: int) -> tuple[Product, Product] | None:
    """Split a product into its first `head` indices and the rest; None where that would tear a unit."""
    inner = size_of(product[1:])
    if head % inner:
        return None
    atom = find(product[0])
    first, second = Atom(head // inner, weak=atom.weak), Atom(atom.size - head // inner, weak=atom.weak)
    replace(atom, ((first,), (second,)))
    return (first, *product[1:]), (second, *product[1:])


def _unify_products(x: Product, y: Product) -> None:
    """Force two products of one size to be indexed alike, factor by factor from the outermost."""
    (x, *more), (y, *others) = expand(x), expand(y)
    if more or others:  # one of them has meanwhile become a sum
        unify(Axis((x, *more)), Axis((y, *others)))
        return
    left, right = list(x), list(y)
    while left and right:
        a, b = find(left[0]), find(right[0])
        if a.size == b.size:
            left.pop(0), right.pop(0)
            _unite(a, b)
            continue
        longer, short = (left, b) if a.size > b.size else (right, a)
        if not _peel(longer, short.size):
            for product in (tuple(left), tuple(right)):
                freeze(product, MISMATCH)
            return


def _peel(factors: list[Atom], outer: int) -> bool:
    """Replace the first factor by a product whose first factor has size `outer`; False where that cannot be."""
    atom = find(factors[0])
    if atom.size % outer or atom.terms is not None:
        return False
    first, second = Atom(outer, weak=atom.weak), Atom(atom.size // outer, weak=atom.weak)
    replace(atom, ((first, second),))
    factors[:1] = [first, second]
    return True


def factor(product: Product, sizes: Sequence[int]) -> list[Product] | None:
    """Split a product into consecutive products of the given sizes; None where a factor would have to be torn."""
    factors = [find(atom) for atom in product]
    parts: list[Product] = []
    for size in sizes:
        part: list[Atom] = []
        while size > 1:
            if not factors:
                return None
            if factors[0].size > size and not _peel(factors, size):
                return None
            if size % factors[0].size:
                return None
            size //= factors[0].size
            part.append(factors.pop(0))
        parts.append(tuple(part))
    return parts


def cut_at(axis: Axis, positions: Sequence[int]) -> list[Axis] | None:
    """Split an axis at the given ascending positions into consecutive axes; None (and frozen) where a unit is torn."""
    pieces: list[Axis] = []
    rest = list(axis.terms)
    start = 0
    for end in (*positions, axis.size):
        terms: list[Product] = []
        need = end - start
        while need > 0:
            rest[:1] = expand(rest[0])
            if size_of(rest[0]) > need:
                parts = _cut(rest[0], need)
                if parts is None:
                    freeze(axis, "split inside a unit")
                    return None
                rest[:1] = parts
            need -= size_of(rest[0])
            terms.append(rest.pop(0))
        pieces.append(Axis(tuple(terms)))
        start = end
    return pieces
