"""What other models say of some examples, so that it can be added to a model's logits: in full, or the largest of it.

The logits of a language model are many: one for each word of the vocabulary and each position of a text. But few of
them matter, since softmax weighs them by their exponentials. So of z(x, v), the logit of class v for target x, those
of k classes are kept as they are, and the others by what all targets have in common. Which ones is for the sum to say
in which z is one term; let b(x, v) be the others of its terms, as far as they are known (0 where nothing is).

    kept for x:   the k classes v with the largest z(x, v) + b(x, v)
    else          z(x, v)  ~  common(v) + rest(x)                    common(v) = mean over x of z(x, v)
    rest(x)  =  log sum exp (z(x, v) + b(x, v))  -  log sum exp (common(v) + b(x, v))     over the v not kept for x

`rest` gives them together the weight that they have. So under the softmax of the sum every kept class has exactly its
probability, and the others share what is left as they do in the mean. With k = all classes nothing is lost.
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
    rest: Float[Tensor, " examples *time"]
    extra: Float[Tensor, "examples *time kept"]
    classes: Int[Tensor, "examples *time kept"]

    @classmethod
    def of(
        cls,
        parts: Iterable[Float[Tensor, "... classes"]],
        kept: int,
        beside: LargestLogits | None = None,
    ) -> LargestLogits:
        """So many logits of each target, which matter most `beside` what else is in their sum.

        They come in parts, since all at once may be too many to hold.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        total, targets, examples = torch.zeros(()), 0, 0
        for part in map(_without_minus_infinity, parts):
            whole = part + _said(beside, examples, len(part))
            classes = whole.topk(kept, -1, sorted=False).indices
            found.append((part.gather(-1, classes), classes, _weight_of_others(whole, classes)))
            rows = part.flatten(0, -2)
            total, targets, examples = total + rows.sum(0), targets + len(rows), examples + len(part)
        common, examples, finished = total / targets, 0, list[tuple[Tensor, Tensor, Tensor]]()
        for largest, classes, others in found:
            assumed = common + _said(beside, examples, len(largest))
            rest = others - _weight_of_others(assumed.expand(*others.shape, -1), classes)
            rest = torch.zeros_like(rest) if kept == len(common) else rest
            finished.append((rest, largest - (common[classes] + rest[..., None]), classes.to(_INDEX)))
            examples += len(largest)
        return cls(common, *(torch.cat(tensors) for tensors in zip(*finished, strict=True)))

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


def largest_within(limit: int | float, targets: int, classes: int, itemsize: int) -> int:
    """How many logits of each target can be kept in `limit` bytes; at most all, and 0 where it is not even one."""
    room = (limit - itemsize * classes) / max(1, targets) - itemsize
    return max(0, min(classes, int(room // (itemsize + _INDEX.itemsize))))


_INDEX = torch.int32

_IMPOSSIBLE = 200.0
"""How far below all others the logit of an impossible class is put: exp(-200) is nothing beside 1 in any sum."""


def _said(beside: LargestLogits | None, start: int, examples: int) -> Tensor:
    """What is beside the logits of some examples; nothing is 0."""
    return torch.zeros(()) if beside is None else beside[start : start + examples].full()


def _weight_of_others(logits: Tensor, classes: Tensor) -> Float[Tensor, " examples *time"]:
    """The logarithm of the sum of the exponentials, over all classes but these."""
    return logits.scatter(-1, classes, -torch.inf).logsumexp(-1)


def _without_minus_infinity(logits: Tensor) -> Tensor:
    """Impossible classes with a logit so low that it makes no difference: infinities cannot be subtracted."""
    impossible = logits == -torch.inf
    if not bool(impossible.any()):
        return logits
    return logits.masked_fill(impossible, float(logits[~impossible].min()) - _IMPOSSIBLE)
