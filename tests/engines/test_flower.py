"""The engine of Flower: one message for each task, and whatever may come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from averaging import Averaging, Counting, some_data

pytest.importorskip("flwr", reason="needs flwr")

from asking import Asking
from flower_grid import AGREED, QUICK, FakeGrid, Node, participant
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from msfusion.engines.flower import nodes
from msfusion.engines.flower.engine import FlowerEngine
from msfusion.engines.flower.frames import FORMAT, Done, Here, Lost, Unfit
from msfusion.engines.flower.nodes import Waiting
from msfusion.engines.flower.records import BODY, FRAME, records_of
from msfusion.engines.grpc.packing import pack
from msfusion.errors import ConfigError, MsfusionError, RunDirectoryError, StreamError, TrainingError
from msfusion.federated.engine import Answer, Ask, Engine, InProcess
from msfusion.federated.messages import encode
from msfusion.federated.method import Method
from msfusion.federated.results import RoundResult
from msfusion.federated.rounds import RoundSettings, run_rounds

DATA = some_data(3)
COUNTS = [len(own) for own in DATA]
FIRST = 70
"""The number of participant 0's node."""


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LOOK_SECONDS", 0.01)


def grid_of(method: Callable[[], Method] = Averaging, **more: Any) -> FakeGrid:
    return FakeGrid({FIRST + who: participant(method, who, own, **more) for who, own in enumerate(DATA)})


def engine_of(
    grid: FakeGrid, waiting: Waiting = QUICK, examples: Sequence[int | None] = COUNTS
) -> FlowerEngine:
    return FlowerEngine(grid, examples, AGREED, waiting)


def rounds(method: Method, engine: Engine, count: int = 3, **more: Any) -> list[RoundResult]:
    return list(run_rounds(method, DATA, RoundSettings(rounds=count), engine=engine, **more))


def answers(grid: FakeGrid, method: Method | None = None, waiting: Waiting = QUICK) -> dict[int, Answer]:
    """What the engine makes of one round, by participant."""
    method, engine = method or Averaging(), engine_of(grid, waiting)
    engine.open(DATA)
    state = method.initial_state()
    asks = [Ask("train", lambda who=who: [method.assign(state, 0, who)]) for who in range(len(DATA))]
    return {each.update.participant: each for each in engine.run(method, asks)}


def equal(one: Sequence[RoundResult], other: Sequence[RoundResult]) -> bool:
    return all(
        a.state.keys() == b.state.keys()
        and all(torch.equal(a.state[each], b.state[each]) for each in a.state)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("method", [Averaging, Counting])
@pytest.mark.parametrize("folder", [False, True])
def test_it_ends_with_the_bits_of_one_process(
    method: Callable[[], Method], folder: bool, tmp_path: Path
) -> None:
    grid = grid_of(method, folder=tmp_path if folder else None)
    there = rounds(method(), engine_of(grid))
    here = rounds(method(), InProcess())
    assert equal(there, here)
    kinds = [sent.metadata.message_type for sent, _ in grid.told]
    assert kinds == ["query"] * 3 + ["train"] * 9
    assert {sent.metadata.group_id for sent, _ in grid.told[3:]} == {"1", "2", "3"}


def test_what_is_kept_stays_where_it_is(tmp_path: Path) -> None:
    """The server sees a receipt, Flower's context or the folder the rest."""
    grid = grid_of(Counting)
    last = rounds(Counting(), engine_of(grid))[-1]
    assert all([*memory] == ["kept in round"] for memory in last.memories.values())
    assert [*grid.nodes[FIRST].state] == ["msfusion.kept.2", "msfusion.kept.3"]

    grid = grid_of(Counting, folder=tmp_path)
    engine = engine_of(grid)
    rounds(Counting(), engine)
    assert not grid.nodes[FIRST].state
    folder, log = (each for each in sorted(tmp_path.iterdir()) if each.name.startswith("participant-0"))
    assert (folder / "kept-000003.safetensors").exists()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [each["kind"] for each in lines] == ["hello", "update", "update", "update"]
    engine.say_over(3)
    assert not folder.exists()


def test_a_run_goes_on_with_files_and_without_them_is_refused(tmp_path: Path) -> None:
    begun = rounds(Counting(), engine_of(grid_of(Counting, folder=tmp_path)))
    going_on = {"state": begun[1].state, "memories": begun[1].memories, "first_round": 2}
    again = rounds(Counting(), engine_of(grid_of(Counting, folder=tmp_path)), **going_on)
    assert equal(again, begun[2:])
    with pytest.raises(RunDirectoryError, match=r"participant \d has lost what it kept in round 2"):
        rounds(Counting(), engine_of(grid_of(Counting)), **going_on)


def test_one_that_loses_its_memory_in_the_middle_is_left_out() -> None:
    grid = grid_of(Counting)

    def before(message: Message) -> None:
        if message.metadata.group_id == "2":
            grid.nodes[FIRST + 1].state = RecordDict()

    grid.before = before
    results = rounds(Counting(), engine_of(grid))
    assert [[each.participant for each in result.left_out] for result in results] == [[], [1], [1]]
    assert "lost what it kept in round 1" in results[1].left_out[0].reason


@pytest.mark.parametrize("folder", [False, True])
def test_a_task_that_is_done_twice_is_done_once(folder: bool, tmp_path: Path) -> None:
    """The reply is lost after the participant has kept what it goes on from; Flower asks for it again."""
    grid, lost = grid_of(Counting, folder=tmp_path if folder else None), list[Message]()
    node = grid.nodes[FIRST + 1]
    real = node.app

    def app(message: Message, context: Context) -> Message:
        answer = real(message, context)
        if message.metadata.group_id == "2" and not lost:
            lost.append(answer)
            return Message(Error(4, "Reply message objects are unavailable"), reply_to=message)
        return answer

    node.app = app
    assert equal(rounds(Counting(), engine_of(grid)), rounds(Counting(), InProcess()))
    assert lost


@pytest.mark.parametrize("code", [1, 2, 8])
@pytest.mark.parametrize("times", [2, 3])
def test_a_node_that_cannot_say_who_it_is_is_asked_again_and_then_ends_the_run(code: int, times: int) -> None:
    """Its ClientApp was killed, or cannot be loaded. The run would begin without it when patience is over."""
    grid, failed = grid_of(Averaging), list[Message]()
    node = grid.nodes[FIRST + 1]
    real = node.app

    def app(message: Message, context: Context) -> Message:
        if len(failed) < times:
            failed.append(message)
            return Message(Error(code, "ClientApp stopped responding."), reply_to=message)
        return real(message, context)

    node.app = app
    if times < nodes.MOST_ASKED:
        assert equal(rounds(Averaging(), engine_of(grid)), rounds(Averaging(), InProcess()))
    else:
        with pytest.raises(StreamError, match=f"node {FIRST + 1} cannot take part: Flower's error {code}"):
            rounds(Averaging(), engine_of(grid))
    assert len(failed) == times


def test_why_a_participant_failed_stays_with_it() -> None:
    grid = grid_of(lambda: Averaging((1,), "data"))
    done = answers(grid)
    assert isinstance(done[1].failure, TrainingError)
    assert "told in the log of its SuperNode" in str(done[1].failure)
    assert all("label" not in str(reply.content) for _, reply in grid.told if reply.has_content())
    assert done[0].failure is None


def replying(reply: Callable[[Message, Message], Message]) -> dict[int, Answer]:
    """A round in which participant 1 sends this, made of its task and of its honest reply."""
    grid = grid_of()
    node = grid.nodes[FIRST + 1]
    real = node.app

    def app(message: Message, context: Context) -> Message:
        answer = real(message, context)
        return reply(message, answer) if message.metadata.message_type == "train" else answer

    node.app = app
    return answers(grid)


def content(records: dict[str, Any]) -> Callable[[Message, Message], Message]:
    return lambda task, _: Message(RecordDict(records), reply_to=task)


def body(message: bytes) -> Callable[[Message, Message], Message]:
    return lambda task, _: Message(records_of(pack(Done()), message), reply_to=task)


UPDATE = {"participant": 1, "round_index": 0, "examples": 2, "loss": 0.5, "metadata": {}, "seconds": 0.1}
FRAME_OF_DONE = ConfigRecord({"bytes": pack(Done())})
TENSORS = Averaging().initial_state()
HOSTILE: dict[str, Callable[[Message, Message], Message]] = {
    "nothing": content({}),
    "others records": content({"arrays": ArrayRecord({"w": Array(torch.ones(2).numpy())})}),
    "a frame that is none": content({FRAME: ConfigRecord({"bytes": b"\x00" * 99})}),
    "a frame that is no bytes": content({FRAME: ConfigRecord({"bytes": 7})}),
    "an endless frame": content({FRAME: ConfigRecord({"bytes": b"\x00" * 2**18})}),
    "another frame": content({FRAME: ConfigRecord({"bytes": pack(Unfit("no", False))})}),
    "no update": content({FRAME: FRAME_OF_DONE}),
    "an update that is no array": content({FRAME: FRAME_OF_DONE, BODY: ConfigRecord({"bytes": b"7"})}),
    "a pickled array": content(
        {FRAME: FRAME_OF_DONE, BODY: ArrayRecord({"bytes": Array("O", (1,), "numpy.ndarray", b"\x80\x04N.")})}
    ),
    "more records": content({FRAME: FRAME_OF_DONE, "more": ConfigRecord({"x": 1})}),
    "an endless update": body(b"\x00" * 2**20),
    "no safetensors": body(b"\x00" * 100),
    "what is not declared": body(encode({**UPDATE, "remembers": False}, {"other": torch.ones(3)})),
    "another shape": body(encode({**UPDATE, "remembers": False}, {**TENSORS, "weight": torch.ones(5)})),
    "no header": body(encode({}, TENSORS)),
    "endless seconds": body(encode({**UPDATE, "seconds": float("inf"), "remembers": False}, TENSORS)),
    "that it crashed": lambda task, _: Message(Error(8, "a very " + "long " * 999), reply_to=task),
    "that its app raised": lambda task, _: Message(Error(2, "\x1b[31mred"), reply_to=task),
    "that it lost what it never had": lambda task, _: Message(records_of(pack(Lost(0))), reply_to=task),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whoever_sends_no_update_is_left_out_and_nobody_else(name: str) -> None:
    done = replying(HOSTILE[name])
    assert isinstance(done[1].failure, MsfusionError)
    assert "\x1b" not in str(done[1].failure)
    assert len(str(done[1].failure)) < 600
    assert [done[who].failure for who in (0, 2)] == [None, None]


def test_an_honest_reply_counts() -> None:
    """What the hostile ones differ from."""
    done = replying(lambda _, answer: answer)
    assert done[1].failure is None
    assert done[1].update.examples == 2


def test_whose_update_it_is_says_the_server() -> None:
    done = replying(body(encode({**UPDATE, "participant": 0, "round_index": 9, "remembers": False}, TENSORS)))
    assert done[1].failure is None
    assert (done[1].update.participant, done[1].update.round_index) == (1, 0)


def test_nobody_keeps_what_there_is_not() -> None:
    class Forgetful(Averaging):
        remembers = False

    forged = body(encode({**UPDATE, "remembers": True}, TENSORS))
    assert replying(forged)[1].update.memory
    grid = grid_of(Forgetful)
    real = grid.nodes[FIRST + 1].app
    grid.nodes[FIRST + 1].app = lambda message, context: (
        forged(message, message) if message.metadata.message_type == "train" else real(message, context)
    )
    assert isinstance(answers(grid, Forgetful())[1].failure, StreamError)


def test_one_that_goes_away_with_its_task_gets_it_again() -> None:
    grid, gone = grid_of(Counting), list[Message]()

    def before(message: Message) -> None:
        if message.metadata.group_id == "2" and message.metadata.dst_node_id == FIRST + 1 and not gone:
            gone.append(message)
            grid.nodes[FIRST + 1].away = 3

    grid.before = before
    assert equal(rounds(Counting(), engine_of(grid)), rounds(Counting(), InProcess()))
    assert gone


def test_one_that_stays_away_is_left_out_after_its_patience() -> None:
    grid = grid_of()

    def before(message: Message) -> None:
        if message.metadata.message_type == "train":
            grid.nodes[FIRST + 1].away = 10**9

    grid.before = before
    done = answers(grid, waiting=replace(QUICK, patience=0.3))
    assert "participant 1 has been away for 0.3 seconds" in str(done[1].failure)
    assert done[0].failure is None


def test_one_that_comes_back_under_another_number_takes_part_again() -> None:
    """A SuperNode without a key is another node when it is started again."""
    grid = grid_of()
    waiting = replace(QUICK, patience=3.0, look_every=0.02)

    def before(message: Message) -> None:
        if message.metadata.group_id == "1" and message.metadata.dst_node_id == FIRST + 1:
            grid.nodes[99] = grid.nodes.pop(FIRST + 1)

    grid.before = before
    assert equal(rounds(Averaging(), engine_of(grid, waiting)), rounds(Averaging(), InProcess()))


def test_one_that_says_nothing_is_left_out_after_the_deadline() -> None:
    grid = grid_of()
    real = grid.nodes[FIRST + 1].app

    def app(message: Message, context: Context) -> Message:
        grid.nodes[FIRST + 1].mute = 1
        return real(message, context)

    grid.nodes[FIRST + 1].app = app  # it says who it is, and no more
    done = answers(grid, waiting=replace(QUICK, deadline=0.2))
    assert "participant 1 has had its task for 0.2 seconds" in str(done[1].failure)
    assert done[2].failure is None


def test_nobody_there_is_one_sentence() -> None:
    with pytest.raises(StreamError, match=r"no participant has come for 0\.1 seconds: start SuperNodes"):
        rounds(Averaging(), engine_of(FakeGrid({}), replace(QUICK, patience=0.1)))


def test_who_has_not_come_is_left_out_and_named() -> None:
    grid, said = grid_of(), list[str]()
    del grid.nodes[FIRST + 2]
    done = answers(grid, waiting=replace(QUICK, patience=0.2, on_event=said.append))
    assert "--node-config 'partition-id=2'" in str(done[2].failure)
    assert any("participant 2 has not come" in each for each in said)


def answering(frame: object) -> Node:
    return Node(lambda message, _: Message(records_of(pack(frame)), reply_to=message))


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (Here(FORMAT, 1, 2, AGREED), "it is participant 1, and so is node"),
        (Here(FORMAT, 1, 2, {"model": "large"}), "the participant's model is 'large'"),
        (Here(FORMAT, 2, 7, AGREED), "has 7 examples, and for the server 3"),
        (Here(FORMAT + 1, 2, 3, AGREED), "version of the messages"),
        (Here(FORMAT, 9, 3, AGREED), "there is no participant 9"),
        (Unfit("it has no number", False), "it has no number"),
        (Done(), "a message of the kind Here or Unfit"),
    ],
)
def test_whoever_does_not_fit_is_refused_by_name(frame: object, why: str) -> None:
    grid = grid_of()
    grid.nodes = {FIRST: grid.nodes[FIRST], FIRST + 1: grid.nodes[FIRST + 1], 99: answering(frame)}
    with pytest.raises(StreamError, match="node 99 cannot take part") as refused:
        rounds(Averaging(), engine_of(grid))
    assert why in str(refused.value)


@pytest.mark.parametrize("spare", [False, True])
def test_what_a_node_says_begins_no_line_of_a_log(spare: bool) -> None:
    grid, said = grid_of(), list[str]()
    grid.nodes[99] = answering(Unfit("\x1b[2Jgone\nmsfusion: all is well " + "!" * 3000, spare))
    engine = engine_of(grid, replace(QUICK, on_event=said.append))
    with nullcontext() if spare else pytest.raises(StreamError) as refused:
        rounds(Averaging(), engine)
    (told,) = [each for each in said if "node 99" in each] if refused is None else [str(refused.value)]
    assert "\\x1b[2Jgone msfusion: all is well" in told
    assert told.isprintable()
    assert len(told) < 1000


def test_a_node_that_nobody_needs_is_let_be() -> None:
    grid = grid_of()
    grid.nodes[99] = answering(Unfit("there is no participant 3", True))
    assert equal(rounds(Averaging(), engine_of(grid)), rounds(Averaging(), InProcess()))


def test_only_participants_know_how_many_examples_they_have() -> None:
    engine = engine_of(grid_of(), examples=[None] * 3)
    assert engine.examples_of_all() == COUNTS
    few = grid_of()
    del few.nodes[FIRST + 1]
    with pytest.raises(StreamError, match="participant 1 has not come"):
        engine_of(few, replace(QUICK, patience=0.1), [None] * 3).examples_of_all()
    many = FlowerEngine(grid_of(), [None] * 3, AGREED, QUICK, most_examples=2)
    with pytest.raises(StreamError, match="participant 2 has 3 examples: it must be from 1 to 2"):
        many.examples_of_all()


def test_a_participant_whose_data_change_does_nothing() -> None:
    grid = grid_of()
    changed = participant(Averaging, 1, DATA[2])

    def before(message: Message) -> None:
        if message.metadata.message_type == "train":
            grid.nodes[FIRST + 1] = changed

    grid.before = before
    assert isinstance(answers(grid)[1].failure, TrainingError)


def test_a_node_does_not_do_another_ones_work() -> None:
    grid = grid_of()

    def before(message: Message) -> None:
        if message.metadata.message_type == "train":
            grid.nodes[FIRST + 1] = grid.nodes[FIRST]

    grid.before = before
    assert isinstance(answers(grid)[1].failure, TrainingError)


def test_methods_that_converse_are_refused() -> None:
    with pytest.raises(ConfigError, match="msfusion serve"):
        rounds(Asking(), engine_of(grid_of()), 1)


@pytest.mark.parametrize("setting", ["patience", "deadline", "look_every"])
def test_nobody_waits_for_no_time(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        Waiting(**{setting: 0.0})
