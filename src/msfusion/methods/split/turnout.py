"""Whose work counts in a round of the loop that is the reference; engines' rounds have `federated.screening`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from msfusion.errors import CodecError, MsfusionError, TrainingError
from msfusion.federated.method import Update
from msfusion.federated.screening import Answers, Screening, fault_of_values, norm_of, too_large_in
from msfusion.methods.split.sides import averaged
from msfusion.width.groups import State


class Turnout:
    """Who is left out of a round and why (`reasons`), and what the others' first layers come to."""

    def __init__(self, screening: Screening, participants: int, round_index: int) -> None:
        self._answers = Answers(screening)
        self._participants, self._round = participants, round_index
        self._max_norm = screening.max_update_norm
        self._stops = screening.bad_update == "stop"

    @property
    def reasons(self) -> dict[int, str]:
        """By participant."""
        return self._answers.reasons

    @contextmanager
    def screened(self, participant: int) -> Iterator[None]:
        """What a participant does for a step: it is left out where that fails."""
        try:
            yield
        except (TrainingError, CodecError) as error:
            self.leave_out(participant, error)

    def leave_out(self, participant: int, error: MsfusionError) -> None:
        """The participant does no more steps in this round, and its first layers do not count.

        Raises TrainingError where that is to stop the run, or everybody is left out: there is more wrong then than one
        participant.
        """
        named = TrainingError(f"{error} (round {self._round}, participant {participant})")
        self._answers.leave_out(participant, str(error), named)
        if self._stops or len(self.reasons) == self._participants:
            raise named from error

    def averaged(self, finished: Iterable[tuple[int, State, int]], before: State) -> dict[str, Tensor]:
        """The mean of the first layers of (participant, layers, examples), without those that are no good.

        `before` are the layers that everybody began with: they stay where nobody's layers are good.
        """
        for participant, layers, examples in finished:
            self._judge(participant, layers, before, examples)
        return self._answers.merged(_averaged, before)

    def relayed(
        self, participant: int, layers: dict[str, Tensor], before: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The first layers that the next participant gets: those `before`, where these are no good."""
        if participant not in self.reasons:
            fault = fault_of_values(layers, before)
            if fault is None:
                norms = {participant: norm_of(layers, before)}
                fault = too_large_in(norms, self._max_norm).get(participant)
            if fault is None:
                return layers
            self.leave_out(participant, TrainingError(fault))
        return before

    def _judge(self, participant: int, layers: State, before: State, examples: int) -> None:
        fault = fault_of_values(layers, before)
        update = Update(participant, self._round, layers, examples, 0.0)
        self._answers.add(update, norm_of(layers, before), fault)

    def close(self) -> None:
        """Let go of the layers."""
        self._answers.close()


def _averaged(_: State, updates: Iterable[Update]) -> dict[str, Tensor]:
    return averaged([(dict(update.tensors), float(update.examples)) for update in updates])
