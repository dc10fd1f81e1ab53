"""A method where a part of its state is: what `federated.rounds` runs on every rank, at the same time.

It does what the method does on a shard, and where that takes the whole it asks the other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from msfusion.batch import Batch
from msfusion.digests import digest_of_tensors
from msfusion.engines.sharded.parcels import collected
from msfusion.engines.sharded.ranks import Ranks, RefusedByTheFirst
from msfusion.errors import ConfigError, TrainingError, UpdateError
from msfusion.federated.method import Answered, Evaluation, Method, Task, Update
from msfusion.federated.sharding import Shard, Sharding, is_note, stretched
from msfusion.federated.states import without_aliases
from msfusion.width.groups import State


class OnShard(Method):
    """A method on the shard of this rank."""

    def __init__(self, sharding: Sharding, shard: Shard, ranks: Ranks) -> None:
        self.shard, self.ranks = shard, ranks
        self.carrier, self.scoring = sharding.carrier, sharding.carrier.scoring
        self.name, self.metrics = sharding.carrier.name, sharding.carrier.metrics  # type: ignore[misc]
        self._evaluate, self._by_layers = sharding.evaluate, sharding.measure is not None
        self._aliases = sharding.width_map.aliases
        self._began = digest_of_tensors(shard.first)
        self.measured: State = {}  # the state that is being measured

    @property
    def remembers(self) -> bool:
        """As where the participants are."""
        return self.carrier.remembers

    @property
    def recalibrates(self) -> bool:
        """As where the participants are."""
        return self.carrier.recalibrates

    def initial_state(self) -> dict[str, Tensor]:
        """The part of it that is here."""
        return self.shard.let_go_of_first()

    def begins_with(self, state: State) -> bool:
        """Whether the rows that are here are those of the beginning."""
        return digest_of_tensors(state) == self._began

    def check_together(self) -> None:
        """Raise ConfigError: each rank has one participant after the other."""
        raise ConfigError(
            "run.engine = 'sharded' trains one participant after the other: set run.together to 1"
        )

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The rows of the task that are here."""
        return self.shard.method.assign(state, round_index, participant)

    def train(self, task: Task, data: Batch) -> Update:
        """Nobody trains a part of a task."""
        raise TrainingError("a part of a task cannot be trained")

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """The next rows, from those of the updates. An update that does not fit somewhere is refused everywhere."""
        fused, told = state, None
        try:
            fused = self.shard.method.fuse(state, answered)
        except UpdateError as error:
            told = [str(error), error.participant]
        for refused in self.ranks.tell(told):
            if refused is not None:
                raise UpdateError(*refused)
        return dict(fused)

    def measurement(self, state: State, round_index: int, participant: int) -> Task:
        """A small model's rows that are here; of a whole that runs layer by layer what it looks like."""
        if not self._by_layers:
            return self.shard.method.measurement(state, round_index, participant)
        self.measured = state
        forms = {name: stretched(form) for name, form in self.shard.forms.items() if not is_note(name)}
        return Task(participant, round_index, without_aliases(forms, self._aliases))

    def settle(self, state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        """The rows with their running statistics pooled. Everybody has what was measured of all channels."""
        before = self.shard.stand_ins()
        settled = self.carrier.settle(before, updates)
        new = {name: tensor for name, tensor in settled.items() if tensor is not before.get(name)}
        return {**state, **{name: self.shard.part(name, new[name], self.ranks.rank) for name in new}}

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        """How good the whole is: the first rank runs it, part by part, and the others hand it what it reads."""
        if not self.ranks.is_first:
            return self._handed_out(state)
        try:
            notes = {name: tensor for name, tensor in state.items() if is_note(name)}
            found = self._evaluate(lambda names: self._read(state, names), notes, data)
        except Exception:
            self.ranks.from_first({"failed": True})
            raise
        self.ranks.from_first({"found": asdict(found)})
        return found

    def _read(self, state: State, names: Sequence[str]) -> dict[str, Tensor]:
        self.ranks.from_first({"read": list(names)})
        return collected(self.ranks, self.shard, state, names)

    def _handed_out(self, state: State) -> Evaluation:
        while True:
            word: dict[str, Any] = self.ranks.from_first()
            if "read" in word:
                collected(self.ranks, self.shard, state, word["read"])
            elif "found" in word:
                return Evaluation(**word["found"])
            else:
                raise RefusedByTheFirst(self.ranks.rank)
