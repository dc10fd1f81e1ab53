"""The contract of engines, the simplest of them (this process itself), and what is done where a participant is."""

from __future__ import annotations

import math
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import ConfigError, MsfusionError, PrivacyError, TrainingError
from msfusion.federated.conversation import Conversation, Request, Response
from msfusion.federated.method import Kind, Method, Released, Task, Training, Update
from msfusion.federated.privacy import check_dense, check_figures
from msfusion.federated.states import payload_bytes
from msfusion.federated.verdict import Verdict
from msfusion.imports import in_one_line, without_ending
from msfusion.registry import Registry
from msfusion.width.groups import State

CPU = torch.device("cpu")

Made = TypeVar("Made")


@dataclass(frozen=True)
class Ask:
    """What is asked of participants at once, mostly of one: what they are to do, and the tasks to do it with.

    `tasks` makes them. An engine calls it when somebody is about to take them up, so that tasks do not pile up in
    memory. `conversation` answers what the participants ask while they train; None where they ask nothing. All asks of
    a run have the same. `who` are the participants, where they are known before the tasks are made.
    """

    kind: Kind
    tasks: Callable[[], Sequence[Task]]
    conversation: Conversation | None = None
    who: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What came back for a task: the update, the seconds that it took (of several tasks at once an equal part), and the
    bytes that went down and up. Where the participant failed, `failure` says why, and the update is empty.
    `verdict` is there where the rounds see a part of the update, and somebody else has judged the whole of it.
    """

    update: Update
    seconds: float
    bytes_down: int
    bytes_up: int
    failure: MsfusionError | None = None
    verdict: Verdict | None = None


class Engine(ABC):
    """Whoever carries tasks to the participants and brings back what they answer. It knows no method.

    An engine of one's own has to have `run`. Where participants are elsewhere, with their data, `perform` is what is
    called there; where they are simulated on this machine, `open` hands over what they have. One that can carry what
    participants ask the server while they train says so in `converses`; `turn_by_turn` is its server's side, and
    `ask_server` of `perform`, or a `talk`, the participants'.
    """

    converses: ClassVar[bool] = False
    """Whether it heeds an ask's `conversation`. Else a method that needs one is refused."""

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:  # noqa: B027  # few need it
        """Before the first `run`: each simulated participant's examples, and the common test data.

        An engine whose participants have data of their own has no need of it.
        """

    @abstractmethod
    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """Have all asks done, taken up in this order; hand on what came back as it arrives, in any order.

        The method is the same at every call until `close`. What a participant raises is its answer's `failure`. What is
        nobody's fault alone, such as a worker process that dies, is raised here.
        """

    def close(self) -> None:  # noqa: B027  # few need it
        """Let go of all processes and connections. Afterwards the engine may be opened again."""

    # For an engine under which this process has a part of the state, and others have the rest.

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds for the whole state, which holds for what this process has of it."""
        return holds

    def payload(self, task: Task) -> int:
        """The bytes of all tensors of a task."""
        return payload_bytes(task.tensors)


ENGINES: Registry[Callable[[], Engine]] = Registry("engine", "run.engine")
"""What makes an engine, by name; `msfusion.engine` adds one."""


def engine(name: str) -> Callable[[Any], Any]:
    """A decorator that registers an engine's class, or a function that makes one. Raises ConfigError."""
    return ENGINES.add(name)


def engine_named(name: str) -> Engine:
    """The engine of that name, or of `module:Class`. Raises ConfigError where there is none, or it is no engine."""
    made = ENGINES[name]()
    if not isinstance(made, Engine):
        raise ConfigError(f"run.engine = '{name}' makes a {type(made).__name__}, which is no msfusion.Engine")
    return made


class InProcess(Engine):
    """The calling process does everybody's work, one after the other, on the CPU or on one GPU ("cuda").

    Raises ConfigError for a device that this machine does not have.
    """

    converses: ClassVar[bool] = True

    def __init__(self, device: str = "cpu") -> None:
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"device is {device!r}: it must be one of cpu, cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda', but PyTorch finds no GPU on this machine: set it to cpu")
        self._device = torch.device(device)
        self._data: Sequence[Batch] = ()
        self._test: Batch | None = None

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        """Keep them."""
        self._data, self._test = data, test

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """One after the other; in a conversation each says something in its turn."""
        if any(ask.conversation for ask in asks):
            yield from self._turn_by_turn(method, asks)
            return
        for ask in asks:
            tasks = ask.tasks()
            answers, seconds = perform(method, ask.kind, tasks, self._data, self._device, self._test)
            for task, each in zip(tasks, answers, strict=True):
                yield answer_to(task, each, seconds)

    def _turn_by_turn(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        talks: dict[int, Talk] = {}
        words: dict[int, Told | None] = {}

        def tell(who: int, word: Task | Told) -> None:
            if isinstance(word, Task):
                talks[who] = talk(method, word, self._data[who], self._device)
            words[who] = None if isinstance(word, Task) else word

        def hear(among: Sequence[int]) -> tuple[int, Said]:
            return among[0], say_next(talks[among[0]], words[among[0]])

        try:
            yield from turn_by_turn(asks, tell, hear)
        finally:
            for each in talks.values():
                each.close()


def answer_to(
    task: Task, answer: Update | MsfusionError, seconds: float, crossed: tuple[int, int] = (0, 0)
) -> Answer:
    """The answer to a task, from what the participant made of it or why it could not.

    `crossed` are the bytes of a conversation besides, down and up.
    """
    down, up = crossed
    down += payload_bytes(task.tensors)
    return answer_of(task.participant, task.round_index, answer, seconds, (down, up))


def answer_of(
    participant: int,
    round_index: int,
    answer: Update | MsfusionError,
    seconds: float,
    crossed: tuple[int, int],
) -> Answer:
    """The same where the task itself is not at hand; `crossed` are all bytes but those of the update."""
    down, up = crossed
    if isinstance(answer, MsfusionError):
        empty = Update(participant, round_index, {}, 0, math.nan)
        return Answer(empty, seconds, down, up, answer)
    return Answer(answer, seconds, down, up + payload_bytes(answer.tensors))


def perform(
    method: Method,
    kind: Kind,
    tasks: Sequence[Task],
    data: Sequence[Batch],
    device: torch.device = CPU,
    test: Batch | None = None,
    ask_server: Callable[[Request], Response] | None = None,
) -> tuple[list[Released | MsfusionError], float]:
    """The work of the participants of one job, and the seconds that it took for each.

    They train on the device; what arrives and what is returned is on the CPU. `test` is the common test data.
    A participant that fails, whatever it raises, has the reason in place of an update: so has one whose update is
    malformed or holds what may not leave, and nothing of it is sent then. `ask_server` carries a request to the server
    and waits for the response; what it raises is the participant's failure.
    Raises TrainingError where somebody's function would end the program.
    """
    begin = time.perf_counter()
    own = [data[task.participant] for task in tasks]
    with without_ending(TrainingError):
        if kind == "measure":
            answers = _each(method, kind, method.measure, tasks, own)
        elif kind == "train":
            answers = _train(method, _Training(device, ask_server), tasks, own)
        else:
            answers = _report(method, device, tasks, own, test)
    return answers, (time.perf_counter() - begin) / len(tasks)


def _attempt(task: Task, work: Callable[[], Made]) -> Made | MsfusionError:
    """What a participant's work makes, or why it failed."""
    try:
        return work()
    except Exception as error:
        return _failure(task, error)


def _failure(task: Task, error: Exception) -> MsfusionError:
    """Why a participant's work failed: our own errors as they are, others in a sentence.

    Others are of one participant's data or memory, as likely as of the program.
    """
    if isinstance(error, MsfusionError):
        return error
    traceback.clear_frames(error.__traceback__)  # in which the tensors of its training may be
    failure = TrainingError(
        f"participant {task.participant} failed in round {task.round_index + 1} "
        f"({type(error).__name__}: {in_one_line(error)})"
    )
    failure.__cause__ = error
    return failure


def _source(task: Task) -> str:
    return f"participant {task.participant} in round {task.round_index + 1}"


def _released(method: Method, kind: Kind, task: Task, update: object) -> Released:
    """The update as what may leave the participant, on the CPU. Raises PrivacyError."""
    source = _source(task)
    if not isinstance(update, Update):
        raise PrivacyError(f"{source} would send a {type(update).__name__}: send an Update")
    check_dense(update.tensors, source)
    check_dense(update.memory, source, "keep")
    check_figures(update.examples, update.loss, source)
    shared = method.outbound(kind, task).select(_on(CPU, update.tensors), update.metadata, source)
    memory = _on(CPU, update.memory)
    # whose update it is, of which round, and how much it counts are the engine's to say
    made = Update(
        task.participant, task.round_index, shared, update.examples, update.loss, update.metadata, memory
    )
    small = method.compression
    if small is None or kind != "train":
        return Released(made)
    coded = small.coded(task, made)
    outbound = small.outbound(task, method.outbound(kind, task))
    sent = outbound.select(coded.tensors, coded.metadata, source)
    return Released(replace(coded, tensors=sent, memory=_on(CPU, coded.memory)))


def _received(method: Method, task: Task) -> Task:
    """A task of training as it can be read from what was sent, on the CPU; its memory is all that is kept."""
    return task if method.compression is None else method.compression.received(task)


def _plain(method: Method, task: Task) -> Task:
    """A task as the method knows it."""
    return task if method.compression is None else method.compression.plain(task)


def _each(
    method: Method,
    kind: Kind,
    work: Callable[[Task, Batch], Update | Training],
    tasks: Sequence[Task],
    data: Sequence[Batch],
) -> list[Released | MsfusionError]:
    """One participant after the other."""

    def answer(task: Task, own: Batch) -> Released:
        if kind == "train":
            task = _received(method, task)
        return _released(method, kind, task, work(_plain(method, task), own))

    return [_attempt(task, partial(answer, task, own)) for task, own in zip(tasks, data, strict=True)]


@dataclass(frozen=True)
class _Training:
    """Where participants train, and who carries what they ask."""

    device: torch.device
    ask_server: Callable[[Request], Response] | None

    def alone(self, method: Method, task: Task, data: Batch) -> Update:
        """One of them trains by itself."""
        return _trained(method, self.ask_server, _task_on(self.device, task), data.to(self.device))

    def together(
        self, method: Method, tasks: Sequence[Task], data: Sequence[Batch]
    ) -> list[Released | MsfusionError]:
        """Several train at once; what the method raises is nobody's in particular."""
        received = [_received(method, task) for task in tasks]
        there = [_task_on(self.device, _plain(method, task)) for task in received]
        updates = method.train_together(there, [own.to(self.device) for own in data])
        return [
            _attempt(task, partial(_released, method, "train", task, update))
            for task, update in zip(received, updates, strict=True)
        ]


def _train(
    method: Method, training: _Training, tasks: Sequence[Task], data: Sequence[Batch]
) -> list[Released | MsfusionError]:
    train = partial(training.alone, method)
    if len(tasks) == 1:
        return _each(method, "train", train, tasks, data)
    try:
        return training.together(method, tasks, data)
    except Exception as error:  # one of them: each by itself, to know which
        alone = _each(method, "train", train, tasks, data)
        if isinstance(error, TrainingError) or any(isinstance(each, MsfusionError) for each in alone):
            return alone
        raise  # nobody's, but of training them together


def _report(
    method: Method, device: torch.device, tasks: Sequence[Task], data: Sequence[Batch], test: Batch | None
) -> list[Released | MsfusionError]:
    assert test is not None
    there = test.to(device)

    def report(task: Task, own: Batch) -> Update:
        return method.report(_task_on(device, task), own.to(device), there)

    return _each(method, "report", report, tasks, data)


# Conversations. Where a participant is, its training is a generator of requests; each is checked before it leaves.


def _trained(
    method: Method, ask_server: Callable[[Request], Response] | None, task: Task, data: Batch
) -> Update:
    """What a participant makes of its task, asking the server where it has a question."""
    made = method.train(task, data)
    if not isinstance(made, Generator):
        return made
    if ask_server is None:
        raise ConfigError(
            f"{method.name} asks the server while it trains, and nobody answers: give it a `conversation`, and an "
            "engine that carries it (msfusion.InProcess or msfusion.Processes)"
        )
    with closing(_checked(method, task, made)) as training:
        try:
            request = next(training)
            while True:
                request = training.send(ask_server(request))
        except StopIteration as end:
            update: Update = end.value
            return update


def _checked(method: Method, task: Task, training: Training) -> Training:
    """A participant's training, whose requests may leave: they are as declared, and on the CPU."""
    device = next((tensor.device for tensor in task.tensors.values()), CPU)
    with closing(training):
        try:
            request = next(training)
            while True:
                response = yield _released_request(method, task, request)
                request = training.send(replace(response, tensors=_on(device, response.tensors)))
        except StopIteration as end:
            update: Update = end.value
            return update


def _released_request(method: Method, task: Task, request: object) -> Request:
    """The request as what may leave the participant, its tensors `Shared`. Raises PrivacyError."""
    source = _source(task)
    if not isinstance(request, Request):
        raise PrivacyError(f"{source} would ask with a {type(request).__name__}: yield a Request")
    check_dense(request.tensors, source)
    tensors, declared = _on(CPU, request.tensors), method.outbound_request(task)
    shared = declared.select(tensors, request.metadata, source, request.pieces)
    return Request(request.pieces, shared, request.metadata)


@dataclass(frozen=True)
class Finished:
    """The end of a participant's talk: its update, or why it failed; and the seconds that it was at work."""

    answer: Released | MsfusionError
    seconds: float


Said = Request | Finished
"""What a participant says in its turn."""

Told = Response | MsfusionError
"""What it is told before; an error ends its talk."""

Talk = Generator[Request, Response | MsfusionError, Finished]


def talk(method: Method, task: Task, data: Batch, device: torch.device = CPU) -> Talk:
    """A participant's training in a conversation, to be gone on with by `say_next`. It raises nothing, as `perform`."""
    seconds, begin = 0.0, time.perf_counter()
    try:
        task = _received(method, task)
        there = _task_on(device, _plain(method, task))
        made = method.train(there, data.to(device))
        if isinstance(made, Generator):
            with closing(_checked(method, there, made)) as training:
                request = next(training)
                while True:
                    seconds += time.perf_counter() - begin
                    told = yield request
                    begin = time.perf_counter()
                    if isinstance(told, MsfusionError):
                        return Finished(told, seconds)
                    request = training.send(told)
    except StopIteration as end:
        made = end.value
    except Exception as error:
        return Finished(_failure(task, error), seconds)
    answer = _attempt(task, partial(_released, method, "train", task, made))
    return Finished(answer, seconds + time.perf_counter() - begin)


def say_next(talk: Talk, told: Told | None) -> Said:
    """What a participant says when it has been told something; None is its beginning.

    Raises TrainingError where its training would end the program.
    """
    with without_ending(TrainingError):
        try:
            return next(talk) if told is None else talk.send(told)
        except StopIteration as end:
            finished: Finished = end.value
            return finished


def turn_by_turn(
    asks: Sequence[Ask],
    tell: Callable[[int, Task | Told], None],
    hear: Callable[[Sequence[int]], tuple[int, Said]],
) -> Iterator[Answer]:
    """The server's side of a conversation, for any engine: all asks are begun, and answered turn by turn.

    `tell` hands a participant its task, later what it is told. `hear` waits for what one of some participants says; the
    first of them is the one that is waited for. All of them are at work: those that have asked, and wait for the turn
    to be whole, are not among them. Where the conversation allows it (`one_by_one`), each is answered in its turn
    without waiting for the others, which compute meanwhile.
    """
    tasks = {task.participant: task for ask in asks for task in ask.tasks()}
    conversation = next(ask.conversation for ask in asks if ask.conversation is not None)
    talking, heard, crossed = list(tasks), dict[int, Said](), dict.fromkeys(tasks, (0, 0))
    for who, task in tasks.items():
        tell(who, task)

    def answer(turn: list[tuple[int, Request]]) -> None:
        """Bytes of a request and its response count once it has been answered."""
        for (who, request), response in zip(turn, _answered(conversation, turn), strict=True):
            if isinstance(response, Response):
                down, up = crossed[who]
                crossed[who] = down + response.nbytes, up + request.nbytes
            tell(who, response)

    while talking:
        together: list[tuple[int, Request]] = []
        for who in list(talking):
            while who not in heard:
                wait = {who, *heard, *(asked for asked, _ in together)}
                others = [each for each in talking if each not in wait]
                speaker, said = hear([who, *others])
                heard[speaker] = said
            word = heard.pop(who)
            if isinstance(word, Finished):
                talking.remove(who)
                yield answer_to(tasks[who], word.answer, word.seconds, crossed[who])
            elif conversation.one_by_one:
                answer([(who, word)])
            else:
                together.append((who, word))
        answer(together)


def _answered(conversation: Conversation, turn: list[tuple[int, Request]]) -> list[Response | MsfusionError]:
    """What the server answers. Raises TrainingError where that is not one response, or error, for each request."""
    answers = list(conversation.answer(turn)) if turn else []
    if len(answers) != len(turn) or not all(isinstance(each, Response | MsfusionError) for each in answers):
        raise TrainingError(
            f"{type(conversation).__name__}.answer must give one Response for each of the {len(turn)} requests, or an "
            "error of msfusion"
        )
    return answers


def _task_on(device: torch.device, task: Task) -> Task:
    return replace(task, tensors=_on(device, task.tensors), memory=_on(device, task.memory))


def _on(device: torch.device, tensors: State) -> dict[str, Tensor]:
    """The tensors on a device, with their entries in order, as they come from a file, a pipe or a network.

    Tensors of equal numbers that lie otherwise (who has made one by a transposition) are summed up with other rounding:
    a participant whose memory stays in its own process would go on with other bits than one whose memory comes back.
    """
    return {name: tensor.to(device).contiguous() for name, tensor in tensors.items()}


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """PyTorch's threads in this process, put back afterwards."""
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if before != threads:
            torch.set_num_threads(before)
