"""The rounds: who takes part, what is reported, and that the number of workers changes nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from averaging import Averaging, Counting, some_data
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import fuse_updates, run_rounds
from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import ConfigError, DataError
from msfusion.federated.rounds import ParticipantResult, RoundResult, RoundSettings, _copies


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def outcome(result: RoundResult) -> list[object]:
    """All of a result that may not depend on the machine."""
    people = [(p.participant, p.loss, p.examples, p.bytes_down, p.bytes_up) for p in result.participants]
    return [result.round_index, people, result.evaluation]


def test_one_and_two_workers_give_the_same_bits() -> None:
    chosen = RoundSettings(rounds=4, fraction=0.6, seed=3)
    one, two = (
        list(run_rounds(Averaging(), some_data(), chosen, workers=workers, test=some_data(1)[0]))
        for workers in (1, 2)
    )
    assert [outcome(result) for result in one] == [outcome(result) for result in two]
    assert all(same(left.state, right.state) for left, right in zip(one, two, strict=True))
    assert all(len(result.participants) == 3 for result in one)


def test_a_round_equals_the_loop_by_hand() -> None:
    method, data = Averaging(), some_data(3)
    (result,) = run_rounds(method, data, RoundSettings(rounds=1))
    state = method.initial_state()
    updates = [method.train(method.assign(state, 0, p), own) for p, own in enumerate(data)]
    assert same(result.state, fuse_updates(method, state, updates))
    for update, participant in zip(updates, result.participants, strict=True):
        assert (participant.loss, participant.examples) == (update.loss, update.examples)
        assert (participant.bytes_down, participant.bytes_up) == (4 * 4 + 8, 4 * 4 + 8)


def test_going_on_from_a_state_is_the_undisturbed_run() -> None:
    chosen = RoundSettings(rounds=5, count=2, seed=7)
    whole = list(run_rounds(Averaging(), some_data(), chosen))
    rest = list(run_rounds(Averaging(), some_data(), chosen, state=whole[1].state, first_round=2))
    assert [outcome(result) for result in rest] == [outcome(result) for result in whole[2:]]
    assert same(rest[-1].state, whole[-1].state)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_participant_gets_back_what_it_kept_and_the_server_never_sees_it(workers: int) -> None:
    chosen = RoundSettings(rounds=4, count=3, seed=7)
    counted = [0] * 5
    for result in run_rounds(Counting(), some_data(), chosen, workers=workers):
        for each in result.participants:
            counted[each.participant] += 1
            assert (each.bytes_down, each.bytes_up) == (4 * 4 + 8, 4 * 4 + 8)  # as without a memory
        kept = {participant: memory["weight"].tolist() for participant, memory in result.memories.items()}
        assert kept == {participant: [count] * 3 for participant, count in enumerate(counted) if count}
        assert list(result.state) == ["weight", "steps"]


@pytest.mark.parametrize("workers", [1, 2])
def test_going_on_needs_the_memories_as_well(workers: int) -> None:
    chosen = RoundSettings(rounds=5, count=3, seed=7)
    whole = list(run_rounds(Counting(), some_data(), chosen))
    middle = whole[1]
    go_on = partial(run_rounds, Counting(), some_data(), chosen, first_round=2, workers=workers)
    rest = list(go_on(state=middle.state, memories=middle.memories))
    assert [outcome(result) for result in rest] == [outcome(result) for result in whole[2:]]
    assert same(rest[-1].state, whole[-1].state)
    forgetful = list(go_on(state=middle.state))
    assert not same(forgetful[-1].state, whole[-1].state)


def test_the_model_is_evaluated_every_few_rounds_and_at_last() -> None:
    chosen = RoundSettings(rounds=5, evaluate_every=2)
    results = list(run_rounds(Averaging(), some_data(), chosen, test=some_data(1)[0]))
    assert [result.evaluation is not None for result in results] == [False, True, False, True, True]
    assert all(result.evaluation is None for result in run_rounds(Averaging(), some_data(), chosen))


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_told_for_every_participant(workers: int) -> None:
    told: list[ParticipantResult] = []
    chosen = RoundSettings(rounds=2)
    results = list(run_rounds(Averaging(), some_data(), chosen, workers=workers, on_participant=told.append))
    by_round = [told[:5], told[5:]]
    for result, reports in zip(results, by_round, strict=True):
        assert sorted(reports, key=lambda report: report.participant) == list(result.participants)


def test_threads_are_set_while_a_round_runs_and_put_back() -> None:
    before = torch.get_num_threads()
    seen = []

    class Noting(Averaging):
        def train(self, task, data):  # type: ignore[no-untyped-def]
            seen.append(torch.get_num_threads())
            return super().train(task, data)

    for _ in run_rounds(Noting(), some_data(2), RoundSettings(rounds=2), threads=3):
        assert torch.get_num_threads() == before
    assert seen == [3, 3, 3, 3]


@settings(max_examples=50)
@given(st.integers(1, 30), st.floats(0.01, 1.0), st.integers(0, 2**63), st.integers(0, 1000))
def test_the_sample_is_a_sorted_set_of_the_right_size(
    participants: int, fraction: float, seed: int, round_index: int
) -> None:
    chosen = RoundSettings(rounds=1, fraction=fraction, seed=seed)
    drawn = chosen.participants_in(round_index, participants)
    assert drawn == chosen.participants_in(round_index, participants)
    assert list(drawn) == sorted(set(drawn))
    assert set(drawn) <= set(range(participants))
    assert len(drawn) == max(1, int(fraction * participants + 0.5))


def test_samples_differ_between_rounds_and_reach_everybody() -> None:
    chosen = RoundSettings(rounds=1, count=3)
    samples = [chosen.participants_in(round_index, 10) for round_index in range(40)]
    assert len(set(samples)) > 20
    assert {participant for sample in samples for participant in sample} == set(range(10))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"rounds": 0}, "rounds is 0: it must be at least 1"),
        ({"rounds": 1, "fraction": 0.0}, "fraction is 0.0"),
        ({"rounds": 1, "fraction": float("nan")}, "fraction is NaN"),
        ({"rounds": 1, "count": 0}, "count is 0"),
        ({"rounds": 1, "evaluate_every": 0}, "evaluate_every is 0"),
    ],
)
def test_impossible_settings(wrong: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RoundSettings(**wrong)  # type: ignore[arg-type]


def test_mistakes_are_told_at_once() -> None:
    once = RoundSettings(rounds=1)
    empty = Batch((torch.zeros(0, 4),), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ConfigError, match="workers is 0"):
        run_rounds(Averaging(), some_data(), once, workers=0)
    with pytest.raises(ConfigError, match="threads is 0"):
        run_rounds(Averaging(), some_data(), once, threads=0)
    with pytest.raises(DataError, match="there are no participants"):
        run_rounds(Averaging(), [], once)
    with pytest.raises(DataError, match="participant 1 has no examples"):
        run_rounds(Averaging(), [some_data(1)[0], empty], once)
    with pytest.raises(ConfigError, match="9 participants are to take part in a round, but there are 5"):
        run_rounds(Averaging(), some_data(), RoundSettings(rounds=1, count=9))


def test_what_is_kept_lies_in_order_as_after_a_checkpoint() -> None:
    """In another order in memory, a resumed run would round otherwise than one that went through."""
    kept = _copies({"a": torch.arange(6.0).reshape(2, 3).T})
    assert kept["a"].is_contiguous()
    assert torch.equal(kept["a"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
