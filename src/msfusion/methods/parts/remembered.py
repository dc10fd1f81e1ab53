"""What a participant remembers of the blocks that it does not train: what they say of its own examples.

Of each block it keeps all logits, where there is room for them. Where there is not (a language model has one for each
position and word) it keeps the largest of each target and what the others have in common (`msfusion.offsets`); where
there is room for hardly any, the blocks themselves, which it then runs again in each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.objectives import logits_of
from msfusion.offsets import LargestLogits, Offset, bytes_of_largest, largest_within
from msfusion.scoring import Scoring
from msfusion.width.groups import State

LOGITS = "logits"
"""In a memory: the name of a finished block's logits, where all are kept."""

FEWEST = 16
"""Of each target: where there is room for fewer logits than that, none are kept."""

REMEMBERED_BYTES = 2**28
"""How much a participant remembers as logits by default."""

OF_MEMORY = 4
"""This part of the memory that a budget allows may be remembered as logits."""


_COPIES = 2
"""The largest logits of the blocks stand in memory twice while a participant trains: each by itself, and added up."""


@dataclass(frozen=True)
class Remembering:
    """How much can be kept: `limit` bytes for all blocks of a participant together.

    A block has `classes` logits for each target, which are kept as `dtype`. With `by_example` (outputs that are no
    logits of classes) it has so many outputs for each example, of which none can be left out.
    """

    classes: int
    dtype: torch.dtype
    blocks: int
    limit: int = REMEMBERED_BYTES
    by_example: bool = False

    def kept(self, data: Batch) -> int:
        """How many logits of each target are kept: all, the largest ones, or 0, where blocks are kept instead.

        A single block has no others, of which anything would be kept.
        """
        if self.blocks == 1 or self._bytes_of_all(data, self.blocks) <= self.limit:
            return self.classes
        if self.by_example:
            return 0
        room = self.limit / (_COPIES * self.blocks)
        kept = largest_within(room, data.targets.numel(), self.classes, self.dtype.itemsize)
        return kept if kept >= FEWEST else 0

    def recomputes(self, data: Batch) -> bool:
        """Whether a participant with this data keeps blocks."""
        return self.kept(data) == 0

    def bytes_for(self, data: Batch, blocks: int) -> int:
        """What the logits of so many blocks take at most, while their sum is trained with."""
        kept = self.kept(data)
        if kept == self.classes:
            return self._bytes_of_all(data, blocks)
        own = bytes_of_largest(data.targets.numel(), self.classes, kept, self.dtype.itemsize)
        return _COPIES * blocks * own

    def remember(
        self, logits: Iterable[Float[Tensor, "... classes"]], data: Batch, others: Sequence[State]
    ) -> State:
        """What is kept of a block that says this, part by part, of all examples; `others` is what is kept of others."""
        parts = (part.to(self.dtype) for part in logits)
        kept = self.kept(data)
        if kept == self.classes:
            return {LOGITS: torch.cat(list(parts))}
        return LargestLogits.of(parts, kept, _added(others) if others else None).tensors()

    def recall(self, blocks: Sequence[State]) -> Offset:
        """What several blocks, at least one, say together, from what `remember` made of each."""
        if LOGITS in blocks[0]:
            return reduce(torch.add, (each[LOGITS] for each in blocks))
        return _added(blocks)

    def _bytes_of_all(self, data: Batch, blocks: int) -> int:
        """What all logits of so many blocks take, each by itself and their sum."""
        rows = len(data) if self.by_example else data.targets.numel()
        return (blocks + 1) * rows * self.classes * self.dtype.itemsize if blocks else 0


def _added(blocks: Sequence[State]) -> LargestLogits:
    """What several blocks say together, of whose logits the largest are kept."""
    return LargestLogits.added([LargestLogits.from_tensors(each) for each in blocks])


class Recomputed:
    """The loss of the whole where blocks are kept: what they say is computed in each step."""

    def __init__(self, others: nn.Module, scoring: Scoring) -> None:
        self.others, self.scoring = others.eval(), scoring

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Raises as `Scoring.objective` does."""
        with torch.no_grad():
            offset = logits_of(batch.call(self.others))
        return self.scoring.objective(model, replace(batch, offset=offset))
