"""Absence, deadlines and the simulated clock, with rounds worked out by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from averaging import Averaging, Counting, some_data
from simulated import run_rounds
from test_rounds import outcome, same
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.federated.late import LATE, LateUpdate, with_late, without_late
from msfusion.federated.method import Task, Update
from msfusion.federated.participation import Attendance, Calendar, Conditions, Late, RoundSettings
from msfusion.federated.rounds import RoundResult
from msfusion.federated.verdict import Norm

TIMES = (1.0, 2.0, 9.0, 4.0, 3.0)
"""Seconds of five participants. With a deadline of 4 participant 2 misses two more rounds."""


def conditions(late: Late = "drop", deadline: float | None = 4.0) -> Conditions:
    return Conditions(seconds=lambda each, _: TIMES[each], deadline=deadline, late=late)


def calendar(late: Late = "drop", deadline: float | None = 4.0, rounds: int = 6) -> Calendar:
    return Calendar(RoundSettings(rounds=rounds), 5, conditions(late, deadline))


def test_without_conditions_everybody_is_there_and_there_is_no_clock() -> None:
    assert Calendar(RoundSettings(rounds=3), 4).round(2) == Attendance((0, 1, 2, 3))
    sampled = RoundSettings(rounds=3, fraction=0.5, seed=3)
    for index in range(3):
        assert Calendar(sampled, 6).round(index).on_time == sampled.participants_in(index, 6)


def test_a_round_lasts_as_long_as_its_slowest() -> None:
    seen = calendar(deadline=None).round(0)
    assert seen == Attendance((0, 1, 2, 3, 4), seconds=dict(enumerate(TIMES)), duration=9.0)


def test_at_the_deadline_who_is_late_is_dropped_and_free_again() -> None:
    for index in range(2):
        seen = calendar().round(index)
        assert (seen.on_time, seen.late, seen.arriving) == ((0, 1, 3, 4), (2,), ())
        assert seen.duration == 4.0
    in_time = calendar(deadline=9.0).round(0)
    assert (in_time.late, in_time.duration) == ((), 9.0)  # exactly at the deadline is in time


def test_a_late_update_arrives_in_a_later_round() -> None:
    days = calendar("downweight")
    rounds = [days.round(index) for index in range(6)]
    # round 0 ends at 4 with participant 2 under way until 9; round 1 ends at 8, round 2 at 12
    assert [seen.late for seen in rounds] == [(2,), (), (), (2,), (), ()]
    assert [seen.arriving for seen in rounds] == [(), (), ((2, 0),), (), (), ((2, 3),)]
    assert all(seen.on_time == (0, 1, 3, 4) for seen in rounds)
    assert all(seen.duration == 4.0 for seen in rounds)
    assert 2 not in rounds[1].seconds


def test_a_round_without_anybody_waits_for_its_deadline() -> None:
    slow = Conditions(seconds=lambda each, _: 9.0, deadline=4.0, late="downweight")
    days = Calendar(RoundSettings(rounds=4), 1, slow)
    assert [days.round(index).duration for index in range(4)] == [4.0] * 4
    assert [days.round(index).arriving for index in range(4)] == [(), (), ((0, 0),), ()]
    assert [days.round(index).on_time for index in range(4)] == [()] * 4


def test_absence_is_drawn_from_seed_round_and_participant() -> None:
    dropout = (0.0, 0.3, 0.3, 0.9)
    days = Calendar(RoundSettings(rounds=500, seed=4), 4, Conditions(dropout=dropout))
    absent = [days.round(index).absent for index in range(500)]
    shares = [sum(each in round_ for round_ in absent) / 500 for each in range(4)]
    assert shares[0] == 0
    assert shares[1:] == pytest.approx(dropout[1:], abs=0.08)
    assert [1 in each for each in absent] != [2 in each for each in absent]
    # a participant's draws know nothing of the others
    alone = Calendar(RoundSettings(rounds=500, seed=4), 4, Conditions(dropout=(0.0, 0.3, 0.0, 0.0)))
    assert [1 in each for each in absent] == [1 in alone.round(index).absent for index in range(500)]
    again = Calendar(RoundSettings(rounds=500, seed=4), 4, Conditions(dropout=dropout))
    assert again.round(499) == days.round(499)
    other = Calendar(RoundSettings(rounds=500, seed=5), 4, Conditions(dropout=dropout))
    assert [other.round(index).absent for index in range(500)] != absent
    for index in range(500):
        assert sorted(days.round(index).on_time + days.round(index).absent) == [0, 1, 2, 3]


def test_who_does_not_qualify_is_not_asked() -> None:
    def qualifies(participant: int, round_index: int) -> bool:
        return participant >= 2 and round_index != 1

    settings = RoundSettings(rounds=3, fraction=0.5, seed=1)
    days = Calendar(settings, 6, Conditions(qualifies=qualifies))
    assert len(days.round(0).on_time) == 2  # half of the four
    assert set(days.round(0).on_time) <= {2, 3, 4, 5}
    assert days.round(1) == Attendance(())
    few = Calendar(RoundSettings(rounds=3, count=5), 6, Conditions(qualifies=qualifies))
    assert few.round(0) == Attendance((2, 3, 4, 5))  # fewer qualify than are wanted


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"dropout": (0.5, 1.0)}, "the dropout of participant 1 is 1.0"),
        ({"deadline": 3.0}, "give their seconds"),
        ({"seconds": lambda *_: 1.0, "deadline": 0.0}, "deadline is 0.0"),
        ({"late_weight": 0.0}, "late_weight is 0.0"),
    ],
)
def test_impossible_conditions(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Conditions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="5 participants but 2 values of dropout"):
        Calendar(RoundSettings(rounds=1), 5, Conditions(dropout=(0.1, 0.1)))


class Listing(Averaging):
    """Notes whose updates it merged, of which round, and how much of each counted."""

    def fuse(self, state, answered):  # type: ignore[no-untyped-def]
        collected = list(answered)
        merged = torch.zeros(5, 2)
        for _, update in collected:
            merged[update.participant] = torch.tensor([update.round_index + 1, update.share])
        return {**super().fuse(state, collected), "merged": merged}

    def assign(self, state, round_index, participant):  # type: ignore[no-untyped-def]
        task = super().assign(state, round_index, participant)
        return Task(
            participant, round_index, {n: task.tensors[n] for n in ("weight", "steps")}, task.metadata
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_the_engine_merges_what_arrives(workers: int) -> None:
    days, chosen = calendar("downweight", rounds=4), RoundSettings(rounds=4)
    results = list(
        run_rounds(Listing(), some_data(), chosen, conditions=conditions("downweight"), workers=workers)
    )
    merged = [result.state["merged"].tolist() for result in results]
    for index in range(4):
        for participant in (0, 1, 3, 4):
            assert merged[index][participant] == [index + 1, 1.0]
    assert [round_[2] for round_ in merged] == [[0, 0], [0, 0], [1, 0.5], [0, 0]]
    assert [len(result.participants) for result in results] == [4] * 4
    assert [result.late_bytes for result in results] == [(24, 24), (0, 0), (0, 0), (24, 0)]
    assert [LATE in result.memories.get(2, {}) for result in results] == [True, True, False, False]
    assert all(result.attendance == days.round(index) for index, result in enumerate(results))


def test_nobody_trains_for_an_update_that_will_be_dropped() -> None:
    trained = []

    class Noting(Averaging):
        def train(self, task, data):  # type: ignore[no-untyped-def]
            trained.append(task.participant)
            return super().train(task, data)

    (result,) = run_rounds(Noting(), some_data(), RoundSettings(rounds=1), conditions=conditions())
    assert sorted(trained) == [0, 1, 3, 4]
    assert result.late_bytes == (24, 0)  # it had received its task


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("late", ["drop", "downweight"])
def test_going_on_from_any_round_is_the_undisturbed_run(late: Late, workers: int) -> None:
    chosen = RoundSettings(rounds=6, seed=7)
    whole = list(run_rounds(Counting(), some_data(), chosen, conditions=conditions(late)))
    for first in (1, 2, 3):
        before = whole[first - 1]
        go_on = partial(run_rounds, Counting(), some_data(), chosen, first_round=first, workers=workers)
        rest = list(go_on(state=before.state, memories=before.memories, conditions=conditions(late)))
        assert [outcome(result) for result in rest] == [outcome(result) for result in whole[first:]]
        assert same(rest[-1].state, whole[-1].state)


def test_a_round_in_which_nothing_arrives_leaves_the_state_as_it_is() -> None:
    away = Conditions(dropout=(0.5,), seconds=lambda each, _: 1.0)
    state: dict[str, Tensor] | None = None
    empty = 0
    result: RoundResult
    for result in run_rounds(
        Averaging(), some_data(1), RoundSettings(rounds=12), conditions=away, test=some_data(1)[0]
    ):
        if not result.participants and state is not None:
            assert same(result.state, state)
            assert result.evaluation is not None
            assert result.attendance.duration == 0.0
            empty += 1
        state = result.state
    assert 0 < empty < 12


def test_late_updates_beside_memories_come_back_whole() -> None:
    update = Update(3, 7, {"a.b": torch.randn(2, 3), "n": torch.tensor(4)}, 12, 0.1 + 0.2, {"steps": 5})
    task = Task(3, 7, {"a.b": torch.randn(2, 3)}, {"overlap": 0.25})
    memories = {1: {"x": torch.ones(2)}, 3: {"y": torch.zeros(1)}}
    under_way = {3: LateUpdate(task, update, Norm(0.5, 2.0))}
    back, late = without_late(with_late(memories, under_way))
    once_more = zip(with_late({}, under_way)[3].values(), with_late({}, under_way)[3].values(), strict=True)
    assert all(first is second for first, second in once_more)  # so that nothing is written twice
    assert back.keys() == memories.keys()
    assert same(dict(back[3]), memories[3])
    found = late[3].update
    assert (late[3].norm, late[3].fault) == (Norm(0.5, 2.0), None)
    assert same(dict(found.tensors), dict(update.tensors))
    sent = late[3].task
    assert same(dict(sent.tensors), dict(task.tensors))
    assert (sent.participant, sent.round_index, sent.metadata) == (3, 7, {"overlap": 0.25})
    assert (found.examples, found.loss, found.metadata, found.round_index) == (12, 0.1 + 0.2, {"steps": 5}, 7)
    assert without_late(with_late({}, {3: LateUpdate(task, update, Norm())}))[0] == {}
