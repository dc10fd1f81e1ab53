"""What a sum of blocks asks of each participant in each round: exactly what a run will have, if all updates are good.

Who takes part is known beforehand (the calendar), so it is known too which finished blocks everybody is sent and when.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from msfusion.costs import inference_flops
from msfusion.methods.blocks import BlocksMethod
from msfusion.methods.parts.phases import Seen, Versions

if TYPE_CHECKING:
    from msfusion.experiment.setup import Setup


@dataclass(frozen=True)
class Spent:
    """A participant's round: bytes of tensors, training FLOPs (passes for what it remembers included), blocks that it
    is sent besides those that it trains, and the bytes of what it remembers.
    """

    bytes_down: int
    bytes_up: int
    flops: int
    finished: int
    remembered: int


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
        kept = method.remembering.bytes_for(data, len(known))
        if recomputes:
            passes = len(known - {*held}) * sum(setup.config.training_settings.batch_sizes(len(data)))
            kept = len(known) * self._block_bytes
        return Spent(
            costs.bytes_down + len(due) * self._block_bytes,
            costs.bytes_up,
            setup.flops(participant, ratio) + passes * self._pass_flops,
            len(due),
            kept,
        )

    def totals(self) -> list[dict[str, Any]]:
        """What the whole run asks of each participant: all rounds in which it trains, in time or not."""
        return self._whole_run[0]

    def needs(self, participant: int) -> dict[str, tuple[int, int]]:
        """By the names of `Budget`: what training alone takes of a participant, and what its busiest round does.

        Memory is that of training and all that it remembers in the end.
        """
        costs = self._setup.costs(self.method.capacities.ratio(participant, 0))
        row = self.totals()[participant]
        exchanged = costs.bytes_down + costs.bytes_up
        return {
            "memory": (costs.peak_memory, costs.peak_memory + row["remembered_bytes"]),
            "flops_per_example": (costs.flops_per_example, costs.flops_per_example),
            "bytes_per_round": (exchanged, max(exchanged, row["most_bytes_in_a_round"])),
        }

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
    def _whole_run(self) -> tuple[list[dict[str, Any]], list[dict[str, int]], list[dict[str, Any]]]:
        """By participant, by round and by phase, in one go: a long run of many people is too large to be kept."""
        phases = self.method.phases
        totals: list[dict[str, Any]] = [dict.fromkeys(_TOTALS, 0) for _ in self._setup.data.participants]
        by_round: list[dict[str, int]] = []
        by_phase: list[dict[str, Any]] = []
        for index in range(self._setup.config.rounds):
            phase, people = phases.phase(index), self._round(index)
            named = {"phase": phase + 1, "block": phase % phases.blocks}
            for each, spent in people.items():
                _add(totals[each], spent)
            by_round.append({"round": index + 1, **named, **_sums(people.values())})
            first = phase == len(by_phase)
            if first:
                by_phase.append({**named, "rounds": [index + 1, index + 1], **dict.fromkeys(_SPANS)})
            by_phase[phase]["rounds"][1] = index + 1
            _widen(by_phase[phase], people.values(), first)
        return totals, by_round, by_phase

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
    def _block_bytes(self) -> int:
        """Of one block's tensors."""
        return self._setup.costs(self.method.capacities.smallest).bytes_down

    @cached_property
    def _pass_flops(self) -> int:
        """Of one block's forward pass over an example."""
        return inference_flops(self.method.small.model, self._setup.data.participants[0])


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
