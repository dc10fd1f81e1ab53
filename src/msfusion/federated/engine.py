"""The contract of engines, the simplest of them (this process itself), and the server's side of a conversation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from msfusion.batch import Batch
from msfusion.errors import ConfigError, MsfusionError, TrainingError
from msfusion.federated.conversation import Conversation, Request, Response
from msfusion.federated.method import Kind, Method, Task, Update
from msfusion.federated.states import payload_bytes
from msfusion.federated.verdict import Verdict
from msfusion.federated.work import Finished, Said, Talk, Told, perform, say_next, talk
from msfusion.registry import Registry


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
