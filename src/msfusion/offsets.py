"""What other models say of some examples, so that it can be added to a model's logits: in full, or the largest of it.

The logits of a language model are many: one for each word of the vocabulary and each position of a text. But few of
them matter, since softmax weighs them by their exponentials. So of z(x, v), the logit of class v for target x, those
of the k classes that are largest for x are kept as they are, and the others by what all targets have in common:

    z(x, v)  ~  common(v) + rest(x)        common(v) = mean over x of z(x, v)
    rest(x)  =  log sum exp z(x, v)  -  log sum exp common(v)        over the classes v that are not kept for x

`rest` gives them together the weight that they have. So every kept class has exactly its probability under softmax,
and the others share what is left as they do in the mean. With k = all classes nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LargestLogits:
    """The largest logits of each target and what the others have in common, as above; of several models, added up.

    `extra` is by how much the kept logits are above `common + rest`, `classes` whose they are. It is indexed, and
    moved to a device, as the tensor [examples, *time, classes] that it stands for.
    """

    common: Float[Tensor, " classes"]
    rest: Float[Tensor, "examples *time"]
    extra: Float[Tensor, "examples *time kept"]
    classes: Int[Tensor, "examples *time kept"]

    @classmethod
    def of(cls, parts: Iterable[Float[Tensor, "examples *time classes"]], kept: int) -> LargestLogits:
        """The `kept` largest of each target. The logits come in parts, since all at once may be too many to hold."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        total, targets = torch.zeros(()), 0
        for part in map(_without_minus_infinity, parts):
            largest, classes = part.topk(kept, -1, sorted=False)
            found.append((largest, classes, part.scatter(-1, classes, -torch.inf).logsumexp(-1)))
            rows = part.flatten(0, -2)
            total, targets = total + rows.sum(0), targets + len(rows)
        common = total / targets
        each = [_above(common, *part) for part in found]
        rest, extra, chosen = (torch.cat(tensors) for tensors in zip(*each, strict=True))
        return cls(common, rest, extra, chosen)

    @classmethod
    def added(cls, several: Sequence[LargestLogits]) -> LargestLogits:
        """What several models say together; there must be at least one."""
        return cls(
            torch.stack([each.common for each in several]).sum(0),
            torch.stack([each.rest for each in several]).sum(0),
            torch.cat([each.extra for each in several], -1),
            torch.cat([each.classes for each in several], -1),
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LargestLogits:
        """What `tensors` gave. Raises KeyError where one is missing."""
        return cls(tensors["common"], tensors["rest"], tensors["extra"], tensors["classes"])

    def tensors(self) -> dict[str, Tensor]:
        """By their names."""
        return {"common": self.common, "rest": self.rest, "extra": self.extra, "classes": self.classes}

    def full(self) -> Float[Tensor, "examples *time classes"]:
        """All logits."""
        known = self.common + self.rest[..., None]
        return known.scatter_add(-1, self.classes.long(), self.extra)

    def __getitem__(self, examples: Any) -> LargestLogits:
        return LargestLogits(self.common, self.rest[examples], self.extra[examples], self.classes[examples])

    def to(self, device: torch.device) -> LargestLogits:
        """The same on a device."""
        return LargestLogits(*(tensor.to(device) for tensor in self.tensors().values()))


Offset = Tensor | LargestLogits
"""What is added to logits: a tensor of their shape, or what stands for one."""


def full(offset: Offset) -> Float[Tensor, "examples *time classes"]:
    """The offset as a tensor."""
    return offset.full() if isinstance(offset, LargestLogits) else offset


def bytes_of_largest(targets: int, classes: int, kept: int, itemsize: int) -> int:
    """What `LargestLogits` of so many targets takes, in bytes, if a logit takes `itemsize`."""
    return itemsize * classes + targets * (itemsize + kept * (itemsize + _INDEX.itemsize))


def largest_within(limit: float, targets: int, classes: int, itemsize: int) -> int:
    """How many logits of each target can be kept in `limit` bytes; at most all, and 0 where it is not even one."""
    room = (limit - itemsize * classes) / max(1, targets) - itemsize
    return max(0, min(classes, int(room // (itemsize + _INDEX.itemsize))))


_INDEX = torch.int32

_IMPOSSIBLE = 200.0
"""How far below all others the logit of an impossible class is put: exp(-200) is nothing beside 1 in any sum."""


def _above(
    common: Float[Tensor, " classes"],
    largest: Tensor,
    classes: Tensor,
    others: Float[Tensor, "examples *time"],
) -> tuple[Tensor, Tensor, Tensor]:
    """`rest`, `extra` and `classes` of some examples; `others` is log sum exp of what is not kept."""
    known = common.expand(*others.shape, -1).scatter(-1, classes, -torch.inf).logsumexp(-1)
    rest = (others - known).nan_to_num(0.0) if largest.shape[-1] == len(common) else others - known
    return rest, largest - (common[classes] + rest[..., None]), classes.to(_INDEX)


def _without_minus_infinity(logits: Tensor) -> Tensor:
    """Impossible classes with a logit so low that it makes no difference: infinities cannot be subtracted."""
    impossible = logits == -torch.inf
    if not bool(impossible.any()):
        return logits
    return logits.masked_fill(impossible, float(logits[~impossible].min()) - _IMPOSSIBLE)
