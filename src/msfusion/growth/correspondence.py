"""Which index space of a source becomes which of a target: the width maps of both, read side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from msfusion.errors import GrowthError
from msfusion.growth.axes import Role, Stretch, role, stretches
from msfusion.growth.layers import Match, match_tensors
from msfusion.growth.plan import GrowthPlan, Part, Space
from msfusion.width.groups import WidthMap

Key = tuple[tuple[int, ...], tuple[int, ...], str]
"""What tells index spaces apart: the atoms of their axes in the source and in the target (values and the output
projection are alike only where every query has its own values), and a tensor that has a space of its own."""


@dataclass(frozen=True)
class _Pair:
    """One stretch of a source tensor's axis and the target's that it grows into."""

    tensor: str
    axis: int
    source: Stretch
    target: Stretch
    role: Role
    key: Key | None
    block: tuple[str | None, int]


def correspond(source: WidthMap, target: WidthMap) -> GrowthPlan:
    """Find how a source's tensors become a target's, from the width maps of both models (`msfusion.trace`).

    Raises GrowthError in one sentence that names the tensor or layers, where the models are not of one family, where
    the target is smaller, or where an axis that nothing can grow (a vocabulary, classes, positions) differs.
    """
    matches = match_tensors(source, target)
    _check_ties(source, target, matches)
    pairs = list(_pairs(source, target, matches))
    names = _names(pairs)
    scores, splits = _scores(pairs), _splits(pairs)
    spaces = {
        name: replace(
            _space(name, [p for p in pairs if p.key == key], splits.get(_outermost(key), 1)),
            score=scores.get(key),
        )
        for key, name in names.items()
    }
    return GrowthPlan(
        spaces=spaces,
        parts=_parts(source, pairs, names),
        matches=tuple(matches),
        layers={
            m.kind: (len(m.sources), len(m.targets))
            for m in matches
            if m.kind and m.sources[0] in source.parameters
        },
        buffers=frozenset(source.shapes) - frozenset(source.parameters),
        source_shapes=dict(source.shapes),
        target_shapes=dict(target.shapes),
        aliases=dict(target.aliases),
    )


def _check_ties(source: WidthMap, target: WidthMap, matches: list[Match]) -> None:
    origin = {m.targets[0]: m.sources[0] for m in matches if m.stack is None}
    for name, first in target.aliases.items():
        ours, others = origin.get(name), origin.get(first)
        if ours and others and source.aliases.get(ours, ours) != source.aliases.get(others, others):
            raise GrowthError(
                f"{name!r} and {first!r} are one tied tensor in the target but two in the source: untie them there"
            )


def _pairs(source: WidthMap, target: WidthMap, matches: list[Match]) -> Iterator[_Pair]:
    summed = {s.key for name, axis in source.contracting for s in stretches(source, name, axis)}
    for match in matches:
        for layer, name in enumerate(match.sources):
            grown = match.targets[0]
            theirs, ours = source.shapes[name], target.shapes[grown]
            if len(theirs) != len(ours):
                raise GrowthError(
                    f"tensor {name!r} has shape {list(theirs)} in the source and {list(ours)} in the target: "
                    "the models are not of one family"
                )
            if name not in source.parameters:
                if theirs != ours:
                    raise GrowthError(
                        f"buffer {name!r} has shape {list(theirs)} in the source and {list(ours)} in the target: only "
                        "trained parameters can grow"
                    )
                continue
            for axis in range(len(theirs)):
                for number, (s, t) in enumerate(_side_by_side(source, target, name, grown, axis)):
                    key = None
                    if s.key is not None and t.key is not None:
                        # queries and keys are only multiplied with each other: each has a matrix of its own
                        alone = s.multiplied and s.key not in summed
                        key = (s.key, t.key, f"{_module(name)}, {number}" if alone else "")
                    block = (match.stack, layer)
                    yield _Pair(name, axis, s, t, role(source, name, axis), key, block)


def _side_by_side(
    source: WidthMap, target: WidthMap, name: str, grown: str, axis: int
) -> list[tuple[Stretch, Stretch]]:
    """The stretches of an axis in both models; GrowthError where they do not correspond."""
    theirs, ours = stretches(source, name, axis), stretches(target, grown, axis)
    before, after = source.shapes[name][axis], target.shapes[grown][axis]
    where = f"axis {axis} of tensor {name!r}"
    if before > after:
        raise GrowthError(
            f"the target is smaller than the source: {where} is {before} long in the source and {after} in the target"
        )
    if [s.key is None for s in theirs] != [s.key is None for s in ours]:
        if before == after:
            return [(Stretch(before), Stretch(after))]
        raise GrowthError(
            f"{where} is {before} long in the source and {after} in the target, and their width maps cut it "
            "differently: choose a target whose heads are grouped as the source's"
        )
    for s, t in zip(theirs, ours, strict=True):
        if s.key is None and s.length != t.length:
            reason = next(
                (f.reason for f in source.frozen if (f.tensor, f.axis) == (name, axis)), "one index"
            )
            raise GrowthError(
                f"{where} is {before} long in the source and {after} in the target, and such an axis does not grow "
                f"({reason}): give the target {before}{_or_a_head(source)}"
            )
        if s.length > t.length or s.repeat != t.repeat:
            raise GrowthError(
                f"{where} is cut into {_lengths(theirs)} in the source and {_lengths(ours)} in the target: "
                "no part of it may shrink"
            )
    return list(zip(theirs, ours, strict=True))


def _or_a_head(source: WidthMap) -> str:
    """What else to do about an output as wide as the model: a model of transformers without a head has one."""
    model: Any = None if source.program is None else source.program.model
    bare = getattr(model, "base_model", None) is model and type(model).__name__.endswith("Model")
    return ", or grow a model with a head, such as a ...ForCausalLM" if model is not None and bare else ""


def _lengths(found: list[Stretch]) -> str:
    return " + ".join(
        str(s.length) if s.repeat == 1 else f"{s.repeat} x {s.length // s.repeat}" for s in found
    )


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _names(pairs: list[_Pair]) -> dict[Key, str]:
    """Each index space is named after the first module that writes it."""
    names: dict[Key, str] = {}
    for pair in sorted(pairs, key=lambda p: p.role != "produce"):
        if pair.key is None or pair.key in names:
            continue
        stem, name, number = _module(pair.tensor), _module(pair.tensor), 2
        while name in names.values():
            name, number = f"{stem}:{number}", number + 1
        names[pair.key] = name
    return names


def _space(name: str, pairs: list[_Pair], split: int) -> Space:
    """The index space in which all these stretches lie."""
    source, target = _aligned(pairs[0].source.sizes, pairs[0].target.sizes)
    return Space(
        name,
        source,
        target,
        multiplied=pairs[0].source.multiplied,
        normalised=any(pair.role in ("scale", "shift") for pair in pairs),
        shared=len({pair.block for pair in pairs}) > 1,
        split=split if source[0] * split <= target[0] else 1,  # else the target has too few
    )


def _splits(pairs: list[_Pair]) -> dict[tuple[int, int], int]:
    """Over how many key-value heads the queries of each must be spread, where a target's head serves fewer queries.

    Queries, keys, values and the output projection share the outermost atom, by which it is told.
    """
    splits: dict[tuple[int, int], int] = {}
    for pair in pairs:
        if pair.key and pair.source.multiplied:
            source, target = _aligned(pair.source.sizes, pair.target.sizes)
            if len(source) == 3:
                splits[_outermost(pair.key)] = math.ceil(source[1] / target[1])
    return splits


def _outermost(key: Key) -> tuple[int, int]:
    return key[0][0], key[1][0]


def _scores(pairs: list[_Pair]) -> dict[Key, Literal["first", "second"]]:
    """The spaces of queries and keys: heads whose innermost factor no weight sums over, but two have in common."""
    summed = {p.key[0][-1] for p in pairs if p.key and p.role == "contract"}
    found: dict[int, list[Key]] = {}
    for p in pairs:
        if p.key and p.source.multiplied and p.key[0][-1] not in summed:
            keys = found.setdefault(p.key[0][-1], [])
            if p.key not in keys:
                keys.append(p.key)
    scores: dict[Key, Literal["first", "second"]] = {}
    for keys in found.values():
        if len(keys) == 2:
            scores[keys[0]], scores[keys[1]] = "first", "second"
    return scores


def _aligned(source: tuple[int, ...], target: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factors side by side: where one model has fewer (a factor of size 1 vanishes), ones are filled in.

    The innermost is the head dimension in both. Heads of which the target has fewer than the source are no key-value
    heads: they are the queries of a single one, which is outermost.
    """
    longest = max(len(source), len(target))

    def filled(sizes: tuple[int, ...], outside: bool) -> tuple[int, ...]:
        ones = (1,) * (longest - len(sizes))
        return (*ones, *sizes) if outside else (*sizes[:-1], *ones, sizes[-1])

    single = len(source) == 1 or source[0] > target[0]
    return filled(source, single), filled(target, len(target) == 1)


def _parts(
    source: WidthMap, pairs: list[_Pair], names: dict[Key, str]
) -> dict[str, tuple[tuple[Part, ...], ...]]:
    parts: dict[str, list[list[Part]]] = {name: [[] for _ in shape] for name, shape in source.shapes.items()}
    for p in pairs:
        parts[p.tensor][p.axis].append(
            Part(p.source.length, names[p.key] if p.key else None, p.role, p.source.repeat)
        )
    return {name: tuple(tuple(axis) for axis in axes) for name, axes in parts.items()}
