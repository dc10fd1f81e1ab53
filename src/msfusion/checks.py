"""The project's own oracles, for parts that others write: each raises CheckError, which says the law that is broken.

In a test of one's own:

    msfusion.check_method(MyMethod())
    msfusion.check_engine(MyEngine())
    msfusion.check_codec(MyCodec())
    msfusion.check_schedule(my_schedule)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from msfusion import codecs
from msfusion.batch import Batch
from msfusion.engines.processes import Processes
from msfusion.errors import CheckError, CodecError, MsfusionError
from msfusion.federated.capacities import Capacities
from msfusion.federated.conversation import Conversation, Request, Response
from msfusion.federated.engine import Answer, Ask, Engine, answer_to
from msfusion.federated.messages import decode, task_message, task_of, update_message, update_of
from msfusion.federated.method import Answered, Kind, Method, Task, Update
from msfusion.federated.participation import Conditions, RoundSettings
from msfusion.federated.privacy import Outbound
from msfusion.federated.problem import Problem, Settings
from msfusion.federated.results import RoundResult
from msfusion.federated.rounds import run_rounds
from msfusion.federated.training import TrainingSettings
from msfusion.federated.work import perform
from msfusion.imports import in_one_line
from msfusion.methods.settings import capacities_of
from msfusion.seeds import seeded
from msfusion.width.groups import State, WidthMap
from msfusion.width.trace import trace
from msfusion.windows import CheckedSchedule, Schedule

PARTICIPANTS, ROUNDS = 3, 3


def check_method(settings: Settings, *, model: nn.Module | None = None, ratio: Any = 0.5) -> None:
    """Whether a method keeps the laws on which everything else relies, on a small model with running statistics.

    1.  The first state and every task are the same whenever they are asked for, and a state is never changed.
    2.  Nothing undeclared leaves a participant, whatever carries it: tasks and updates pass as bytes.
    3.  The next state is the same for any order of the answers.
    4.  A run is the same in one process, in two, and when it goes on after any round.
    5.  An update that comes late, and counts in part, is taken.
    6.  The trained model can be evaluated, and all its values are finite.

    `model` is another one to try it on, for inputs [examples, 6] and three classes. Raises CheckError.
    """
    with _as_laws():
        _check_method(settings, model, ratio)


@contextmanager
def _as_laws() -> Iterator[None]:
    """Make any other error of ours the law that is broken."""
    try:
        yield
    except CheckError:
        raise
    except MsfusionError as error:
        raise CheckError(str(error)) from error
    except Exception as error:  # of the part that is checked
        raise CheckError(f"it raises {type(error).__name__}: {in_one_line(error)}") from error


def _check_method(settings: Settings, model: nn.Module | None, ratio: Any) -> None:
    method, data = _built(settings, model, ratio), _examples()
    first = method.initial_state()
    _same(first, method.initial_state(), "initial_state: two calls differ")
    before = {name: tensor.clone() for name, tensor in first.items()}
    tasks = [method.assign(first, 0, each) for each in range(PARTICIPANTS)]
    _same(before, first, "assign: the global state was changed in place")
    for task in tasks:
        again = method.assign(first, 0, task.participant)
        _same(task.tensors, again.tensors, "assign: two calls with the same arguments differ")
        _law(task.metadata == again.metadata, "assign: two calls with the same arguments differ in metadata")
    conversation = method.conversation(first, 0)
    updates = [_answer(method, task, own, conversation) for task, own in zip(tasks, data, strict=True)]
    answered = list(zip(tasks, updates, strict=True))
    learned = first if conversation is None else {**first, **conversation.state()}
    fused = method.fuse(learned, iter(answered))
    _same(before, first, "train, answer or fuse: the global state was changed in place")
    _same(
        fused, method.fuse(learned, reversed(answered)), "fuse: the order of the answers makes a difference"
    )
    method.fuse(learned, [(tasks[0], replace(updates[0], share=0.5)), *answered[1:]])
    _check_runs(settings, model, ratio, data, converses=conversation is not None)


def _check_runs(
    settings: Settings, model: nn.Module | None, ratio: Any, data: Sequence[Batch], *, converses: bool
) -> None:
    """Laws 2 and 4 to 6, on whole runs."""

    def run(**options: Any) -> list[RoundResult]:
        chosen = RoundSettings(ROUNDS, evaluate_every=ROUNDS)
        return list(run_rounds(_built(settings, model, ratio), data, chosen, test=data[0], **options))

    whole = run()
    last = whole[-1]
    _law(
        all(bool(tensor.isfinite().all()) for tensor in last.state.values() if tensor.is_floating_point()),
        "the state after three rounds is not finite",
    )
    _law(
        last.evaluation is not None and math.isfinite(last.evaluation.loss),
        "evaluate: the loss after three rounds is not finite",
    )
    _law(not last.left_out, f"a participant's work was refused: {[each.reason for each in last.left_out]}")
    if not converses:  # else two processes show the same
        _same(
            last.state,
            run(engine=Bytes())[-1].state,
            "as bytes: a task or update that travels loses something",
        )
    _same(last.state, run(engine=Processes(2))[-1].state, "two processes: the result is another one")
    for done in range(1, ROUNDS):
        half = whole[done - 1]
        rest = run(state=half.state, memories=half.memories, first_round=done)
        _same(last.state, rest[-1].state, f"a run that goes on after round {done} ends in another state")
    if _built(settings, model, ratio).sequential:
        return  # one after the other, nobody is late
    late = Conditions(
        seconds=lambda who, round_index: 2.0 if who == 1 else 0.5, deadline=1.0, late="downweight"
    )
    run(conditions=late)


def check_engine(engine: Engine) -> None:
    """Whether an engine carries tasks and updates as they are, and tells what goes wrong.

    1.  Runs end in the state of those in one process, bit for bit; whatever a participant remembers comes back to it.
    2.  What a participant raises is the failure of its answer, and the others' answers are there.
    3.  What a method does not declare is refused, and nothing of it arrives.
    4.  Asks are taken up in their order, and an engine that was closed can be opened again.

    Raises CheckError.
    """
    with _as_laws():
        data, settings = _examples(), RoundSettings(ROUNDS, evaluate_every=ROUNDS)
        expected = list(run_rounds(_Probe(), data, settings, test=data[0]))
        for _ in range(2):  # opened again
            found = list(run_rounds(_Probe(), data, settings, test=data[0], engine=engine))
            for ours, theirs in zip(expected, found, strict=True):
                _same(ours.state, theirs.state, "the state of a round is not that of a run in one process")
                _law(
                    ours.memories.keys() == theirs.memories.keys(),
                    "what participants remember does not come back",
                )
                moved = [(each.bytes_down, each.bytes_up) for each in ours.participants]
                theirs_moved = [(each.bytes_down, each.bytes_up) for each in theirs.participants]
                _law(moved == theirs_moved, "bytes_down and bytes_up are not the tensors' own sizes")
        _check_failures(engine, data)


def _check_failures(engine: Engine, data: Sequence[Batch]) -> None:
    for failing, law in (
        ("raises", "what a participant raises is not the failure of its answer"),
        ("leaks", "what a method does not declare is not refused"),
    ):
        probe = _Probe(failing)
        state, made = probe.initial_state(), list[int]()

        def tasks(
            who: int, probe: Method = probe, state: State = state, made: list[int] = made
        ) -> list[Task]:
            made.append(who)
            return [probe.assign(state, 0, who)]

        engine.open(data, data[0])
        try:
            asks = [Ask("train", partial(tasks, who)) for who in range(PARTICIPANTS)]
            answers = {each.update.participant: each for each in engine.run(probe, asks)}
        finally:
            engine.close()
        _law(
            sorted(answers) == list(range(PARTICIPANTS)),
            f"with a participant that {failing} answers are missing",
        )
        _law(isinstance(answers[1].failure, MsfusionError) and not answers[1].update.tensors, law)
        _law(
            all(answers[who].failure is None for who in (0, 2)), f"one participant {failing}, and others fail"
        )
        _law(made == sorted(made), "asks are not taken up in their order")


def check_codec(codec: codecs.Codec, *, tolerance: float | None = None) -> None:
    """Whether a codec writes messages that any side can read, and reads nothing else.

    1.  A message decodes, by the codec and by `codecs.decode`, to the dtype and shape that were sent; twice the same.
    2.  The same tensor gives the same bytes; no message is longer than `encoded_size` says.
    3.  Messages that are cut off, lengthened or have a flipped bit are decoded or raise CodecError, and nothing else;
        what they are decoded to is finite, unless the codec carries NaN on purpose.
    4.  With a `tolerance`, no value comes back further off than that, in units of the largest.

    Raises CheckError.
    """
    with _as_laws():
        generator = torch.Generator().manual_seed(0)
        for shape in ((), (0, 3), (1,), (7,), (2, 3, 5), (64, 33)):
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                for signed in (False, True):
                    tensor = torch.randn(shape, generator=generator).to(dtype)
                    _check_message(codec, tensor if signed else tensor.relu(), tolerance)
        _check_message(codec, torch.tensor([1e6, -7e4, 1.0, 3e38, -1e-30]), None)
        message = codec.encode(torch.randn(40, generator=generator))
        finite = not _takes_nan(codec)
        for _ in range(2000):
            _check_hostile(_damaged(message, generator), finite)


def _takes_nan(codec: codecs.Codec) -> bool:
    """Whether a codec carries values that are not finite, on purpose."""
    try:
        codec.encode(torch.tensor([math.nan, 1.0]))
    except CodecError:
        return False
    return True


def _check_message(codec: codecs.Codec, tensor: Tensor, tolerance: float | None) -> None:
    about = f"{codec.name}, {tensor.dtype} of shape {list(tensor.shape)}"
    message = codec.encode(tensor)
    _law(message == codec.encode(tensor.clone()), f"{about}: the same tensor gives other bytes")
    most = codec.encoded_size(tuple(tensor.shape), tensor.dtype, signed=True)
    _law(len(message) <= most, f"{about}: a message of {len(message)} bytes, and encoded_size says {most}")
    try:
        found, by_anyone = codec.decode(message), codecs.decode(message)
    except CodecError as error:
        raise CheckError(f"{about}: its own message is refused ({error})") from error
    _law(
        found.dtype == tensor.dtype and found.shape == tensor.shape,
        f"{about}: decoded to another dtype or shape",
    )
    _law(torch.equal(found, by_anyone), f"{about}: codecs.decode gives something else")
    if tolerance is not None and tensor.numel():
        far = float((found.double() - tensor.double()).abs().max())
        most_far = tolerance * float(tensor.double().abs().max())
        _law(far <= most_far, f"{about}: a value comes back {far:.3g} off, more than {most_far:.3g}")


def _damaged(message: bytes, generator: torch.Generator) -> bytes:
    """A message with one thing wrong."""

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    kind, changed = draw(4), bytearray(message)
    if kind == 0:
        return bytes(changed[: draw(len(changed))])
    if kind == 1:
        return bytes(changed) + bytes(draw(256) for _ in range(1 + draw(8)))
    for _ in range(1 if kind == 2 else 8):
        changed[draw(len(changed))] ^= 1 << draw(8)
    return bytes(changed)


def _check_hostile(message: bytes, finite: bool) -> None:
    try:
        found = codecs.decode(message, max_elements=2**16)
    except CodecError:
        return
    except Exception as error:
        raise CheckError(f"hostile bytes raise {type(error).__name__} ({error}), not CodecError") from error
    _law(
        not finite or bool(found.isfinite().all()), "hostile bytes are decoded to values that are not finite"
    )


def check_schedule(schedule: Schedule, *, width_map: WidthMap | None = None) -> None:
    """Whether a schedule gives windows, on a small model.

    1.  Every group has its window: as many units as the ratio asks for, in range, none twice, as int64.
    2.  The same arguments give the same window; ratio 1 gives all units.

    Raises CheckError.
    """
    with _as_laws():
        model = _network()
        known = trace(model, (torch.zeros(2, 6),)) if width_map is None else width_map
        of_state = {"state": model.state_dict()} if getattr(schedule, "of_state", False) else {}
        if of_state and width_map is not None:
            raise CheckError(
                "a schedule that goes by the weights is checked on the small model: leave width_map out"
            )

        checked = CheckedSchedule(schedule)  # as in a run: names, sizes, dtype, and the same when asked again
        for ratio, who, round_index in product((0.1, 0.25, 0.5, 1.0), range(4), (0, 1, 7)):
            window = checked(known, who, round_index, ratio, participants=4, seed=3, **of_state)
            for group in known.groups:
                units, about = window[group.name], f"group {group.name} at ratio {ratio}: "
                _law(len(set(units.tolist())) == len(units), f"{about}a unit is there twice")
                _law(bool(((units >= 0) & (units < group.units)).all()), f"{about}units out of range")


class Bytes(Engine):
    """Everything as bytes, both ways, in this process: stands for any transport."""

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        """Keep them."""
        self._data, self._test = data, test

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """One after the other."""
        for ask in asks:
            for task in ask.tasks():
                header, tensors = decode(task_message(ask.kind, task))
                there = task_of(header, tensors, dict(task.memory))
                (found,), seconds = perform(method, ask.kind, [there], self._data, test=self._test)
                if isinstance(found, MsfusionError):
                    yield answer_to(task, found, seconds)
                    continue
                back, *_ = update_of(*decode(update_message(found, seconds)))
                yield answer_to(task, replace(back, memory=found.memory), seconds)


class _Probe(Method):
    """Adds to the weights what participants have, and remembers; participant 1 may do what it must not."""

    name = "probe"

    def __init__(self, failing: str = "") -> None:
        self.failing, self.model = failing, _network()

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        return Task(participant, round_index, state, {"round": round_index})

    def train(self, task: Task, data: Batch) -> Update:
        if self.failing == "raises" and task.participant == 1:
            raise ValueError("as it was told to")
        assert isinstance(data.inputs, tuple)
        count = task.memory.get("count", torch.zeros(())) + 1
        change = data.inputs[0].mean() * count
        tensors = {n: t + change if t.is_floating_point() else t + 1 for n, t in task.tensors.items()}
        if self.failing == "leaks" and task.participant == 1:
            tensors["data"] = data.inputs[0]
        return Update(task.participant, task.round_index, tensors, len(data), 0.5, memory={"count": count})

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        return self.averaged(state, answered)

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        return Outbound.like(task.tensors)


def _network() -> nn.Module:
    """Inputs [examples, 6], three classes, running statistics."""
    with seeded(0):
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)
        )


def _examples() -> list[Batch]:
    """Participants with 8, 10 and 12 examples."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for count in (8, 10, 12):
        inputs = torch.randn(count, 6, generator=generator)
        found.append(Batch((inputs,), (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()))
    return found


def _built(settings: Settings, model: nn.Module | None, ratio: Any) -> Method:
    data = _examples()
    capacities: Capacities = capacities_of(getattr(settings, "ratio", ratio), PARTICIPANTS, 0)
    training = TrainingSettings("adamw", 0.01, batch_size=4, rounds=ROUNDS)
    problem = Problem(
        model or _network(),
        data[0].take(slice(0, 2)),
        capacities,
        (training,) * PARTICIPANTS,
        tuple(map(len, data)),
        ROUNDS,
    )
    with seeded(0):
        return settings.build(problem)


def _answer(method: Method, task: Task, data: Batch, conversation: Conversation | None) -> Update:
    """What may leave a participant of what it makes of a task. Raises CheckError where that is less than all."""

    def ask_server(request: Request) -> Response:
        assert conversation is not None
        (answer,) = conversation.answer([(task.participant, request)])
        if isinstance(answer, MsfusionError):
            raise answer
        return answer

    ask = None if conversation is None else ask_server
    ((found,), _) = perform(method, "train", [task], _by_participant(task, data), ask_server=ask)
    if isinstance(found, MsfusionError):
        raise CheckError(f"train: {found}") from found
    return replace(found, memory={})


def _by_participant(task: Task, data: Batch) -> list[Batch]:
    return [data] * (task.participant + 1)


def _law(holds: bool, law: str) -> None:
    if not holds:
        raise CheckError(law)


def _same(left: State, right: State, law: str) -> None:
    equal = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    _law(equal, law)
