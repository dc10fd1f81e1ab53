"""Which tensors of a source model correspond to which of a target: by name, modulo the number of a layer.

A *stack* is a run of blocks that repeat: neighbours in a numbered list (`encoder.layer.0.`, `encoder.layer.1.`, ...)
whose tensors have the same names, shapes and width groups. A group that stands in other blocks too (the residual
stream) must be the same one in all of them, so two linear layers in a `Sequential` are no stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msfusion.errors import GrowthError
from msfusion.width.groups import WidthMap


@dataclass(frozen=True)
class Match:
    """Tensors of the target and those of the source from which they grow, one per layer where they stand in a stack.

    `stack` names the stack (`encoder.layer`), `kind` the module that each of its layers has
    (`encoder.layer.attention.output`); None outside a stack.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    stack: str | None = None
    kind: str | None = None


Signature = tuple[object, ...]


def match_tensors(source: WidthMap, target: WidthMap) -> list[Match]:
    """Every tensor of the target's state dict with its counterparts in the source.

    Raises GrowthError, naming the tensor or the list of layers, where one has no counterpart, or where the target has
    fewer layers.
    """
    return list(_match(_View(source), _View(target), "", ""))


class _View:
    """The names of a model's tensors as a tree of dotted prefixes."""

    def __init__(self, width_map: WidthMap) -> None:
        self.map = width_map

    def below(self, prefix: str) -> list[str]:
        """What follows the prefix in the names of the tensors under it, in the order of the state dict."""
        return [name[len(prefix) :] for name in self.map.shapes if name.startswith(prefix)]

    def children(self, prefix: str) -> list[str]:
        return list(dict.fromkeys(rest.partition(".")[0] for rest in self.below(prefix)))

    def tensors(self, block: str) -> list[str]:
        """The names of a block's tensors after its prefix; the block itself if it is a tensor."""
        return [""] if block in self.map.shapes else ["." + rest for rest in self.below(block + ".")]

    def signature(self, block: str) -> Signature:
        """What must be alike in the blocks of a stack."""
        names = {block + rest for rest in self.tensors(block)}
        entries = []
        for rest in self.tensors(block):
            places = tuple(
                (
                    place.axis,
                    place.offset,
                    place.thickness,
                    place.repeat,
                    self._label(group.name, names, block),
                )
                for group, place in self.map.places.get(block + rest, ())
            )
            entries.append((rest, tuple(self.map.shapes[block + rest]), places))
        return tuple(entries)

    def _label(self, group: str, names: set[str], block: str) -> str:
        """A group's name; within one block, the first place there."""
        places = self.map[group].places
        inside = [place for place in places if place.tensor in names]
        if len(inside) < len(places):
            return "shared: " + group
        return f"inside: {inside[0].tensor[len(block) :]}, axis {inside[0].axis}, from {inside[0].offset}"

    def runs(self, prefix: str, numbers: Sequence[str]) -> list[list[str]]:
        """The numbered children of a prefix in order, as runs of blocks that are alike."""
        runs: list[list[str]] = []
        last: Signature | None = None
        for block in (prefix + number for number in sorted(numbers, key=int)):
            signature = self.signature(block)
            if signature == last:
                runs[-1].append(block)
            else:
                runs.append([block])
            last = signature
        return runs


def _match(source: _View, target: _View, source_prefix: str, target_prefix: str) -> Iterator[Match]:
    theirs, ours = source.children(source_prefix), target.children(target_prefix)
    names = [child for child in ours if not child.isdecimal()]
    for child in names:
        if child not in theirs:
            raise _missing(target, target_prefix + child, "target", "source")
    for child in theirs:
        if child not in ours and not child.isdecimal():
            raise _missing(source, source_prefix + child, "source", "target")
    for child in names:
        yield from _descend(source, target, source_prefix + child, target_prefix + child)
    numbered = source.runs(source_prefix, [c for c in theirs if c.isdecimal()])
    wanted = target.runs(target_prefix, [c for c in ours if c.isdecimal()])
    if len(numbered) != len(wanted):
        raise GrowthError(
            f"the layers under {target_prefix[:-1]!r} do not correspond: the source has {_described(numbered)} "
            f"and the target {_described(wanted)}; choose a target whose kinds of layers follow in the same order"
        )
    for blocks, grown in zip(numbered, wanted, strict=True):
        if len(blocks) == len(grown) == 1:
            yield from _descend(source, target, blocks[0], grown[0])
        else:
            yield from _stack(source, target, blocks, grown)


def _descend(source: _View, target: _View, block: str, grown: str) -> Iterator[Match]:
    if grown in target.map.shapes and block in source.map.shapes:
        yield Match((block,), (grown,))
    else:
        yield from _match(source, target, block + ".", grown + ".")


def _stack(source: _View, target: _View, blocks: list[str], grown: list[str]) -> Iterator[Match]:
    stack, _, number = grown[0].rpartition(".")
    if len(grown) < len(blocks):
        raise GrowthError(
            f"the target is smaller than the source: it has {len(grown)} layers in {stack!r} where the source has "
            f"{len(blocks)}; give it at least as many"
        )
    theirs, ours = source.tensors(blocks[0]), target.tensors(grown[0])
    for rest in ours:
        if rest not in theirs:
            raise _missing(target, grown[0] + rest, "target", "source")
    for rest in theirs:
        if rest not in ours:
            raise _missing(source, blocks[0] + rest, "source", "target")
    stack = stack if number == "0" else grown[0]  # several stacks may share a list
    for rest in ours:
        kind = stack + rest.removesuffix(".weight").removesuffix(".bias")
        yield Match(tuple(b + rest for b in blocks), tuple(b + rest for b in grown), stack, kind)


def _missing(view: _View, name: str, has: str, lacks: str) -> GrowthError:
    tensor = name if name in view.map.shapes else name + "." + view.below(name + ".")[0]
    return GrowthError(
        f"the models are not of one family, or layers are missing: the {has} has a tensor {tensor!r} that the "
        f"{lacks} lacks"
    )


def _described(runs: Sequence[Sequence[str]]) -> str:
    return f"{len(runs)} kinds of layers ({', '.join(str(len(run)) for run in runs)})" if runs else "none"
