"""Secure sums: the same bits as without masks, on every engine; what the server is sent says nothing but in the sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from averaging import Averaging
from averaging import some_data as vectors
from building import build_method
from loopback import AGREED as RUN
from loopback import NOTHING, Loopback
from torch import Tensor, nn

from msfusion import FedAvg, Federation
from msfusion.batch import Batch
from msfusion.codecs import DeadZone
from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.participant import take_part
from msfusion.engines.processes import Processes
from msfusion.errors import ConfigError, MsfusionError, StreamError, SumError, TrainingError, UpdateError
from msfusion.federated import rounds
from msfusion.federated.capacities import Capacities, OneOf
from msfusion.federated.compression import compressed
from msfusion.federated.conversation import Conversation, Request, Response
from msfusion.federated.engine import Answer, Ask, Engine, InProcess
from msfusion.federated.method import Method, Task, Update
from msfusion.federated.participation import Calendar, Conditions, RoundSettings
from msfusion.federated.protected import as_run, protected
from msfusion.federated.results import RoundResult
from msfusion.federated.screening import Screening
from msfusion.federated.secure_sums import (
    Roster,
    SecureMethod,
    SecureSums,
    Summand,
    SumOfRound,
)
from msfusion.federated.training import TrainingSettings
from msfusion.width.groups import State, WidthMap
from msfusion.width.trace import trace
from msfusion.windows import Feedback

ROUNDS, PEOPLE = 4, 5
TRAINING = TrainingSettings("adamw", learning_rate=0.02, batch_size=8)
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "small": {"name": "small", "weighting": "uniform"},
    "blocks": {"name": "msfusion", "start": "blocks", "passes": 2},
    "ensemble": {"name": "ensemble"},
    "heterofl": {"name": "heterofl"},
}


@cache
def wide() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, trace(model, (torch.randn(2, 6),))


@cache
def some_data() -> tuple[Batch, ...]:
    torch.manual_seed(1)
    return tuple(
        Batch((torch.randn(13 + each, 6),), torch.randint(3, (13 + each,))) for each in range(PEOPLE)
    )


SECRET = SecureMethod.secret


def secured(method: Method, secure: SecureSums) -> Method:
    return protected(method, secure, None, PEOPLE)


def plain(kind: str = "small") -> Method:
    settings = dict(METHODS[kind])
    method: Method = build_method(
        settings.pop("name"), *wide(), (0.25,) * PEOPLE, TRAINING, rounds=ROUNDS, **settings
    )
    return method


def secure(kind: str = "small", minimum: int = 3) -> Method:
    return secured(plain(kind), SecureSums(minimum))


def run(method: Method, engine: Engine | None = None, **more: Any) -> list[RoundResult]:
    settings = more.pop("settings", RoundSettings(ROUNDS))
    return list(rounds.run_rounds(method, some_data(), settings, engine=engine, **more))


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The same bits as the sum of the same numbers without any mask


def without_masks(
    method: Method, present: Sequence[Collection[int]], gone: Mapping[int, Collection[int]], minimum: int = 3
) -> list[dict[str, Tensor]]:
    """A readable reference: numbers of a fixed point are added up, and nobody hides anything.

    `present` are those who train in each round, `gone` those of them whose update does not get into the sum. With fewer
    than the minimum left a round does nothing.
    """
    state, states = method.initial_state(), []
    memories: dict[int, State] = {}
    for round_index, people in enumerate(present):
        tasks = {
            who: replace(method.assign(state, round_index, who), memory=memories.get(who, {}))
            for who in people
        }
        updates = {who: method.train(task, some_data()[who]) for who, task in tasks.items()}
        assert all(isinstance(update, Update) for update in updates.values())
        weights = {who: method.weight_in_sums(len(some_data()[who])) for who in people}
        scale = 2.0 ** (62 - 20 - sum(weights.values()).bit_length())
        left = [who for who in people if who not in gone.get(round_index, ())]
        if len(left) < minimum:
            states.append(state)
            continue
        weight = sum(weights[who] for who in left)
        answered: list[tuple[Task, Update]] = []
        means: dict[str, Tensor] = {}
        for name in updates[left[0]].tensors:
            total = 0
            for who in left:
                change = updates[who].tensors[name].double() - tasks[who].tensors[name].double()
                total = total + torch.round(change * weights[who] * scale).to(torch.int64)
            means[name] = total.double() / (weight * scale)
        for who in left:
            moved = {name: (tasks[who].tensors[name].double() + mean).float() for name, mean in means.items()}
            answered.append((tasks[who], replace(updates[who], tensors=moved)))
            memories[who] = updates[who].memory or memories.get(who, {})
        state = method.fuse(state, answered)
        states.append(state)
    return states


def in_one_process() -> Engine:
    return InProcess()


def in_two_processes() -> Engine:
    return Processes(workers=2)


def over_sockets() -> Engine:
    return Loopback()


ENGINES = [in_one_process, in_two_processes, over_sockets]


@pytest.mark.parametrize("kind", METHODS)
def test_the_bits_are_those_without_masks(kind: str) -> None:
    present = [range(PEOPLE)] * ROUNDS
    found = [each.state for each in run(secure(kind))]
    assert all(map(same, found, without_masks(plain(kind), present, {})))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.release] * (kind != "fedavg")) for kind in METHODS]
)
def test_the_sum_is_near_the_exact_mean(kind: str) -> None:
    """In the first round; later AdamW makes more of a difference than it is."""
    expected, found = run(plain(kind))[0].state, run(secure(kind))[0].state
    for name, tensor in expected.items():
        assert torch.allclose(tensor.double(), found[name].double(), rtol=1e-6, atol=1e-10), name


@pytest.mark.parametrize("engine", ENGINES)
def test_the_bits_are_those_without_masks_where_many_are_absent(engine: Callable[[], Engine]) -> None:
    conditions = Conditions(dropout=(0.3,) * PEOPLE)
    settings = RoundSettings(6, seed=2)
    calendar = Calendar(settings, PEOPLE, conditions)
    present = [calendar.round(index).on_time for index in range(6)]
    assert len(set(map(len, present))) > 1
    assert sum(map(len, present)) < 0.8 * 6 * PEOPLE
    assert min(map(len, present)) < 2
    done = run(secure(minimum=2), engine(), settings=settings, conditions=conditions)
    assert [each.server_figures["summed"] for each in done] == [
        len(each) if len(each) > 1 else 0 for each in present
    ]
    expected = without_masks(plain(), present, {}, minimum=2)
    assert all(map(same, [each.state for each in done], expected))


# Whoever drops out in the middle of the exchange


def dying(monkeypatch: pytest.MonkeyPatch, at: str, who: Collection[int], round_index: int = 1) -> None:
    """Some participants come to an end when they are to send this, in one round."""
    send = getattr(Summand, at)

    def dies(self: Any) -> Request:
        if self._task.participant in who and self._task.round_index == round_index:
            raise RuntimeError("out of memory")
        request: Request = send(self)
        return request

    monkeypatch.setattr(Summand, at, dies)


AT_LAST = ("pairs", (0, 4))


def drop_outs() -> list[Any]:
    """Each step on each engine; in CI all of them in one process, and the last on the others."""
    return [
        pytest.param(
            engine,
            at,
            who,
            marks=[pytest.mark.release] * (engine is not in_one_process and (at, who) != AT_LAST),
        )
        for engine in ENGINES
        for at in ("key", "masked", "pairs")
        for who in ((1,), (0, 4))
    ]


@pytest.mark.one_in_ci
@pytest.mark.parametrize(("engine", "at", "who"), drop_outs())
def test_whoever_drops_out_before_all_are_agreed_is_left_out_alone(
    monkeypatch: pytest.MonkeyPatch, engine: Callable[[], Engine], at: str, who: tuple[int, ...]
) -> None:
    dying(monkeypatch, at, who)
    done = run(secure(), engine())
    assert [[each.participant for each in result.left_out] for result in done] == [[], [*who], [], []]
    assert [each.server_figures["summed"] for each in done] == [5, 5 - len(who), 5, 5]
    present: list[Collection[int]] = [range(PEOPLE)] * ROUNDS
    if at == "key":  # nobody counts on them
        present[1] = [each for each in range(PEOPLE) if each not in who]
    expected = without_masks(plain(), present, {1: who})
    assert all(map(same, [each.state for each in done], expected))


def test_some_drop_out_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    dying(monkeypatch, "masked", [2])
    dying(monkeypatch, "pairs", [0])
    done = run(secure())
    assert [each.participant for each in done[1].left_out] == [0, 2]
    expected = without_masks(plain(), [range(PEOPLE)] * ROUNDS, {1: [0, 2]})
    assert all(map(same, [each.state for each in done], expected))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sum_that_can_no_longer_be_opened_safely_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, engine: Callable[[], Engine]
) -> None:
    """One is gone between the agreement and its own seed: nobody tells what it shares with it any more."""
    dying(monkeypatch, "own", [3])
    done = run(secure(), engine())
    assert same(done[1].state, done[0].state)
    assert not same(done[2].state, done[1].state)
    assert [each.participant for each in done[1].left_out] == [0, 1, 2, 3, 4]
    told = [each.reason for each in done[1].left_out if each.participant != 3]
    assert all("participant 3 was gone" in reason for reason in told)
    assert done[1].server_figures["summed"] == 0
    assert done[1].training_loss is None


@pytest.mark.parametrize("at", ["key", "masked", "pairs"])
def test_too_few_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    dying(monkeypatch, at, [1, 2, 3])
    done = run(secure())
    assert same(done[1].state, done[0].state)
    assert "2 participants are left" in done[1].left_out[0].reason
    assert not same(done[2].state, done[1].state)


def test_a_run_that_is_to_stop_at_a_bad_update_stops_at_a_sum_that_is_not_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dying(monkeypatch, "masked", [1, 2, 3])
    with pytest.raises(MsfusionError):
        run(secure(), screening=Screening("stop"))


def test_training_that_diverges_everywhere_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    method = secure()
    monkeypatch.setattr(type(method), "train", exploding(type(method).train))
    with pytest.raises(TrainingError, match="has changed by"):
        run(method)


def exploding(train: Any, who: Collection[int] = range(PEOPLE)) -> Any:
    def made(self: Any, task: Task, data: Batch) -> Update:
        update: Update = train(self, task, data)
        if task.participant not in who:
            return update
        name = min(update.tensors)
        return replace(update, tensors={**update.tensors, name: update.tensors[name] * 1e30})

    return made


def test_one_that_diverges_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    method = secure()
    monkeypatch.setattr(type(method), "train", exploding(type(method).train, [2]))
    done = run(method)
    assert [[each.participant for each in result.left_out] for result in done] == [[2]] * ROUNDS
    assert "has changed by" in done[0].left_out[0].reason


# Whoever is killed in the middle of the exchange, and started again


class Killed(BaseException):
    """The process has come to an end."""


class Restarting(Loopback):
    """Participants whose processes are started again where they were killed; with an example changed, if wanted."""

    def __init__(self, folder: Path, changed: bool) -> None:
        super().__init__()
        self.folder, self.changed = folder, changed

    def _take_part(self, method: Method, participant: int) -> None:
        data, connecting = self._data[participant], Connecting(self.address, NOTHING, 30.0)
        while True:
            try:
                take_part(
                    method,
                    data,
                    connecting,
                    participant=participant,
                    agreement=RUN,
                    folder=self.folder / str(participant),
                )
                return
            except StreamError:  # the test is over
                return
            except Killed:
                if self.changed:
                    assert isinstance(data.inputs, tuple)
                    data = replace(data, inputs=(data.inputs[0] + 1e-3,))


@pytest.mark.parametrize(
    ("at", "round_index", "changed"),
    [
        ("heard", 0, False),
        ("heard", 1, True),
        *(
            pytest.param(at, round_index, changed, marks=pytest.mark.release)
            for at in ("masked", "pairs", "own")
            for round_index in (0, 1)
            for changed in (False, True)
        ),
    ],
)
def test_whoever_is_killed_in_the_exchange_goes_on_with_the_same_update_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str, round_index: int, changed: bool
) -> None:
    """In its first round as well. With another update it would have the same masks, so it is left out."""
    working, keys, killed = getattr(Summand, at), list[bytes](), list[int]()
    key = Summand.key

    def noting(self: Summand) -> Request:
        request = key(self)
        if (self._task.participant, self._task.round_index) == (1, round_index):
            keys.append(request.tensors["key"].numpy().tobytes())
        return request

    def dies(self: Summand, *told: Any) -> Any:
        if (self._task.participant, self._task.round_index) == (1, round_index) and not killed:
            killed.append(1)
            raise Killed
        return working(self, *told)

    monkeypatch.setattr(Summand, "key", noting)
    monkeypatch.setattr(Summand, at, dies)
    done = run(secure(), Restarting(tmp_path, changed), settings=RoundSettings(2))
    assert len(keys) == 2
    assert (keys[0] == keys[1]) != changed
    if changed:
        assert 1 in [each.participant for each in done[round_index].left_out]
        return
    assert not done[round_index].left_out
    assert all(map(same, [each.state for each in done], [each.state for each in run(secure())]))


# Runs that go on


@pytest.mark.parametrize("kind", ["small", "blocks"])
def test_a_run_that_goes_on_has_the_same_bits(kind: str) -> None:
    whole = run(secure(kind))
    begun = run(secure(kind), settings=RoundSettings(2))[-1]
    assert all(SECRET in memory for memory in begun.memories.values())
    rest = run(
        secure(kind),
        state=begun.state,
        memories=begun.memories,
        first_round=2,
        settings=RoundSettings(ROUNDS),
    )
    assert [same(a.state, b.state) for a, b in zip(rest, whole[2:], strict=True)] == [True, True]
    for who, memory in whole[-1].memories.items():
        first, second = (
            {k: v for k, v in each.items() if k != SECRET} for each in (memory, rest[-1].memories[who])
        )
        assert same(first, second)
        assert torch.equal(rest[-1].memories[who][SECRET], begun.memories[who][SECRET])


def test_a_federation_takes_it_as_an_argument(tmp_path: Any) -> None:
    def made(**more: Any) -> Federation:
        return Federation(wide()[0], some_data(), FedAvg(), test=some_data()[0], **more)

    whole = made(secure=True)
    whole.fit(3)
    assert whole.history[-1].figures()["summed"] == PEOPLE
    first = made(secure=SecureSums(3))
    first.fit(3)
    assert same(first.state, whole.state)
    first.save(tmp_path)
    with pytest.raises(ConfigError, match="secure sums"):
        made().resume(tmp_path)
    with pytest.raises(ConfigError, match="secure sums"):
        made(secure=SecureSums(4)).resume(tmp_path)
    assert made(secure=True).resume(tmp_path).done == 3


# What the server is sent


class Overhearing(Engine):
    """One process, in which is heard what participants say and are told: (participant, request, response)."""

    converses = True

    def __init__(self) -> None:
        self.engine, self.heard = InProcess(), list[tuple[int, Request, Any]]()

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        self.engine.open(data, test)

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        assert asks[0].conversation is not None
        between = Between(asks[0].conversation, self.heard)
        yield from self.engine.run(method, [replace(ask, conversation=between) for ask in asks])


class Between(Conversation):
    def __init__(self, conversation: Conversation, heard: list[tuple[int, Request, Any]]) -> None:
        self._conversation, self._heard = conversation, heard

    def answer(self, turn: Sequence[tuple[int, Request]]) -> Sequence[Response | MsfusionError]:
        told = self._conversation.answer(turn)
        self._heard += [(who, request, each) for (who, request), each in zip(turn, told, strict=True)]
        return told


def sent(heard: Sequence[tuple[int, Request, Any]], name: str) -> dict[int, Tensor]:
    return {who: request.tensors[name] for who, request, _ in heard if name in request.tensors}


@cache
def overheard() -> tuple[Overhearing, RoundResult]:
    """One round of a larger model, so that there are numbers enough to count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 3))
    made: Method = build_method(
        "fedavg", model, trace(model, (torch.randn(2, 6),)), (1.0,) * PEOPLE, TRAINING, rounds=1
    )
    engine = Overhearing()
    (result,) = run(secured(made, SecureSums()), engine, settings=RoundSettings(1))
    return engine, result


def test_an_update_itself_has_no_tensors_and_the_loss_of_all() -> None:
    _, result = overheard()
    assert len({each.loss for each in result.participants}) == 1
    for each in run(secure())[0].participants:
        assert each.examples == 13 + each.participant


def test_what_is_sent_looks_like_noise() -> None:
    """Each byte of a masked update is as frequent as the others: 255 degrees of freedom, 4.5 standard deviations."""
    engine, _ = overheard()
    for numbers in sent(engine.heard, "masked").values():
        counts = np.bincount(numbers.numpy().view(np.uint8), minlength=256)
        expected = counts.sum() / 256
        squares = float(((counts - expected) ** 2 / expected).sum())
        assert abs(squares - 255) < 4.5 * (2 * 255) ** 0.5


def test_what_is_sent_goes_with_nothing() -> None:
    """Neither with what another sends nor with the sum; entries of a true update do, by 0.5 and more."""
    engine, result = overheard()
    masked = [each.double() for each in sent(engine.heard, "masked").values()]
    first = result.state
    started = build_first()
    change = torch.cat([(first[name] - started[name]).flatten() for name in sorted(first)]).double()
    others = [*masked, change, change.abs()]
    bound = 4.5 / len(change) ** 0.5
    for number, each in enumerate(masked):
        for other in others[:number] + others[number + 1 :]:
            both = torch.stack([each[: len(change)], other[: len(change)]])
            assert abs(float(torch.corrcoef(both)[0, 1])) < bound


def build_first() -> State:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 3)
    ).state_dict()


def test_the_sum_of_a_part_of_them_is_still_masked() -> None:
    """Also with their own masks taken away, which the server knows in the end."""
    from itertools import combinations

    from msfusion.federated.masks import add_stream, add_wrapping, is_a_sum

    engine, _ = overheard()
    masked, own = sent(engine.heard, "masked"), sent(engine.heard, "own")
    assert len(masked) == len(own) == PEOPLE
    for count in range(1, PEOPLE + 1):
        for some in combinations(range(PEOPLE), count):
            total = torch.zeros_like(masked[0])
            for who in some:
                add_wrapping(total, masked[who])
                add_stream(total, own[who].numpy().tobytes(), subtract=True)
            assert is_a_sum(total) == (count == PEOPLE)
            if count < PEOPLE:
                counts = np.bincount(total.numpy().view(np.uint8), minlength=256)
                expected = counts.sum() / 256
                assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 6 * (2 * 255) ** 0.5


def test_nothing_else_is_sent() -> None:
    engine, _ = overheard()
    entries = 6 * 300 + 300 + 300 * 100 + 100 + 100 * 3 + 3
    by_participant: dict[int, list[tuple[str, ...]]] = {}
    for who, request, _ in engine.heard:
        by_participant.setdefault(who, []).append((*request.tensors, *request.metadata))
        assert not request.pieces
    assert [*by_participant.values()] == [
        [("key", "examples"), ("masked",), ("pairs",), ("own",)],
    ] * PEOPLE
    assert {len(each) for each in sent(engine.heard, "masked").values()} == {entries + 1}
    assert {len(each) for each in sent(engine.heard, "pairs").values()} == {0}


def test_masks_of_another_attempt_are_others() -> None:
    """The same participants with the same secrets, in the same round: a server that was started again."""
    begun = run(secure(), settings=RoundSettings(1))[-1]

    def attempt() -> tuple[dict[int, Tensor], State]:
        engine = Overhearing()
        (result,) = run(
            secure(),
            engine,
            settings=RoundSettings(2),
            state=begun.state,
            memories=begun.memories,
            first_round=1,
        )
        return sent(engine.heard, "masked"), result.state

    (first, state), (second, other) = attempt(), attempt()
    assert same(state, other)
    for who in first:
        assert int((first[who] == second[who]).sum()) == 0


def test_the_key_of_another_update_is_another() -> None:
    """So its masks are others too, even for a server that says again what it said: the same masks on two updates of a
    round would cancel in their difference. The same update, of a participant that was killed, has the same key.
    """
    method = as_run(secure())
    assert isinstance(method, SecureMethod)
    task = method.assign(method.initial_state(), 0, 1)
    task = replace(task, memory={SECRET: torch.arange(32, dtype=torch.uint8)})
    own = some_data()[1]
    assert isinstance(own.inputs, tuple)
    changed = own.inputs[0].clone()
    changed[3, 2] += 1e-3
    sent = {name: tensor + 1e-3 for name, tensor in task.tensors.items()}
    keys = []
    for each, data in (
        (task, own),
        (task, own),
        (task, replace(own, inputs=(changed,))),
        (replace(task, tensors=sent), own),
        (replace(task, round_index=1), own),
    ):
        keys.append(next(method.train(each, data)).tensors["key"].numpy().tobytes())
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


# What a participant will not say


@dataclass
class Alone:
    """A participant in a round of a server that says what it likes."""

    method: SecureMethod
    task: Task

    @classmethod
    def of(cls, participant: int = 1, minimum: int = 3) -> Alone:
        method = as_run(secure(minimum=minimum))
        assert isinstance(method, SecureMethod)
        return cls(method, method.assign(method.initial_state(), 0, participant))

    def begin(self) -> tuple[Any, Request]:
        training = self.method.train(self.task, some_data()[self.task.participant])
        return training, next(training)


def others(mine: Request, participant: int = 1, people: int = 4) -> Roster:
    from msfusion.federated.masks import Identity

    keys = {who: Identity(bytes([who]) * 32).public_key for who in range(people)}
    keys[participant] = mine.tensors["key"].numpy().tobytes()
    return Roster(bytes(32), keys, {who: 13 + who for who in range(people)})


def dropped(*who: int) -> Response:
    return Response(tensors={"dropped": torch.tensor(who, dtype=torch.int64)})


AGREED = Response(metadata={"agreed": True})


def test_a_participant_tells_pairs_of_those_that_dropped_out_and_then_its_own_seed() -> None:
    training, mine = Alone.of().begin()
    assert set(training.send(others(mine).response()).tensors) == {"masked"}
    first = training.send(dropped(3)).tensors["pairs"]
    assert first.shape == (1, 32)
    own = training.send(AGREED).tensors
    assert set(own) == {"own"}
    with pytest.raises(StopIteration) as end:
        training.send(Response(metadata={"loss": 1.5}))
    assert end.value.value.loss == 1.5
    assert end.value.value.tensors == {}


@pytest.mark.parametrize(
    "told",
    [
        [dropped(1)],  # itself
        [dropped(7)],  # who was never there
        [dropped(2, 2)],
        [dropped(3), dropped(3)],  # twice
        [dropped(2, 3)],  # too few left
        [dropped(3), dropped(2)],
        [Response()],
        [Response(metadata={"agreed": 1})],
    ],
)
def test_what_contradicts_or_leaves_too_few_is_not_answered(told: list[Response]) -> None:
    training, mine = Alone.of().begin()
    training.send(others(mine).response())
    for response in told[:-1]:
        training.send(response)
    with pytest.raises(SumError):
        training.send(told[-1])
    with pytest.raises(StopIteration):  # and that was all
        training.send(AGREED)


def test_after_its_own_seed_nothing_is_told_of_anybody() -> None:
    training, mine = Alone.of().begin()
    training.send(others(mine).response())
    training.send(dropped())
    training.send(AGREED)
    with pytest.raises(SumError):
        training.send(dropped(3))


def test_lists_of_participants_that_cannot_be_are_refused() -> None:
    for wrong in wrong_rosters():
        training, mine = Alone.of().begin()
        with pytest.raises(SumError):
            training.send(wrong(others(mine)))


def first_two(roster: Roster) -> Roster:
    """Fewer than the minimum."""
    who = [*roster.keys][:2]
    return Roster(
        roster.nonce, {each: roster.keys[each] for each in who}, {each: roster.examples[each] for each in who}
    )


def wrong_rosters() -> list[Callable[[Roster], Response]]:
    def with_(roster: Roster, **tensors: Tensor) -> Response:
        told = roster.response()
        return replace(told, tensors={**told.tensors, **tensors})

    return [
        lambda roster: Response(),
        lambda roster: first_two(roster).response(),
        lambda roster: replace(
            roster, keys={**roster.keys, 1: bytes([9]) * 32}
        ).response(),  # another key of its own
        lambda roster: replace(roster, examples={**roster.examples, 1: 1000}).response(),
        lambda roster: replace(roster, keys={**roster.keys, 2: roster.keys[3]}).response(),  # one key of two
        lambda roster: replace(roster, keys={**roster.keys, 2: bytes(32)}).response(),  # a key of small order
        lambda roster: with_(roster, participants=torch.tensor([0, 1, 1, 2])),
        lambda roster: with_(roster, participants=torch.tensor([0, 1])),
        lambda roster: with_(roster, participants=torch.tensor(1)),
        lambda roster: with_(roster, examples=torch.tensor([1.5, 14, 2, 2])),
        lambda roster: with_(roster, examples=torch.tensor([-5, 14, 2, 2])),
    ]


# What the server will not believe


def test_a_wrong_seed_makes_no_model() -> None:
    """A participant that lies about its own seed: there is no sum, and the model stays as it was."""
    sending = Summand.own

    def lies(self: Summand) -> Request:
        request = sending(self)
        if self._task.participant == 2 and self._task.round_index == 1:
            return replace(request, tensors={"own": torch.zeros(32, dtype=torch.uint8)})
        return request

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Summand, "own", lies)
        done = run(secure())
    assert same(done[1].state, done[0].state)
    assert "wrong seed" in done[1].left_out[0].reason
    assert not same(done[2].state, done[1].state)


def test_whoever_says_something_else_than_is_due_is_left_out() -> None:
    method = as_run(secure())
    assert isinstance(method, SecureMethod)
    conversation = SumOfRound(method, method.initial_state(), 0)
    begun = {who: Alone.of(who).begin() for who in range(4)}
    turn = [(who, request) for who, (_, request) in begun.items()]
    strange = [
        (4, Request()),
        (5, Request(tensors=turn[0][1].tensors, metadata={"examples": 3})),  # participant 0's key
        (6, Request(tensors={"key": torch.ones(32, dtype=torch.uint8)}, metadata={"examples": 0})),
        (7, Request(tensors={"key": torch.ones(32, dtype=torch.uint8)}, metadata={"examples": True})),
    ]
    told = conversation.answer([*turn, *strange])
    assert all(isinstance(each, Response) for each in told[:4])
    assert all(isinstance(each, UpdateError) for each in told[4:])
    roster = Roster.of(told[0])  # type: ignore[arg-type]
    assert [*roster.keys] == [0, 1, 2, 3]
    assert roster.examples == {who: 13 + who for who in range(4)}


@pytest.mark.parametrize("count", [1, 2**40])
def test_whoever_says_another_number_of_examples_is_left_out(count: int) -> None:
    """It is a weight, and the scale of everybody's numbers: with 2^40 examples of one, others' changes were zero."""

    def lies(key: Any) -> Any:
        def lying(self: Summand) -> Request:
            request: Request = key(self)
            return replace(request, metadata={"examples": count}) if self._task.participant == 2 else request

        return lying

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Summand, "key", lies(Summand.key))
        done = run(secure(), settings=RoundSettings(2))
    assert [[each.participant for each in result.left_out] for result in done] == [[2], [2]]
    present = [[who for who in range(PEOPLE) if who != 2]] * 2
    assert all(map(same, [each.state for each in done], without_masks(plain(), present, {})))


@pytest.mark.parametrize("key", [bytes(32), bytes([1]) + bytes(31)], ids=["0", "1"])
def test_a_key_that_is_none_costs_its_sender_the_round_and_nobody_else(key: bytes) -> None:
    """Points of small order: whoever takes one up refuses it, so the server must not hand it on."""
    sending = Summand.key

    def lies(self: Summand) -> Request:
        request = sending(self)
        if self._task.participant != 2:
            return request
        return replace(request, tensors={"key": torch.tensor([*key], dtype=torch.uint8)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Summand, "key", lies)
        (result,) = run(secure(), settings=RoundSettings(1))
    assert [each.participant for each in result.left_out] == [2]
    assert result.server_figures["summed"] == PEOPLE - 1


# What does not go together


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (lambda: build_method("msfusion", *wide(), (0.25,) * PEOPLE, TRAINING), "different windows"),
        (lambda: build_method("fedrolex", *wide(), (0.25,) * PEOPLE, TRAINING), "different windows"),
        (lambda: build_method("feddropout", *wide(), (0.25,) * PEOPLE, TRAINING), "different windows"),
        (lambda: build_method("heterofl", *wide(), (0.25, 0.5), TRAINING), "different windows"),
        (lambda: build_method("heterofl", *wide(), drawn(), TRAINING), "different windows"),
        (
            lambda: build_method(
                "msfusion", *wide(), (0.25,) * PEOPLE, TRAINING, overlap=Feedback(start=0.6)
            ),
            "does not say that the sum",
        ),
        (lambda: build_method("msfusion", *wide(), (0.25,) * 4, TRAINING, start="copies"), "does not say"),
        (
            lambda: build_method("msfusion", *wide(), (0.25, 0.5), TRAINING, start="blocks"),
            "different ratios",
        ),
        (lambda: build_method("small", *wide(), (0.25,) * 4, TRAINING, average="median"), "method.average"),
        (lambda: build_method("fedavg", *wide(), (1.0,) * 4, TRAINING, average="median"), "method.average"),
        (lambda: compressed(plain(), DeadZone(step=1.5), None), "method.codec"),
        (lambda: compressed(plain(), None, DeadZone(step=1.5)), "method.codec"),
        (lambda: normed(), "method.recalibrate"),
        (lambda: Averaging(), "does not say that the sum"),
    ],
)
def test_methods_that_need_single_updates_are_refused(made: Callable[[], Method], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        secured(made(), SecureSums())


def drawn() -> Capacities:
    return Capacities((OneOf((0.25, 0.5)),) * PEOPLE)


def normed() -> Method:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    made: Method = build_method("fedavg", model, trace(model, (torch.randn(2, 6),)), (1.0,) * 4, TRAINING)
    return made


def test_batch_norm_is_averaged_where_it_is_not_measured_anew() -> None:
    """Its counter, which is a whole number, goes up as everywhere."""
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    width_map = trace(model, (torch.randn(2, 6),))
    ratios = (1.0,) * PEOPLE
    made = [
        build_method("fedavg", model, width_map, ratios, TRAINING, recalibrate=False, rounds=1)
        for _ in range(2)
    ]
    (expected,) = run(made[0], settings=RoundSettings(1))
    (found,) = run(secured(made[1], SecureSums()), settings=RoundSettings(1))
    assert int(found.state["1.num_batches_tracked"]) == int(expected.state["1.num_batches_tracked"]) > 0
    for name, tensor in expected.state.items():
        assert torch.allclose(tensor.double(), found.state[name].double(), rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"screening": Screening(max_update_norm=5.0)}, "method.max_update_norm"),
        (
            {"conditions": Conditions(seconds=lambda *_: 1.0, deadline=2.0, late="downweight")},
            "network.late",
        ),
        ({"settings": RoundSettings(2, count=2)}, "method.secure.minimum"),
    ],
)
def test_rounds_that_need_single_updates_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        run(secure(), **options)


def test_an_engine_that_carries_no_conversation_is_refused() -> None:
    class Silent(InProcess):
        converses = False

    with pytest.raises(ConfigError, match="the engine Silent does not carry"):
        run(secure(), Silent())


def test_a_minimum_of_one_is_no_sum() -> None:
    with pytest.raises(ConfigError, match=r"secure\.minimum is 1"):
        SecureSums(1)


class Plain(Averaging):
    """A method of a user's that says that the sum is enough; it weighs all alike."""

    def weight_in_sums(self, examples: int) -> int:
        return 1


@pytest.mark.parametrize("weight", [0, -1, 1.5, True, None])
def test_weights_that_are_none_are_refused(weight: Any) -> None:
    class Weightless(Averaging):
        def weight_in_sums(self, examples: int) -> int:
            given: int = weight
            return given

    with pytest.raises(ConfigError, match=r"weight_in_sums\(1\) gives"):
        secured(Weightless(), SecureSums())


def test_a_method_of_ones_own_goes_if_it_says_that_the_sum_is_enough() -> None:
    data = vectors()
    settings = RoundSettings(2)
    expected = [*rounds.run_rounds(Plain(), data, settings)][-1]
    found = [*rounds.run_rounds(secured(Plain(), SecureSums(2)), data, settings)][-1]
    for name, tensor in expected.state.items():
        assert torch.allclose(tensor, found.state[name], atol=1e-9)
