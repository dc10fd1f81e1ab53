"""What a sum of blocks asks of each participant in each round: exactly what a run will have, if all updates are good.

Who takes part is known beforehand (the calendar), so it is known too which finished blocks everybody is sent and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        count = len(self._setup.data.participants)
        rows: list[dict[str, Any]] = [dict.fromkeys(_TOTALS, 0) for _ in range(count)]
        for round_index in range(self._setup.config.rounds):
            attendance = self._setup.calendar.round(round_index)
            versions = self._before(round_index)
            for each in (*attendance.on_time, *attendance.late):
                spent, row = self.spent(each, round_index, versions), rows[each]
                row["finished_blocks"] += spent.finished
                row["total_bytes_down"] += spent.bytes_down
                row["total_flops"] += spent.flops
                row["remembered_bytes"] = max(row["remembered_bytes"], spent.remembered)
                if self._setup.calendar.is_merged(each, round_index):
                    row["total_bytes_up"] += spent.bytes_up
        return rows

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


_TOTALS = ("finished_blocks", "total_bytes_down", "total_bytes_up", "total_flops", "remembered_bytes")
