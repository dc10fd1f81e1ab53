"""The rounds of a federation, for any method and any engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import CodecError, ConfigError, DataError, MsfusionError, SumError, TrainingError
from msfusion.federated.conversation import Conversation
from msfusion.federated.engine import Answer, Ask, Engine, InProcess, threads_set
from msfusion.federated.late import LateUpdate, with_late, without_late
from msfusion.federated.memory import Memories
from msfusion.federated.method import Evaluation, Method, Task, Update
from msfusion.federated.noise import fault_of_norm
from msfusion.federated.participation import Attendance, Calendar, Conditions, RoundSettings
from msfusion.federated.protected import as_run, check_protected_rounds
from msfusion.federated.reporting import Report, mean_of, reports_of
from msfusion.federated.results import LeftOut, ParticipantResult, RoundResult
from msfusion.federated.screening import (
    DEFAULT,
    Answers,
    Screening,
    fault_of_count,
    verdict_of,
)
from msfusion.federated.verdict import Norm
from msfusion.width.groups import State

__all__ = ["ParticipantResult", "RoundResult", "RoundSettings", "run_rounds"]


def run_rounds(
    method: Method,
    data: Sequence[Batch],
    settings: RoundSettings,
    *,
    engine: Engine | None = None,
    state: State | None = None,
    memories: Memories | None = None,
    first_round: int = 0,
    threads: int = 1,
    together: int = 1,
    test: Batch | None = None,
    conditions: Conditions | None = None,
    screening: Screening = DEFAULT,
    on_participant: Callable[[ParticipantResult], None] | None = None,
) -> Generator[RoundResult, None, None]:
    """Run the rounds first_round .. settings.rounds - 1 of a method, and hand on each as it ends.

    `data` has one Batch per participant. `engine` carries out what participants do (default: this process does, one
    after the other); the results are the same, bit for bit, whichever it is. `state` is the global state to begin with
    (default: the method's own initial state), `memories` what each participant has kept from earlier rounds (default:
    nothing), as in the result of the round before `first_round`. `conditions` say who is absent or late (default:
    nobody), `screening` what becomes of bad updates (default: they are left out, and the round's result names them).
    `threads` is how many threads PyTorch uses in this process while a round runs. `together` is how many participants
    are trained at once, where the method can; the results are then the same but for rounding. `on_participant` is
    called in this process for each participant as it finishes, in no particular order.

    Processes are forked: call `torch.set_num_threads(1)` before anything else if this process computes on its
    own. Closing the generator, or leaving it by an exception, closes the engine.

    Raises ConfigError or DataError at once for impossible settings; while running, what the method raises, UpdateError
    for a bad update that is to stop the run, TrainingError where a worker process dies, and the first participant's
    error where the work of nobody in a round counts, as in `Answers.stop_if_all_are_bad`.
    """
    for name, value in (("threads", threads), ("together", together)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    if together > 1:
        method.check_together()
    if not data:
        raise DataError("there are no participants: give at least one participant's data")
    for participant, own in enumerate(data):
        if len(own) == 0:
            raise DataError(
                f"participant {participant} has no examples: give it some or use fewer participants"
            )
    screening.check_examples(map(len, data))
    if method.sequential and conditions is not None and conditions.deadline is not None:
        raise ConfigError(
            f"participants of {method.name} come one after the other, so none can be late: leave the deadline out"
        )
    check_protected_rounds(method, settings, len(data), conditions, screening)
    method = as_run(method)
    if method.noise is not None:
        screening = replace(screening, max_update_norm=0.0)  # `fault_of_norm` takes its place
    calendar = Calendar(settings, len(data), conditions)
    federation = _Federation(
        method, data, settings, test, calendar, on_participant, memories or {}, together, screening
    )
    return _rounds(federation, state, first_round, engine or InProcess(), threads)


def _rounds(
    federation: _Federation,
    state: State | None,
    first_round: int,
    engine: Engine,
    threads: int,
) -> Generator[RoundResult, None, None]:
    """The generator behind `run_rounds`. The engine is opened with the first round."""
    current = federation.method.initial_state() if state is None else dict(state)
    with _taken(engine):
        for round_index in range(first_round, federation.settings.rounds):
            with threads_set(threads):
                if round_index == first_round:
                    engine.open(federation.data, federation.test)
                result = federation.round(engine, current, round_index)
            current = result.state
            yield result


@contextmanager
def _taken(engine: Engine) -> Iterator[None]:
    """The engine for these rounds alone; closed afterwards. Raises ConfigError where others have it.

    Rounds hand on what they have, and wait: another run could open the engine meanwhile, with other data.
    """
    if getattr(engine, "_taken", False):
        raise ConfigError(
            "this engine carries out the rounds of another run: give each run an engine of its own"
        )
    engine._taken = True  # type: ignore[attr-defined]  # an engine of a user's need not know of it
    try:
        yield
    finally:
        engine._taken = False  # type: ignore[attr-defined]
        engine.close()


class _Federation:
    """What stays from round to round: memories, late updates, and how long each participant really took."""

    def __init__(
        self,
        method: Method,
        data: Sequence[Batch],
        settings: RoundSettings,
        test: Batch | None,
        calendar: Calendar,
        on_participant: Callable[[ParticipantResult], None] | None,
        memories: Memories,
        together: int = 1,
        screening: Screening = DEFAULT,
    ) -> None:
        self.method, self.data, self.settings, self.test = method, data, settings, test
        self.calendar, self.on_participant = calendar, on_participant
        self.together, self.screening = together, screening
        self.seconds: dict[int, float] = {}
        self.memories, self.late = without_late(memories)
        self._arrived: dict[int, Task] = {}  # the tasks of the late updates that arrive in this round
        self._sent: dict[int, Task] = {}  # those of this round that went through a codec: they are small

    def round(self, engine: Engine, state: dict[str, Tensor], round_index: int) -> RoundResult:
        """One round: everybody trains, the server fuses what is good of it, and evaluates where that is due."""
        begin = time.perf_counter()
        self._sent.clear()
        attendance = self.calendar.round(round_index)
        conversation = self._conversation(engine, state, round_index)
        fused, results = state, dict[int, ParticipantResult]()
        with closing(Answers(self.screening, self.method.scoring.unit)) as answers:
            began = self._add_arriving(attendance, answers)
            for together in self._in_sequence(attendance, round_index):
                results |= self._trained(engine, conversation, together, fused, round_index, answers)
                learned = {} if conversation is None else conversation.state()
                merge = partial(self._fused, engine, fused, round_index)
                fused = answers.merged(merge, {**fused, **learned})
            self._stop_if_nothing_counts(engine, answers, len(results) + len(began), fused, round_index)
            for participant, memory in answers.memories.items():
                if participant not in answers.reasons:
                    self.memories[participant] = memory
        merged = [each for each in attendance.on_time if each not in answers.reasons]
        left_out = [
            _told(each, began, results if each.participant in attendance.on_time else {})
            for each in answers.left_out(round_index)
        ]
        evaluation, moved = None, 0
        reports: tuple[Report, ...] = ()
        last = round_index == self.settings.rounds - 1
        if last or (round_index + 1) % self.settings.evaluate_every == 0:
            fused, moved = self._recalibrated(engine, fused, round_index, merged, left_out)
            evaluation, reports, asking = self._evaluated(engine, fused, round_index, left_out)
            moved += asking
        arriving = tuple(each for each in sorted(began.items()) if each[0] not in answers.reasons)
        return RoundResult(
            round_index,
            fused,
            tuple(results[each] for each in merged),
            evaluation,
            time.perf_counter() - begin,
            moved,
            with_late(self.memories, self.late),
            replace(attendance, arriving=arriving),
            self._late_bytes(engine, state, round_index, attendance, results),
            reports,
            tuple(left_out),
            self._server_figures(conversation),
        )

    def _conversation(self, engine: Engine, state: State, round_index: int) -> Conversation | None:
        """Who answers what participants ask. Raises ConfigError where the engine cannot carry it."""
        conversation = self.method.conversation(state, round_index)
        if conversation is not None and not engine.converses:
            raise ConfigError(
                f"participants of {self.method.name} ask the server while they train, and the engine "
                f"{type(engine).__name__} does not carry that: use msfusion.InProcess or msfusion.Processes, "
                "or 'msfusion serve' over a network"
            )
        if conversation is not None:
            conversation.begin({who: len(own) for who, own in enumerate(self.data)})
        return conversation

    def _server_figures(self, conversation: Conversation | None) -> dict[str, float | int]:
        told = {} if conversation is None else conversation.figures()
        return {name: value for name, value in told.items() if name in self.method.metrics}

    def _in_sequence(self, attendance: Attendance, round_index: int) -> list[list[int]]:
        """Who of a round trains beside whom: everybody, or one after the other.

        A late update is put aside, and is among the answers of the round in which it arrives. If it is dropped, or
        arrives after the last round, nobody trains for it: that is known, and nothing of it would remain.
        """
        late = [each for each in attendance.late if self.calendar.is_merged(each, round_index)]
        everyone = [*attendance.on_time, *late]
        return [[each] for each in everyone] if self.method.sequential else [everyone]

    def _trained(
        self,
        engine: Engine,
        conversation: Conversation | None,
        participants: Sequence[int],
        state: State,
        round_index: int,
        answers: Answers,
    ) -> dict[int, ParticipantResult]:
        """These participants train beside each other, from a state; what each did, by participant."""
        late = self.calendar.round(round_index).late
        groups = self._groups(participants, round_index, conversation)
        asks = [
            Ask("train", partial(self._tasks, state, round_index, group), conversation, group)
            for group in groups
        ]
        results: dict[int, ParticipantResult] = {}
        for done in engine.run(self.method, asks):
            result = self._result(done)
            if result.participant in results:
                raise TrainingError(f"the engine answered twice for participant {result.participant}")
            who = result.participant
            results[who], self.seconds[who] = result, result.seconds
            if self.on_participant is not None:
                self.on_participant(result)
            if done.failure is not None:
                error = done.failure if conversation is None else _named(done.failure, who, round_index)
                answers.leave_out(who, str(done.failure), error)
            else:
                self._judge(done, state, who in late, answers)
        missing = sorted(set(participants) - results.keys())
        if missing:
            raise TrainingError(f"the engine gave no answer for participant {missing[0]}")
        return results

    def _result(self, done: Answer) -> ParticipantResult:
        update = done.update
        small = self.method.compression
        names = self.method.metrics | (frozenset() if small is None else small.metrics)
        metrics = {
            name: value
            for name, value in update.metadata.items()
            if name in names and not isinstance(value, str)
        }
        moved = done.bytes_down, done.bytes_up
        loss = update.loss if self.method.tells_losses else math.nan
        return ParticipantResult(update.participant, loss, update.examples, *moved, done.seconds, metrics)

    def _stop_if_nothing_counts(
        self, engine: Engine, answers: Answers, answered: int, fused: State, round_index: int
    ) -> None:
        """Raise the first reason where nobody's work of the round counts, or at the end nobody's of any round.

        The latter is seen by the state, which a resumed run has too: it is the one of the beginning.
        """
        answers.stop_if_all_are_bad(answered, len(self.data))
        doubtful = answers.reasons and round_index == self.settings.rounds - 1 and not self.memories
        if doubtful and engine.everywhere(self.method.begins_with(fused)):
            answers.stop("nobody's work of any round counts: the model is as it was at the beginning")

    def _judge(self, done: Answer, state: State, late: bool, answers: Answers) -> None:
        """Note an update as it comes, for this round or for the one in which it will arrive."""
        update, who = done.update, done.update.participant
        task = cache(lambda: self._received(state, update.round_index, who))
        small = self.method.compression
        known: State = {}
        if small is not None:
            try:
                update = small.updated(task(), update)
            except CodecError as error:
                answers.leave_out(who, f"its update cannot be read: {error}", error)
                return
            known = small.known(task())
        verdict = done.verdict or verdict_of(
            update,
            task().tensors,
            self.method.outbound("train", task()),
            len(self.data[who]),
            self.method.scoring.unit,
        )
        norm, fault = verdict.norm, verdict.fault
        if fault is None and self.method.noise is not None:
            fault = fault_of_norm(self.method.noise, update, norm)
        # a participant on this machine has kept what it knows itself
        memory, update = _copies({**known, **update.memory}), replace(update, memory={})
        if late:
            kept = replace(update, tensors=_copies(update.tensors))
            self.late[who] = LateUpdate(replace(task(), tensors=_copies(task().tensors)), kept, norm, fault)
            if memory and fault is None:
                self.memories[who] = memory
            return
        answers.add(update, norm, fault)
        if memory:
            answers.memories[who] = memory

    def _fused(
        self, engine: Engine, before: State, round_index: int, state: State, updates: Iterable[Update]
    ) -> dict[str, Tensor]:
        """What the method makes of the state and of what was sent and came back.

        `before` is the state that tasks were made of; in `state` is also what the server has learned since.
        """
        fused = self.method.fuse(state, self._answered(round_index, before, updates))
        name = self.method.name
        if not isinstance(fused, dict):
            raise TrainingError(f"{name}: fuse made a {type(fused).__name__}: return the next state, a dict")
        infinite = [
            key
            for key, tensor in fused.items()
            if not _is_finite(tensor) and (key not in before or _is_finite(before[key]))
        ]
        if not engine.everywhere(not infinite):
            told = f"made {infinite[0]!r}" if infinite else "made a tensor"
            raise TrainingError(
                f"{name}: fuse {told} not finite (NaN or infinite) in round {round_index + 1}, of updates that are"
            )
        return fused

    def _answered(
        self, round_index: int, state: State, updates: Iterable[Update]
    ) -> Iterator[tuple[Task, Update]]:
        """Each update with its task: of an earlier round as it was kept, of this one made again if it is looked at."""
        for update in updates:
            if update.round_index == round_index:
                make = partial(self._received, state, round_index, update.participant)
                yield _made_again(make, update), update
            else:
                yield self._arrived[update.participant], update

    def _add_arriving(self, attendance: Attendance, answers: Answers) -> dict[int, int]:
        """Add the late updates that arrive; the rounds in which those participants began."""
        began: dict[int, int] = {}
        self._arrived = {}
        for participant, round_index in attendance.arriving:
            late = self.late.pop(participant, None)
            if late is not None:  # else its training came to no end, and that was told then
                share = self.calendar.conditions.late_weight
                answers.add(replace(late.update, share=share), late.norm, late.fault)
                self._arrived[participant] = late.task
                began[participant] = round_index
        return began

    def _late_bytes(
        self,
        engine: Engine,
        state: State,
        round_index: int,
        attendance: Attendance,
        results: Mapping[int, ParticipantResult],
    ) -> tuple[int, int]:
        """What went down to the late and what comes up from them: nothing from those whose work is lost."""
        lost = [each for each in attendance.late if each not in results]
        down = sum(results[each].bytes_down for each in attendance.late if each in results)
        down += sum(engine.payload(self._task(state, round_index, each)) for each in lost)
        return down, sum(results[each].bytes_up for each in attendance.late if each in results)

    def _groups(
        self, participants: Sequence[int], round_index: int, conversation: Conversation | None
    ) -> list[tuple[int, ...]]:
        """Who is trained at once; the longest goes first. The groups depend on nothing that was measured.

        In a conversation the order decides what the server does, so there it is that of the participants' numbers.
        """
        groups: list[tuple[int, ...]] = [(participant,) for participant in participants]
        if conversation is not None:
            return sorted(groups)
        if self.together > 1:
            groups = self.method.groups(round_index, participants, self.data, self.together)
        return sorted(groups, key=lambda group: sum(map(self._expected_seconds, group)), reverse=True)

    def _tasks(self, state: State, round_index: int, group: Sequence[int]) -> list[Task]:
        """The tasks of participants that are trained at once."""
        return [self._task(state, round_index, participant) for participant in group]

    def _task(self, state: State, round_index: int, participant: int) -> Task:
        """A participant's task as it is sent, and what it kept for itself."""
        if participant in self._sent:
            return self._sent[participant]
        task = self.method.assign(state, round_index, participant)
        memory = self.memories.get(participant) or self.method.simulated_memory(participant)
        task = replace(task, memory=memory) if memory else task
        small = self.method.compression
        if small is None or small.down is None:
            return task
        return self._sent.setdefault(participant, small.sent(task))

    def _received(self, state: State, round_index: int, participant: int) -> Task:
        """A participant's task as it can read it."""
        small = self.method.compression
        if small is None:
            return self.method.assign(state, round_index, participant)
        return small.received(self._task(state, round_index, participant))

    def _recalibrated(
        self,
        engine: Engine,
        state: dict[str, Tensor],
        round_index: int,
        participants: Sequence[int],
        left_out: list[LeftOut],
    ) -> tuple[dict[str, Tensor], int]:
        """The state with its running statistics, if any, measured anew, and the bytes that moved."""
        method = self.method
        if not method.recalibrates or not participants:
            return state, 0
        asks = [
            Ask(
                "measure", partial(_measurements, method, state, round_index, participant), who=(participant,)
            )
            for participant in participants
        ]
        finished = list(engine.run(method, asks))
        with closing(Answers(replace(self.screening, max_update_norm=0.0))) as answers:
            for done in finished:
                who = done.update.participant
                if done.failure is not None:
                    answers.leave_out(who, str(done.failure), done.failure)
                else:
                    answers.add(done.update, Norm(), fault_of_count(done.update, len(self.data[who])))
            settled = answers.merged(method.settle, state)
            answers.stop_if_all_are_bad(len(finished), len(self.data))
        left_out += answers.left_out(round_index, "what it measured is not used: ")
        return settled, sum(done.bytes_down + done.bytes_up for done in finished)

    def _evaluated(
        self, engine: Engine, state: State, round_index: int, left_out: list[LeftOut]
    ) -> tuple[Evaluation | None, tuple[Report, ...], int]:
        """How good the model is, or the participants' models are; and the bytes that asking them moved."""
        method, test = self.method, self.test
        if test is None:
            return None, (), 0
        if not method.asks(state):
            return method.evaluate(state, test), (), 0
        asks = [
            Ask("report", partial(self._examination, state, round_index, each), who=(each,))
            for each in range(len(self.data))
        ]
        finished = list(engine.run(method, asks))
        reports: list[Report] = []
        faults = Answers(self.screening)
        for done in sorted(finished, key=lambda done: done.update.participant):
            try:
                if done.failure is not None:
                    raise done.failure
                reports += reports_of([done.update])
            except MsfusionError as error:
                faults.leave_out(done.update.participant, str(error), error)
        faults.stop_if_asked()
        faults.stop_if_all_are_bad(len(finished), len(self.data))
        left_out += faults.left_out(round_index, "its report is not used: ")
        moved = sum(done.bytes_down + done.bytes_up for done in finished)
        return mean_of(reports), tuple(reports), moved

    def _examination(self, state: State, round_index: int, participant: int) -> list[Task]:
        """What a participant needs in order to say how good its model is."""
        task = self.method.examination(state, round_index, participant)
        return [replace(task, memory=self.memories.get(participant, {}))]

    def _expected_seconds(self, participant: int) -> float:
        """How long a participant will take, roughly: the longest goes first, so that all end together."""
        if participant in self.seconds:
            return self.seconds[participant]
        known = sum(len(self.data[other]) for other in self.seconds)
        rate = sum(self.seconds.values()) / known if known else 1.0
        return len(self.data[participant]) * rate


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


Value = TypeVar("Value")


class _Later(Mapping[str, Value]):
    """A mapping that is made when it is first looked at."""

    def __init__(self, make: Callable[[], Mapping[str, Value]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, Value]:
        return self._make()

    def __getitem__(self, name: str) -> Value:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def _made_again(make: Callable[[], Task], update: Update) -> Task:
    """The task that an update of this round answers. Most methods fuse without it, so it is only made if one looks."""
    made = cache(make)
    tensors, metadata = _Later(lambda: made().tensors), _Later(lambda: made().metadata)
    return Task(update.participant, update.round_index, tensors, metadata)


def _named(failure: MsfusionError, participant: int, round_index: int) -> MsfusionError:
    """Why a participant failed, saying which: the server that answers it need not know."""
    who = f"participant {participant}"
    if who in str(failure) or isinstance(failure, ConfigError | SumError):
        return failure
    named = TrainingError(f"{failure} (round {round_index + 1}, {who})")
    named.__cause__ = failure
    return named


def _told(each: LeftOut, began: Mapping[int, int], results: Mapping[int, ParticipantResult]) -> LeftOut:
    """The same with the round in which the participant began, and the bytes that it moved in this one."""
    told = replace(each, round_index=began.get(each.participant, each.round_index))
    result = results.get(each.participant)
    return told if result is None else replace(told, bytes_down=result.bytes_down, bytes_up=result.bytes_up)


def _measurements(method: Method, state: State, round_index: int, participant: int) -> list[Task]:
    return [method.measurement(state, round_index, participant)]


def _copies(tensors: State) -> dict[str, Tensor]:
    """Copies to be kept: what came through a pipe is a view of the whole message, which would stay as well.

    Their entries lie in order, as they do after a pipe or a checkpoint: in another order sums are rounded otherwise.
    """
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
