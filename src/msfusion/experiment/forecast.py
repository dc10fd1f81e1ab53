"""What a sum of blocks asks of each participant in each round: exactly what a run will have, if all updates are good.

Who takes part is known beforehand (the calendar), so it is known too which finished blocks everybody is sent and when.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from msfusion.costs import Costs
from msfusion.experiment.besides import Besides, Block
from msfusion.experiment.fitting import block_of
from msfusion.methods.blocks import BlocksMethod
from msfusion.methods.parts.phases import Seen, Versions

if TYPE_CHECKING:
    from msfusion.experiment.setup import Setup


@dataclass(frozen=True)
class Spent:
    """A participant's round: bytes of tensors, training FLOPs (passes for what it remembers included), blocks that it
    is sent besides those that it trains, the bytes of what it remembers, and what of all that training does not take.
    """

    bytes_down: int
    bytes_up: int
    flops: int
    finished: int
    remembered: int
    besides: Besides


class Forecast:
    """The versions of all blocks as the rounds go on, and what follows from them."""

    def __init__(self, setup: Setup, method: BlocksMethod) -> None:
        self._setup, self.method = setup, method
        self._begin()

    def spent(self, participant: int, round_index: int, versions: Versions | None = None) -> Spent:
        """A participant's round. `versions` are those before it, where they are known: else they are foreseen."""
        versions = self._before(round_index) if versions is None else versions
        method, setup = self.method, self._setup
        data = setup.data.participants[participant]
        held, ratio = (
            method.held(participant, round_index),
            method.capacities.ratio(participant, round_index),
        )
        due = versions.due(participant, method.phases.phase(round_index), held)
        known = {*versions.remembered(participant), *due}
        costs, recomputes = setup.costs(ratio), method.remembering.recomputes(data)
        passes = len(due) * len(data)
        besides = Besides(len(due), logits=method.remembering.bytes_for(data, len(known)))
        if recomputes:
            besides = Besides(len(due), kept=len(known), run=len(known - {*held}))
            passes = besides.run * setup.examples_seen(participant)
        return Spent(
            costs.bytes_down + len(due) * self._block.sent,
            costs.bytes_up,
            setup.flops(participant, ratio) + passes * self._block.flops,
            len(due),
            besides.remembered(self._block),
            besides,
        )

    def totals(self) -> list[dict[str, Any]]:
        """What the whole run asks of each participant: all rounds in which it trains, in time or not."""
        return self._whole_run[0]

    def besides(self, participant: int) -> Besides:
        """The most of each that the run takes of a participant beside its training, in whatever round."""
        return self._whole_run[3][participant]

    def training(self, participant: int) -> Costs:
        """What training alone costs a participant in the first round."""
        return self._setup.costs(self.method.capacities.ratio(participant, 0))

    def needs(self, participant: int) -> Costs:
        """That with the most that comes besides in a round: what a budget must have room for."""
        return self._with_besides(participant, self.training(participant))

    def needs_with(self, participant: int, blocks: int) -> Costs:
        """The same, or a little more, if the participant trained so many blocks at once: it would be sent fewer."""
        return self._with_besides(participant, self._setup.costs(self.ratio_of(blocks)))

    def ratio_of(self, blocks: int) -> float:
        """The width ratio of a participant that trains so many blocks at once."""
        return min(1.0, blocks * self.method.capacities.smallest)

    def _with_besides(self, participant: int, training: Costs) -> Costs:
        """The costs of training with the most that comes besides in a round."""
        return self.besides(participant).added_to(training, self._block)

    def by_round(self) -> list[dict[str, int]]:
        """What `metrics.jsonl` will say of each round: its phase, and of everybody together finished blocks and bytes.

        Phases count from 1. `block` is the one that is trained; who can hold several trains those after it as well.
        """
        return self._whole_run[1]

    def by_phase(self) -> list[dict[str, Any]]:
        """For each phase its block, its first and last round, and what one participant is sent and sends in a round.

        Each is the least and the most over the participants, None where nobody is there: `finished_blocks` and
        `first_bytes_down` of the first round, in which blocks that have changed are sent; `bytes_down` of a later
        round; `bytes_up` of any.
        """
        return self._whole_run[2]

    @cached_property
    def _whole_run(
        self,
    ) -> tuple[list[dict[str, Any]], list[dict[str, int]], list[dict[str, Any]], list[Besides]]:
        """By participant, by round, by phase, and what comes besides by participant, in one go: a long run of many
        people is too large to be kept.
        """
        phases = self.method.phases
        totals: list[dict[str, Any]] = [dict.fromkeys(_TOTALS, 0) for _ in self._setup.data.participants]
        besides = [Besides()] * len(totals)
        by_round: list[dict[str, int]] = []
        by_phase: list[dict[str, Any]] = []
        for index in range(self._setup.config.rounds):
            phase, people = phases.phase(index), self._round(index)
            named = {"phase": phase + 1, "block": phase % phases.blocks}
            for each, spent in people.items():
                _add(totals[each], spent)
                besides[each] = besides[each].or_more(spent.besides)
            by_round.append({"round": index + 1, **named, **_sums(people.values())})
            first = phase == len(by_phase)
            if first:
                by_phase.append({**named, "rounds": [index + 1, index + 1], **dict.fromkeys(_SPANS)})
            by_phase[phase]["rounds"][1] = index + 1
            _widen(by_phase[phase], people.values(), first)
        for row, most in zip(totals, besides, strict=True):
            row["recomputed_flops_per_example"] = most.run * self._block.flops
        return totals, by_round, by_phase, besides

    def _round(self, round_index: int) -> dict[int, Spent]:
        """What everybody who trains in a round spends, in time or not; an update that is not merged is not counted."""
        calendar, versions = self._setup.calendar, self._before(round_index)
        attendance, people = calendar.round(round_index), dict[int, Spent]()
        for each in (*attendance.on_time, *attendance.late):
            spent = self.spent(each, round_index, versions)
            people[each] = spent if calendar.is_merged(each, round_index) else replace(spent, bytes_up=0)
        return people

    def _begin(self) -> None:
        self._versions = Versions.first(len(self.method.capacities.each), len(self.method.starts))
        self._changes: list[int] = [0]  # before each round, up to the one that `_versions` are of

    def _before(self, round_index: int) -> Versions:
        """The versions before a round. Rounds are mostly asked for in their order."""
        if round_index < len(self._changes) - 1:
            self._begin()
        while len(self._changes) - 1 < round_index:
            self._versions = self._versions.after(self._answered(len(self._changes) - 1))
            self._changes.append(self._versions.total)
        return self._versions

    def _answered(self, round_index: int) -> Sequence[Seen]:
        """What is merged in a round."""
        attendance = self._setup.calendar.round(round_index)
        began = [*((each, round_index) for each in attendance.on_time), *attendance.arriving]
        return [
            Seen(
                each,
                self.method.phases.phase(first),
                self.method.held(each, first),
                self._changes[first] == self._changes[round_index],
            )
            for each, first in began
        ]

    @cached_property
    def _block(self) -> Block:
        """Of the width that blocks have."""
        costs = self._setup.costs_without_sums(self.method.capacities.smallest)
        return block_of(self.method.small.model, costs, self._setup.data.participants[0])


_TOTALS = (
    "finished_blocks",
    "total_bytes_down",
    "total_bytes_up",
    "most_bytes_in_a_round",
    "total_flops",
    "remembered_bytes",
)
_SPANS = ("finished_blocks", "first_bytes_down", "bytes_down", "bytes_up")


def _add(row: dict[str, Any], spent: Spent) -> None:
    """One more round of a participant."""
    row["finished_blocks"] += spent.finished
    row["total_bytes_down"] += spent.bytes_down
    row["total_bytes_up"] += spent.bytes_up
    row["most_bytes_in_a_round"] = max(row["most_bytes_in_a_round"], spent.bytes_down + spent.bytes_up)
    row["total_flops"] += spent.flops
    row["remembered_bytes"] = max(row["remembered_bytes"], spent.remembered)


def _sums(people: Iterable[Spent]) -> dict[str, int]:
    spent = list(people)
    return {
        "finished_blocks": sum(each.finished for each in spent),
        "bytes_down": sum(each.bytes_down for each in spent),
        "bytes_up": sum(each.bytes_up for each in spent),
    }


def _widen(row: dict[str, Any], people: Iterable[Spent], first: bool) -> None:
    """Let the spans of a phase hold those of one more round of it, `first` or later."""
    for each in people:
        found = {"first_bytes_down" if first else "bytes_down": each.bytes_down, "bytes_up": each.bytes_up}
        if first:
            found["finished_blocks"] = each.finished
        for key, value in found.items():
            least, most = row[key] or (value, value)
            row[key] = [min(least, value), max(most, value)]
