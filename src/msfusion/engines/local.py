"""A federation on one machine: the rounds of any method, its participants simulated here or in workers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.engines.pool import Pool
from msfusion.engines.workers import Done, InProcess, Workers, check_execution, threads_set
from msfusion.errors import ConfigError, DataError
from msfusion.methods.base import Evaluation, Method, Recalibrating, Task, TrainsTogether, Update
from msfusion.methods.memory import Memories
from msfusion.methods.training import seed_of
from msfusion.width.groups import State


@dataclass(frozen=True)
class RoundSettings:
    """How many rounds, and who takes part in each. Raises ConfigError for impossible values.

    Each round draws `count` participants, or the nearest whole number to `fraction` of them (at least one),
    from (seed, round). The global model is evaluated after every `evaluate_every` rounds and after the
    last.
    """

    rounds: int
    fraction: float = 1.0
    count: int | None = None
    evaluate_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds}: it must be at least 1")
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"the fraction of participants in a round is {self.fraction}: it must be above 0, at most 1"
            )
        if self.count is not None and self.count < 1:
            raise ConfigError(f"the number of participants in a round is {self.count}: it must be at least 1")
        if self.evaluate_every < 1:
            raise ConfigError(f"evaluate_every is {self.evaluate_every}: it must be at least 1")

    def participants_in(self, round_index: int, participants: int) -> tuple[int, ...]:
        """Who of that many participants takes part in a round. Raises ConfigError if there are too few."""
        count = max(1, math.floor(self.fraction * participants + 0.5)) if self.count is None else self.count
        if count > participants:
            raise ConfigError(
                f"{count} participants are to take part in a round, but there are {participants}"
            )
        if count == participants:
            return tuple(range(participants))
        generator = torch.Generator().manual_seed(seed_of(self.seed, round_index))
        return tuple(sorted(torch.randperm(participants, generator=generator)[:count].tolist()))


@dataclass(frozen=True)
class ParticipantResult:
    """What a participant did in a round: mean training loss, examples, bytes of tensors moved, seconds."""

    participant: int
    loss: float
    examples: int
    bytes_down: int
    bytes_up: int
    seconds: float


@dataclass(frozen=True)
class RoundResult:
    """A finished round: the new global state, who did what, how good the model is (where evaluated), seconds.

    `measuring_bytes` counts what measuring the running statistics of BatchNorm moved, down and up, besides
    training. `memories` is what each participant keeps for itself; a run that goes on from here needs it.
    """

    round_index: int
    state: dict[str, Tensor]
    participants: tuple[ParticipantResult, ...]
    evaluation: Evaluation | None
    seconds: float
    measuring_bytes: int = 0
    memories: Memories = field(default_factory=dict)


def run_rounds(
    method: Method,
    data: Sequence[Batch],
    settings: RoundSettings,
    *,
    state: State | None = None,
    memories: Memories | None = None,
    first_round: int = 0,
    workers: int = 1,
    threads: int = 1,
    together: int = 1,
    device: str = "cpu",
    test: Batch | None = None,
    on_participant: Callable[[ParticipantResult], None] | None = None,
) -> Generator[RoundResult, None, None]:
    """Run the rounds first_round .. settings.rounds - 1 of a method, and hand on each as it ends.

    `data` has one Batch per participant. `state` is the global state to begin with (default: the method's
    own initial state), `memories` what each participant has kept from earlier rounds (default: nothing), as
    in the result of the round before `first_round`.
    The results are the same, bit for bit, for any number of workers. `threads` is how many threads PyTorch
    uses in each worker, and in this process while a round runs. `together` is how many participants a worker
    trains at once, where the method can; the results are then the same but for rounding. `device` is where
    participants train, "cpu" or "cuda" (one process only). `on_participant` is called in this process
    for each participant as it finishes, in no particular order.

    Workers are forked: call `torch.set_num_threads(1)` before anything else if this process computes on its
    own. Closing the generator, or leaving it by an exception, ends the workers.

    Raises ConfigError or DataError at once for impossible settings; while running, what the method raises,
    and TrainingError where a worker process dies.
    """
    for name, value in (("workers", workers), ("threads", threads), ("together", together)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    check_execution(method, workers, together, device)
    if not data:
        raise DataError("there are no participants: give at least one participant's data")
    for participant, own in enumerate(data):
        if len(own) == 0:
            raise DataError(
                f"participant {participant} has no examples: give it some or use fewer participants"
            )
    settings.participants_in(first_round, len(data))
    return _rounds(
        method,
        data,
        settings,
        state,
        memories or {},
        first_round,
        workers,
        threads,
        together,
        torch.device(device),
        test,
        on_participant,
    )


def _rounds(
    method: Method,
    data: Sequence[Batch],
    settings: RoundSettings,
    state: State | None,
    memories: Memories,
    first_round: int,
    workers: int,
    threads: int,
    together: int,
    device: torch.device,
    test: Batch | None,
    on_participant: Callable[[ParticipantResult], None] | None,
) -> Generator[RoundResult, None, None]:
    """The generator behind `run_rounds`."""
    current = method.initial_state() if state is None else dict(state)
    federation: _Federation | None = None
    try:
        for round_index in range(first_round, settings.rounds):
            with threads_set(threads):
                if federation is None:
                    pool = (
                        InProcess(method, data, device)
                        if workers == 1
                        else Pool(method, data, min(workers, len(data)), threads)
                    )
                    federation = _Federation(
                        method, data, settings, pool, test, on_participant, memories, together
                    )
                result = federation.round(current, round_index)
            current = result.state
            yield result
    finally:
        if federation is not None:
            federation.workers.close()


class _Federation:
    """What stays the same from round to round, and how long each participant took so far."""

    def __init__(
        self,
        method: Method,
        data: Sequence[Batch],
        settings: RoundSettings,
        workers: Workers,
        test: Batch | None,
        on_participant: Callable[[ParticipantResult], None] | None,
        memories: Memories,
        together: int = 1,
    ) -> None:
        self.together = together
        self.method, self.data, self.settings, self.workers, self.test = method, data, settings, workers, test
        self.on_participant = on_participant
        self.seconds: dict[int, float] = {}
        self.memories = dict(memories)

    def round(self, state: dict[str, Tensor], round_index: int) -> RoundResult:
        """One round: everybody trains, the server fuses what arrives, and evaluates where that is due."""
        begin = time.perf_counter()
        participants = self.settings.participants_in(round_index, len(self.data))
        results: list[ParticipantResult] = []
        fused = self.method.aggregate(state, self._trained(state, round_index, participants, results))
        evaluation, moved = None, 0
        last = round_index == self.settings.rounds - 1
        if last or (round_index + 1) % self.settings.evaluate_every == 0:
            fused, moved = self._recalibrated(fused, round_index, participants)
            evaluation = None if self.test is None else self.method.evaluate(fused, self.test)
        results.sort(key=lambda result: result.participant)
        seconds = time.perf_counter() - begin
        memories = dict(self.memories)
        return RoundResult(round_index, fused, tuple(results), evaluation, seconds, moved, memories)

    def _trained(
        self, state: State, round_index: int, participants: Sequence[int], results: list[ParticipantResult]
    ) -> Iterator[Update]:
        """The participants' updates as they arrive, each noted in `results`, without what stays private."""
        jobs = [
            partial(self._tasks, state, round_index, group)
            for group in self._groups(participants, round_index)
        ]
        for done in self.workers.run("train", jobs):
            result = _result(done)
            results.append(result)
            self.seconds[result.participant] = result.seconds
            if self.on_participant is not None:
                self.on_participant(result)
            yield self._without_memory(done.update)

    def _groups(self, participants: Sequence[int], round_index: int) -> list[tuple[int, ...]]:
        """Who is trained at once; the longest goes first. The groups depend on nothing that was measured."""
        groups: list[tuple[int, ...]] = [(participant,) for participant in participants]
        if self.together > 1:
            assert isinstance(self.method, TrainsTogether)
            groups = self.method.groups(round_index, participants, self.data, self.together)
        return sorted(groups, key=lambda group: sum(map(self._expected_seconds, group)), reverse=True)

    def _tasks(self, state: State, round_index: int, group: Sequence[int]) -> list[Task]:
        """The tasks of participants that are trained at once."""
        return [self._task(state, round_index, participant) for participant in group]

    def _task(self, state: State, round_index: int, participant: int) -> Task:
        """A participant's task, and what it kept for itself."""
        task = self.method.assign(state, round_index, participant)
        memory = self.memories.get(participant)
        return task if memory is None else replace(task, memory=memory)

    def _without_memory(self, update: Update) -> Update:
        """The update as the server sees it. What the participant keeps is put aside for its next round."""
        if not update.memory:
            return update
        # Copies: what came through a pipe is a view of the whole message, which would stay as well.
        self.memories[update.participant] = {name: tensor.clone() for name, tensor in update.memory.items()}
        return replace(update, memory={})

    def _recalibrated(
        self, state: dict[str, Tensor], round_index: int, participants: Sequence[int]
    ) -> tuple[dict[str, Tensor], int]:
        """The state with its running statistics, if any, measured anew, and the bytes that moved."""
        method = self.method
        if not isinstance(method, Recalibrating) or not method.recalibrates:
            return state, 0
        jobs = [
            partial(_measurements, method, state, round_index, participant) for participant in participants
        ]
        finished = list(self.workers.run("measure", jobs))
        moved = sum(done.bytes_down + done.bytes_up for done in finished)
        return method.settle(state, [done.update for done in finished]), moved

    def _expected_seconds(self, participant: int) -> float:
        """How long a participant will take, roughly: the longest goes first, so that all end together."""
        if participant in self.seconds:
            return self.seconds[participant]
        known = sum(len(self.data[other]) for other in self.seconds)
        rate = sum(self.seconds.values()) / known if known else 1.0
        return len(self.data[participant]) * rate


def _measurements(method: Recalibrating, state: State, round_index: int, participant: int) -> list[Task]:
    return [method.measurement(state, round_index, participant)]


def _result(done: Done) -> ParticipantResult:
    update = done.update
    return ParticipantResult(
        update.participant, update.loss, update.examples, done.bytes_down, done.bytes_up, done.seconds
    )
