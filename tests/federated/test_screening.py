"""One bad participant: left out by name whatever it does, or it stops the run; honest rounds are as they were."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from averaging import Averaging, Counting, Grouped, some_data
from building import build_method
from simulated import fuse_updates, run_rounds
from torch import Tensor, nn

import msfusion
from msfusion.batch import Batch
from msfusion.engines.processes import WorkerError
from msfusion.errors import ConfigError, DataError, MsfusionError, PrivacyError, TrainingError, UpdateError
from msfusion.federated.capacities import Capacities
from msfusion.federated.held import Held
from msfusion.federated.method import Kind, Task, Update
from msfusion.federated.participation import Conditions
from msfusion.federated.privacy import Outbound
from msfusion.federated.rounds import RoundResult, RoundSettings
from msfusion.federated.screening import Screening, absurd_losses, fault_of, norm_of, outliers
from msfusion.federated.training import TrainingSettings
from msfusion.federated.verdict import Norm
from msfusion.methods.parts.batch_norm import pooled
from msfusion.width.groups import State

STOP = Screening("stop")


def spoilt(update: Update, how: str) -> Update:
    """An update as a bad participant sends it."""
    weight = update.tensors["weight"]
    if how == "count":
        return replace(update, examples=2**62)
    if how == "fewer":
        return replace(update, examples=update.examples - 1)
    if how == "loss":
        return replace(update, loss=math.nan)
    if how == "steps":
        return replace(update, tensors={**update.tensors, "steps": torch.tensor(2**40)})
    if how == "lacking":
        return replace(update, tensors={"weight": weight})
    if how == "empty":
        return replace(update, tensors={})
    bad = {
        "nan": weight * math.nan,
        "infinite": weight + math.inf,
        "absurd": torch.full((4,), 1e30),
        "large": weight * 1e4,
    }
    return replace(update, tensors={**update.tensors, "weight": bad[how]})


@dataclass(frozen=True)
class Lying(Averaging):
    """Averaging whose failing participants lie as `failure` says, or diverge."""

    def train(self, task: Task, data: Batch) -> Update:
        if task.participant in self.failing and self.failure == "diverges":
            raise TrainingError(f"participant {task.participant}'s loss became nan")
        update = replace(self, failing=()).base_train(task, data)
        return spoilt(update, self.failure) if task.participant in self.failing else update

    def base_train(self, task: Task, data: Batch) -> Update:
        return Averaging.train(self, task, data)


def with_weight(make: Callable[[Tensor], object]) -> Callable[[Update], object]:
    return lambda update: replace(
        update, tensors={**update.tensors, "weight": cast(Tensor, make(update.tensors["weight"]))}
    )


def fails(error: Exception) -> Callable[[Update], object]:
    def work(_: Update) -> object:
        raise error

    return work


MALFORMED: dict[str, tuple[Callable[[Update], Any], str]] = {
    "shape": (with_weight(lambda weight: weight[:1]), "of shape [1]"),
    "scalar": (with_weight(lambda _: torch.tensor(1.0)), "of shape []"),
    "dtype": (with_weight(Tensor.double), "float64"),
    "complex": (with_weight(lambda weight: weight.to(torch.complex64)), "complex64"),
    "sparse": (with_weight(Tensor.to_sparse), "sparse"),
    "meta": (with_weight(lambda weight: weight.to("meta")), "meta"),
    "numpy": (with_weight(lambda weight: weight.numpy()), "ndarray"),
    "none": (with_weight(lambda _: None), "NoneType"),
    "extra": (lambda update: replace(update, tensors={**update.tensors, "more": torch.ones(1)}), "'more'"),
    "tensors": (lambda update: replace(update, tensors=cast(State, None)), "AttributeError"),
    "metadata": (lambda update: replace(update, metadata={"note": 1}), "'note'"),
    "memory": (lambda update: replace(update, memory={"kept": cast(Tensor, None)}), "keep 'kept'"),
    "negative": (lambda update: replace(update, examples=-1), "number of examples"),
    "nan examples": (lambda update: replace(update, examples=cast(int, math.nan)), "number of examples"),
    "loss": (lambda update: replace(update, loss=cast(float, None)), "NoneType as its loss"),
    "update": (lambda _: None, "send a NoneType"),
    "value": (fails(ValueError("odd\nlabels")), "(ValueError: odd labels)"),
    "runtime": (fails(RuntimeError("out of memory")), "(RuntimeError: out of memory)"),
    "memory error": (fails(MemoryError()), "MemoryError"),
    "stop": (fails(StopIteration()), "StopIteration"),
    "ours": (fails(DataError("a label is out of range")), "a label is out of range"),
}


@dataclass(frozen=True)
class Malformed(Grouped):
    """Participants that may be trained at once, of whom the failing ones do what MALFORMED has."""

    def train(self, task: Task, data: Batch) -> Update:
        update = Averaging.train(replace(self, failing=()), task, data)
        return MALFORMED[self.failure][0](update) if task.participant in self.failing else update


ALL = ["count", "fewer", "loss", "steps", "lacking", "empty"]
ALL += ["nan", "infinite", "absurd", "large", "diverges"]
WORD = {
    "lacking": "lacks 1 tensors that the method declares, among them 'steps'",
    "empty": "lacks 2 tensors",
    "count": "examples",
    "fewer": "examples",
    "steps": "counts",
    "nan": "not finite",
    "infinite": "not finite",
}


def told(results: Sequence[RoundResult]) -> list[list[tuple[int, int, str]]]:
    return [[(each.participant, each.round_index, each.reason) for each in one.left_out] for one in results]


def states(results: Sequence[RoundResult]) -> list[list[float]]:
    return [one.state["weight"].tolist() for one in results]


@pytest.mark.parametrize("how", ALL)
def test_a_bad_update_counts_for_nothing_and_is_named(how: str) -> None:
    data, method = some_data(), Lying((3,), how)
    (result,) = run_rounds(method, data, RoundSettings(rounds=1))
    start = method.initial_state()
    good = [Averaging().train(Averaging().assign(start, 0, p), data[p]) for p in (0, 1, 2, 4)]
    assert torch.equal(result.state["weight"], fuse_updates(Averaging(), start, good)["weight"])
    assert [each.participant for each in result.participants] == [0, 1, 2, 4]
    (left_out,) = result.left_out
    assert (left_out.participant, left_out.bytes_down) == (3, 4 * 4 + 8)
    assert WORD.get(how, "") in left_out.reason


@dataclass(frozen=True)
class Counted(Averaging):
    """Averaging whose participants may leave out how many steps they made."""

    def train(self, task: Task, data: Batch) -> Update:
        return spoilt(super().train(task, data), "lacking")

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        return replace(super().outbound(kind, task), optional=frozenset({"steps"}))


def test_what_a_method_calls_optional_may_be_missing() -> None:
    settings = RoundSettings(rounds=2)
    found, expected = (list(run_rounds(each, some_data(), settings)) for each in (Counted(), Averaging()))
    assert states(found) == states(expected)
    assert not any(told(found))


@pytest.mark.parametrize("how", ["large", "nan", "diverges", "count"])
def test_workers_and_a_resume_change_nothing(how: str) -> None:
    settings, method = RoundSettings(rounds=3, fraction=0.8, seed=1), Lying((1, 3), how)
    one = list(run_rounds(method, some_data(), settings))
    two = list(run_rounds(method, some_data(), settings, workers=2))
    rest = list(run_rounds(method, some_data(), settings, state=one[0].state, first_round=1))
    assert told(one) == told(two)
    assert states(one) == states(two)
    assert told(rest) == told(one)[1:]
    assert states(rest) == states(one)[1:]
    assert any(told(one))


@pytest.mark.without_type_checks
@pytest.mark.parametrize("how", MALFORMED)
def test_what_may_not_leave_and_what_raises_is_its_participants(how: str) -> None:
    method, once = Malformed((2,), how), RoundSettings(rounds=1)
    start = method.initial_state()
    good = [Averaging().train(Averaging().assign(start, 0, p), some_data()[p]) for p in (0, 1, 3, 4)]
    for options in ({}, {"workers": 2}, {"together": 3}):
        (result,) = run_rounds(method, some_data(), once, **options)
        if how == "loss" and "together" in options:  # there the method says another
            continue
        assert torch.equal(result.state["weight"], fuse_updates(Averaging(), start, good)["weight"])
        (left_out,) = result.left_out
        assert (left_out.participant, left_out.bytes_down) == (2, 4 * 4 + 8)
        assert left_out.bytes_up == 0
        assert MALFORMED[how][1] in left_out.reason
        assert "\n" not in left_out.reason


@pytest.mark.parametrize("workers", [1, 2])
def test_what_everybody_does_wrong_is_nobodys(workers: int) -> None:
    """The first reason, as it is, with what was raised as its cause."""
    wrong: list[tuple[Averaging, type[MsfusionError], str]] = [
        (Lying(tuple(range(5)), "diverges"), TrainingError, r"^participant 0's loss"),
        (Lying(tuple(range(5)), "nan"), UpdateError, r"^participant 0: .*not finite.*nobody's work"),
        (Malformed(tuple(range(5)), "extra"), PrivacyError, r"^participant 0 in round 1 would send .*'more'"),
        (Malformed(tuple(range(5)), "value"), TrainingError, r"^participant 0 failed .*ValueError: odd"),
        (Malformed(tuple(range(5)), "ours"), DataError, "^a label is out of range$"),
    ]
    for method, kind, sentence in wrong:
        with pytest.raises(kind, match=sentence) as caught:
            list(run_rounds(method, some_data(), RoundSettings(rounds=1), workers=workers))
        if method.failure == "value":
            cause = caught.value.__cause__
            told = "".join(traceback.format_exception(cause))
            assert isinstance(cause, ValueError if workers == 1 else WorkerError)
            assert "in train" in told
            assert "ValueError: odd" in told


def test_reasons_of_several_kinds_end_a_round_too() -> None:
    @dataclass(frozen=True)
    class Mixed(Averaging):
        def train(self, task: Task, data: Batch) -> Update:
            return Lying(tuple(range(5)), ALL[task.participant]).train(task, data)

    with pytest.raises(UpdateError, match=r"^participant 0: it says that it has"):
        list(run_rounds(Mixed(), some_data(), RoundSettings(rounds=1)))


def test_one_bad_participant_that_is_there_alone_ends_no_run() -> None:
    settings = RoundSettings(rounds=12, count=1, seed=1)
    results = list(run_rounds(Lying((3,), "diverges"), some_data(), settings))
    bad = [one for one in results if one.left_out]
    assert 0 < len(bad) < 12
    assert all(one.participants == () for one in bad)
    assert not torch.equal(results[-1].state["weight"], torch.zeros(4))


def test_a_run_in_which_nothing_ever_counted_ends_in_an_error() -> None:
    settings, everybody = RoundSettings(rounds=3, count=1), tuple(range(5))
    rounds = run_rounds(Lying(everybody, "nan"), some_data(), settings)
    first, _ = next(rounds), next(rounds)
    assert torch.equal(first.state["weight"], torch.zeros(4))
    resumed = run_rounds(Lying(everybody, "nan"), some_data(), settings, state=first.state, first_round=2)
    for rest in (rounds, resumed):
        with pytest.raises(UpdateError, match="nobody's work of any round counts"):
            list(rest)


def test_absence_is_no_failure() -> None:
    absent = Conditions(seconds=lambda *_: 20.0, deadline=10.0)  # and whose work is lost does none
    results = list(run_rounds(Averaging(), some_data(), RoundSettings(rounds=2), conditions=absent))
    assert told(results) == [[], []]


@pytest.mark.parametrize("loss", [-1e18, 2e7])
def test_a_loss_that_would_be_all_of_the_mean_is_a_lie(loss: float) -> None:
    @dataclass(frozen=True)
    class Odd(Averaging):
        def train(self, task: Task, data: Batch) -> Update:
            update = super().train(task, data)
            return replace(update, loss=loss) if task.participant == 1 else update

    (result,) = run_rounds(Odd(), some_data(), RoundSettings(rounds=1))
    assert [(each.participant, f"{loss:g}" in each.reason) for each in result.left_out] == [(1, True)]


def test_the_bound_of_losses_by_hand() -> None:
    assert list(absurd_losses({0: 2.0, 1: -3.0, 2: 3.1e6, 3: -2.9e6})) == [2]  # the lower median is 3
    assert absurd_losses({0: 1e-9, 1: 0.0, 2: 1e6}) == {}
    assert absurd_losses({0: 1e15, 1: 3e15, 2: 2e15}) == {}  # squares of large targets
    assert absurd_losses({0: 1.0, 1: 1e18}) == {}


def test_complex_weights_are_judged_by_both_parts() -> None:
    sent = {"a": torch.zeros(3, dtype=torch.complex64)}
    moved, spoilt = ({"a": torch.full((3,), value)} for value in (3 + 4j, complex(0.0, math.nan)))
    assert fault_of(Update(0, 0, moved, 3, 0.5), sent, 3) is None
    assert "not finite" in str(fault_of(Update(0, 0, spoilt, 3, 0.5), sent, 3))
    assert norm_of(moved, sent) == Norm(math.sqrt(25 / 2), 0.0)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["nan", "large", "diverges"])
def test_a_run_that_is_to_stop_names_the_first(how: str, workers: int) -> None:
    failing = (4,) if how == "large" else (2, 4)  # of several that lie alike, the median is theirs
    rounds = run_rounds(
        Lying(failing, how), some_data(), RoundSettings(rounds=1), workers=workers, screening=STOP
    )
    with pytest.raises((UpdateError, TrainingError), match=rf"^participant {failing[0]}\D"):
        list(rounds)


@dataclass(frozen=True)
class Together(Grouped):
    """Participants trained at once, of whom participant 2 diverges."""

    def train(self, task: Task, data: Batch) -> Update:
        if task.participant == 2:
            raise TrainingError("participant 2's loss became nan")
        return super().train(task, data)


def test_of_a_group_only_the_bad_one_is_left_out() -> None:
    alone, group = (
        list(run_rounds(Together(), some_data(), RoundSettings(rounds=2), together=size)) for size in (1, 4)
    )
    assert told(group) == told(alone) == [[(2, index, "participant 2's loss became nan")] for index in (0, 1)]
    assert states(group) == states(alone)


@dataclass(frozen=True)
class Remembering(Counting):
    """Participant 1 sends NaN in round 0."""

    def train(self, task: Task, data: Batch) -> Update:
        update = super().train(task, data)
        return spoilt(update, "nan") if (task.participant, task.round_index) == (1, 0) else update


def test_what_came_with_a_bad_update_is_not_remembered() -> None:
    first, second = run_rounds(Remembering(), some_data(3), RoundSettings(rounds=2))
    assert sorted(first.memories) == [0, 2]
    assert {who: int(kept["weight"][0]) for who, kept in second.memories.items()} == {0: 2, 1: 1, 2: 2}


def test_a_late_update_is_judged_where_it_arrives() -> None:
    conditions = Conditions(
        seconds=lambda each, _: 10.5 if each == 3 else 1.0, deadline=10.0, late="downweight"
    )
    chosen = RoundSettings(rounds=4)
    for how in ("nan", "large"):
        run = list(run_rounds(Lying((3,), how), some_data(), chosen, conditions=conditions))
        named = [[(who, began) for who, began, _ in one] for one in told(run)]
        assert named[0] == []
        assert (3, 0) in named[1] + named[2]
        again = run_rounds(
            Lying((3,), how),
            some_data(),
            chosen,
            conditions=conditions,
            state=run[0].state,
            memories=run[0].memories,
            first_round=1,
        )
        rest = list(again)
        assert told(rest) == told(run)[1:]
        assert states(rest) == states(run)[1:]


def test_late_training_that_fails_arrives_nowhere() -> None:
    conditions = Conditions(
        seconds=lambda each, _: 10.5 if each == 3 else 1.0, deadline=10.0, late="downweight"
    )
    run = list(
        run_rounds(Lying((3,), "diverges"), some_data(), RoundSettings(rounds=3), conditions=conditions)
    )
    assert [who for who, *_ in told(run)[0]] == [3]
    assert all(one.attendance.arriving == () for one in run)


def test_the_bound_by_hand() -> None:
    """The lower median of 1, 2, 3 and 9 is 2: four times that is 8."""
    norms = {0: Norm(1.0), 1: Norm(9.0), 2: Norm(2.0), 3: Norm(3.0)}
    assert list(outliers(norms, 4.0)) == [1]
    assert list(outliers(norms, 4.5)) == []
    assert outliers(norms, 0.0) == {}
    assert outliers({**norms, 1: Norm(9.0, sent=9.0)}, 3.0) == {}  # no more than what was sent
    assert outliers({0: Norm(1.0), 1: Norm(1e9)}, 3.0) == {}  # of two nobody knows which is odd
    nothing = {each: Norm() for each in range(5)}
    assert outliers({**nothing, 5: Norm(1.0), 6: Norm(1.0)}, 3.0) == {}


def test_the_norm_by_hand() -> None:
    tensors = {"a": torch.tensor([4.0, 4.0]), "b": torch.tensor([[1.0, 1.0]]), "n": torch.tensor(7)}
    sent = {"a": torch.tensor([1.0, 0.0]), "n": torch.tensor(1)}
    assert norm_of(tensors, sent) == Norm(math.sqrt((9 + 16 + 1 + 1) / 4), math.sqrt(1 / 4))
    assert norm_of({}, {}) == Norm()


def test_what_did_not_change_is_nobodys_fault() -> None:
    mask = {"mask": torch.tensor([0.0, -3e38]), "bias": torch.zeros(2)}
    update = Update(0, 0, {**mask, "bias": torch.ones(2)}, 3, 0.5)
    assert fault_of(update, mask, 3) is None
    assert fault_of(replace(update, tensors={**mask, "mask": -mask["mask"]}), mask, 3) is not None


def test_updates_on_the_disk_are_those_in_memory() -> None:
    torch.manual_seed(0)
    updates = [
        Update(each, 0, {"w": torch.randn(5), "n": torch.tensor(each)}, 1, 0.5, share=0.5)
        for each in (2, 0, 1)
    ]
    disk = Held(in_memory=30)  # one of 28 bytes
    for update in updates:
        disk.add(update)
    disk.drop(1)
    for _ in range(2):
        found = list(disk.updates())
        assert [each.participant for each in found] == [0, 2]
        for each in found:
            (same,) = (update for update in updates if update.participant == each.participant)
            assert torch.equal(each.tensors["w"], same.tensors["w"])
            assert each.share == 0.5
    disk.close()


def test_a_participants_tensors_may_be_overwritten_by_the_next() -> None:
    held, working = Held(), torch.zeros(2)
    for participant in range(2):
        held.add(Update(participant, 0, {"w": working.fill_(participant)}, 1, 0.0))
    assert [update.tensors["w"].tolist() for update in held.updates()] == [[0.0, 0.0], [1.0, 1.0]]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(DataError, match="participant 4 has 5 examples"):
        run_rounds(Averaging(), some_data(), RoundSettings(rounds=1), screening=Screening(max_examples=4))
    wrong: list[Callable[[], Screening]] = [
        lambda: Screening(max_update_norm=0.5),
        lambda: Screening(max_update_norm=math.nan),
        lambda: Screening(max_examples=0),
    ]
    for make in wrong:
        with pytest.raises(ConfigError, match="it must be at least 1"):
            make()


@pytest.mark.parametrize(("row", "value", "what"), [(0, 2.0**62, "counts"), (2, 1e9, "activations")])
def test_lying_moments_are_their_participants(row: int, value: float, what: str) -> None:
    """Two honest participants that saw ten values of mean 2 and variance 0; the third lies."""
    state = {"mean": torch.zeros(1), "variance": torch.ones(1)}
    honest = torch.tensor([[10.0], [20.0], [40.0]], dtype=torch.float64)
    lie = honest.clone()
    lie[row] = value
    updates = [
        Update(who, 0, {"mean": sums}, 5, 0.0, {"mean": "variance"})
        for who, sums in enumerate([honest, lie, honest])
    ]
    with pytest.raises(UpdateError, match=what) as caught:
        pooled(state, updates)
    assert caught.value.participant == 1
    found = pooled(state, [updates[0], updates[2]])
    assert (found["mean"].item(), found["variance"].item()) == (2.0, 0.0)


def test_a_single_example_does_not_end_a_run_with_batch_normalisation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    data = [Batch(own.inputs, own.targets) for own in some_data(4)]
    width_map = msfusion.trace(model, (torch.zeros(2, 4),))
    training = TrainingSettings(learning_rate=0.01, batch_size=2)
    method = build_method("fedavg", model, width_map, Capacities((1.0,) * 4), training)
    results = list(run_rounds(method, data, RoundSettings(rounds=2), test=data[3]))
    assert [[each.participant for each in one.left_out] for one in results] == [[0], [0]]
    assert "single example" in results[0].left_out[0].reason
    assert all(bool(torch.isfinite(tensor).all()) for tensor in results[-1].state.values())
