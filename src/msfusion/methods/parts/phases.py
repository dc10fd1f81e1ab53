"""Which blocks a participant trains in a round, and which of the others it has to be sent first.

The rounds are divided into phases as evenly as they can be; in each phase every participant goes on to its next block:

    phase      f = t * F // T                 of F = min(blocks * passes, T) phases in T rounds
    block      f mod m                        everybody on the same one

Who can hold k blocks trains this one and the k - 1 after it. The first phase may be given a share of the rounds that is
larger than that of the others.

Neighbours on different blocks at the same time diverge: each learns the whole rest, and together they overshoot it m
times (CIFAR-10, ten participants, four blocks: a loss of 451 after 40 rounds, where everybody on one has 1.38).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.width.groups import State


@dataclass(frozen=True)
class Phases:
    """The plan of a whole run. Raises ConfigError, naming the setting, for impossible values."""

    rounds: int
    blocks: int
    passes: int = 8
    first: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("blocks", self.blocks), ("passes", self.passes)):
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if not 0 <= self.first < 1:
            raise ConfigError(
                f"first is {self.first}: it must be a share of the rounds, at least 0 and below 1"
            )

    @property
    def count(self) -> int:
        """How many phases there are: each has at least one round."""
        return min(self.blocks * self.passes, self.rounds - self._alone + (self._alone > 0))

    def phase(self, round_index: int) -> int:
        """The phase of a round; both count from 0."""
        done, first = min(round_index, self.rounds - 1) - self._alone, int(self._alone > 0)
        return 0 if done < 0 else first + done * (self.count - first) // (self.rounds - self._alone)

    def place(self, round_index: int) -> tuple[int, int]:
        """How many rounds of its phase have gone before this one, and how many rounds the phase has."""
        phase = self.phase(round_index)
        first, after = self._begin(phase), self._begin(phase + 1)
        return round_index - first, after - first

    def held(self, round_index: int, count: int = 1) -> tuple[int, ...]:
        """The blocks, ascending, that a participant trains in a round if it can hold `count`."""
        first = self.phase(round_index)
        return tuple(sorted((first + step) % self.blocks for step in range(min(count, self.blocks))))

    @property
    def _alone(self) -> int:
        """The rounds of the first phase, where it is not as long as the others."""
        return int(self.first * self.rounds) if self.blocks * self.passes > 1 else 0

    def _begin(self, phase: int) -> int:
        """The first round of a phase, or for the number of phases that of all rounds."""
        first = int(self._alone > 0)
        if phase < first:
            return 0
        rest = (phase - first) * (self.rounds - self._alone)
        return self._alone - (-rest // (self.count - first))


@dataclass(frozen=True)
class Versions:
    """What each participant remembers of each block. A block's version is how often it has changed.

    `changes` has the present versions. `seen` has the version of each block that a participant was sent last (-1:
    none; 0 is how blocks begin, and but for the first one they begin with logits of zero, which need not be sent).
    `checked` has the phase in which the participant last was sent, of those that it did not train, what it lacked (-1:
    never): within a phase what is remembered stays.
    """

    changes: Int[Tensor, " blocks"]
    seen: Int[Tensor, "participants blocks"]
    checked: Int[Tensor, "participants blocks"]

    @classmethod
    def first(cls, participants: int, blocks: int) -> Versions:
        """Before the first round. The first block does have a say."""
        seen = torch.zeros(participants, blocks, dtype=torch.int64)
        seen[:, 0] = -1
        return cls(torch.zeros(blocks, dtype=torch.int64), seen, torch.full_like(seen, -1))

    @classmethod
    def of(cls, state: State) -> Versions:
        """As a global state has them."""
        return cls(*(state[name] for name in _NAMES))

    def tensors(self) -> dict[str, Tensor]:
        """For the global state. No tensor of a model is called so: their names never begin with a dot."""
        return dict(zip(_NAMES, (self.changes, self.seen, self.checked), strict=True))

    @property
    def total(self) -> int:
        """All changes so far: another number whenever anything has changed."""
        return int(self.changes.sum())

    def due(self, participant: int, phase: int, held: Sequence[int]) -> list[int]:
        """The blocks, ascending, that a participant is sent besides those that it trains."""
        seen, checked = self.seen[participant].tolist(), self.checked[participant].tolist()
        return [
            block
            for block, version in enumerate(self.changes.tolist())
            if block not in held and checked[block] != phase and seen[block] < version
        ]

    def remembered(self, participant: int) -> list[int]:
        """The blocks, ascending, of which a participant has something in memory: silent ones are not kept."""
        return [
            block
            for block, version in enumerate(self.seen[participant].tolist())
            if version > 0 or (block == 0 and version == 0)
        ]

    def after(self, answered: Iterable[Seen]) -> Versions:
        """When a round's updates have been merged."""
        changes, seen, checked = self.changes.clone(), self.seen.clone(), self.checked.clone()
        changed: set[int] = set()
        for each in answered:
            changed.update(each.held)
            if not each.now:
                continue
            for block in self.due(each.participant, each.phase, each.held):
                seen[each.participant, block] = self.changes[block]
            others = [block for block in range(len(changes)) if block not in each.held]
            checked[each.participant, others] = each.phase
        changes[sorted(changed)] += 1
        return Versions(changes, seen, checked)


@dataclass(frozen=True)
class Seen:
    """An update that was merged: whose, of which phase, with which blocks. `now`: it was begun in this very round.

    What came later may have been begun with other versions. What its participant was sent then is not noted: it is
    sent once more.
    """

    participant: int
    phase: int
    held: tuple[int, ...]
    now: bool


_NAMES = (".changes", ".seen", ".checked")


def finished_label(block: int) -> str:
    """The name of a block that is sent to be remembered."""
    return f"finished{block}"


def blocks_in(tensors: Mapping[str, object], count: int) -> list[int]:
    """The blocks, ascending, of which there is a finished one among some tensors."""
    present = {name.partition(".")[0] for name in tensors}
    return [block for block in range(count) if finished_label(block) in present]
