"""Small messages: what a codec leaves out is sent later, on every engine, and hostile bytes cost one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from averaging import Averaging
from averaging import some_data as vectors
from building import build_method
from loopback import Loopback
from simulated import run_rounds
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.codecs import Codec, DeadZone, Identity, Quantized, TopK
from msfusion.errors import CodecError
from msfusion.federated import rounds as federated_rounds
from msfusion.federated.capacities import Capacities
from msfusion.federated.compression import (
    CODEC_ERROR,
    KNOWN,
    MESSAGE,
    OWED,
    Compression,
    Entries,
    compressed,
    declared,
    decode,
    encode,
    expected_bytes,
)
from msfusion.federated.engine import InProcess
from msfusion.federated.method import Method
from msfusion.federated.participation import Conditions, RoundSettings
from msfusion.federated.problem import Problem
from msfusion.federated.results import RoundResult
from msfusion.federated.states import part, payload_bytes
from msfusion.federated.training import TrainingSettings
from msfusion.width.groups import State, WidthMap
from msfusion.width.trace import trace
from msfusion.windows import Feedback

COARSE, FEW = DeadZone(step=1.5), TopK(ratio=0.9)
TRAINING = TrainingSettings(learning_rate=0.05, batch_size=8)
METHODS: dict[str, dict[str, Any]] = {
    "fresh": {"name": "msfusion"},
    "blocks": {"name": "msfusion", "start": "blocks"},
    "copies": {"name": "msfusion", "start": "copies"},
    "small": {"name": "small"},
    "ensemble": {"name": "ensemble"},
    "fedavg": {"name": "fedavg"},
    "adaptive": {"name": "msfusion", "overlap": Feedback(start=0.6)},
}


@cache
def wide() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    return model, trace(model, (torch.randn(2, 6),))


def some_data(participants: int = 4) -> list[Batch]:
    torch.manual_seed(1)
    return [
        Batch((torch.randn(13 + each, 6),), torch.randint(3, (13 + each,))) for each in range(participants)
    ]


def build(kind: str, up: Codec | None = COARSE, down: Codec | None = COARSE, rounds: int = 6) -> Method:
    settings = dict(METHODS[kind])
    method: Method = build_method(
        settings.pop("name"), *wide(), (0.25,) * 4, TRAINING, rounds=rounds, **settings
    )
    return compressed(method, up, down)


def run(method: Method, rounds: int = 6, **more: Any) -> list[RoundResult]:
    return list(run_rounds(method, some_data(), more.pop("settings", RoundSettings(rounds)), **more))


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def alike(first: RoundResult, second: RoundResult) -> bool:
    memories = first.memories.keys() == second.memories.keys()
    told = [(each.loss, each.bytes_down, each.bytes_up) for each in first.participants]
    return (
        same(first.state, second.state)
        and memories
        and all(same(first.memories[each], second.memories[each]) for each in first.memories)
        and told == [(each.loss, each.bytes_down, each.bytes_up) for each in second.participants]
    )


# Messages


@pytest.mark.release
def test_a_message_has_each_tensor_in_its_own_scale() -> None:
    torch.manual_seed(2)
    tensors = {
        "large": 1e6 * torch.randn(40, 10),
        "none": torch.zeros(3),
        "tiny": 1e-9 * torch.randn(500),
        "one": torch.ones(()),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for codec, error in ((Quantized(bits=8), 0.05), (DeadZone(step=0.2), 0.1), (COARSE, 0.8)):
        found = decode(encode(tensors, codec), shapes, codec)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].shape == tensor.shape
            assert float((found[name] - tensor).norm()) <= error * float(tensor.norm()) + 1e-30, (codec, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_without_an_end_are_refused(value: float) -> None:
    tensors = {"weight": torch.tensor([1.0, value])}
    if value == 1e30:  # large, but it has an end
        assert decode(encode(tensors, COARSE), {"weight": (2,)}, COARSE)["weight"][1] > 1e29
        return
    with pytest.raises(CodecError):
        encode(tensors, COARSE)


def test_bytes_that_are_no_message_are_refused() -> None:
    tensors = {"a": torch.randn(20), "b": torch.randn(2, 3)}
    shapes = {"a": (20,), "b": (2, 3)}
    message = encode(tensors, COARSE)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for length in range(len(message)):
        with pytest.raises(CodecError):
            decode(message[:length], shapes, COARSE)
    for _ in range(500):
        damaged = message.clone()
        where = int(torch.randint(len(message), (), generator=generator))
        damaged[where] = int(torch.randint(256, (), generator=generator))
        try:
            found = decode(damaged, shapes, COARSE)
        except CodecError:
            refused += 1
        else:
            assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert refused > 50
    for others in ({"a": (20,)}, {"a": (21,), "b": (2, 3)}, {**shapes, "c": (1,)}):
        with pytest.raises(CodecError):
            decode(message, others, COARSE)
    for other in (DeadZone(step=1.5, dead_zone=1.0), TopK()):
        with pytest.raises(CodecError):
            decode(message, shapes, other)
    with pytest.raises(CodecError):
        decode(message.float(), shapes, COARSE)


@pytest.mark.release
def test_the_length_of_a_message_is_foreseen() -> None:
    torch.manual_seed(3)
    tensors = {str(each): torch.randn(100, 70) * 10.0**each for each in range(5)}
    for codec in (COARSE, FEW, Quantized(bits=4)):
        expected = expected_bytes(5 * 7000, 5, codec)
        assert expected == pytest.approx(len(encode(tensors, codec)), rel=0.05)


# What both sides work out


def test_nothing_is_lost_but_sent_later() -> None:
    """All that was sent, and what is owed, is all that has changed; by hand, for a tensor that everybody holds."""
    method = build("small", FEW, None)
    small, state = method.compression, method.initial_state()
    assert small is not None
    task = method.assign(state, 0, 0)
    told: list[tuple[float, float]] = []
    changes, sent = torch.zeros(()), {name: torch.zeros_like(each) for name, each in task.tensors.items()}
    torch.manual_seed(4)
    for round_index in range(5):
        task = replace(method.assign(state, round_index, 0), memory=task.memory)
        update = method.train(small.plain(task), some_data()[0])
        moved = {
            name: tensor + 0.1 * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
            for name, tensor in update.tensors.items()  # type: ignore[union-attr]
        }
        coded = small.coded(task, replace(update, tensors=moved))  # type: ignore[type-var]
        back = small.updated(task, coded)
        weight = "0.weight"
        due, owed = small._answering(task, moved), part(task.memory, OWED)
        wanted = [moved[name] - task.tensors[name] + owed.get(name, 0) for name in due]
        missing = [
            want - (back.tensors[name] - task.tensors[name]) for want, name in zip(wanted, due, strict=True)
        ]
        told.append((float(coded.metadata[CODEC_ERROR]), norm(missing) / norm(wanted)))
        changes = changes + moved[weight] - task.tensors[weight]
        sent[weight] = sent[weight] + back.tensors[weight] - task.tensors[weight]
        task = replace(task, memory=coded.memory)
    owed = part(task.memory, OWED)[weight]
    assert owed.abs().max() > 0.1
    assert torch.allclose(sent[weight] + owed, changes, atol=1e-5)
    for error, by_hand in told:
        assert error == pytest.approx(by_hand, rel=1e-4)
        assert 0.05 < error < 1


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([each.reshape(-1) for each in tensors]).double().norm())


def test_what_a_participant_knows_comes_to_what_the_server_has() -> None:
    """If the state does not change any more, differences become as small as one likes."""
    method = build("fedavg", None, COARSE)
    small = method.compression
    assert small is not None
    state = {
        name: tensor + 1 if tensor.is_floating_point() else tensor
        for name, tensor in method.initial_state().items()
    }
    memory: State = {}
    apart = []
    for round_index in range(40):
        task = replace(method.assign(state, round_index, 2), memory=memory)
        received = small.received(small.sent(task))
        apart.append(float((received.tensors["0.weight"] - state["0.weight"]).norm()))
        memory = small.known(received)
    assert apart[0] > 0
    assert apart[-1] < 1e-3 * apart[0]


def test_entries_of_a_window_wait_until_it_comes_back() -> None:
    method = build("fresh")
    task = method.assign(method.initial_state(), 0, 1)
    place = method.entries(task)["3.weight"]
    assert isinstance(place, Entries)
    assert place.cut is not None
    whole = {"3.weight": torch.zeros(8, 16)}
    changed = place.put(whole, torch.ones_like(task.tensors["3.weight"]))
    assert int(changed.sum()) == task.tensors["3.weight"].numel() < 8 * 16
    assert not whole["3.weight"].any()
    assert torch.equal(place.take({"3.weight": changed}), torch.ones_like(task.tensors["3.weight"]))


def test_running_statistics_and_counters_go_as_they_are() -> None:
    method = build("fedavg")
    small = method.compression
    assert small is not None
    state = {name: tensor + 1 for name, tensor in method.initial_state().items()}
    task = method.assign(state, 0, 0)
    sent, received = small.sent(task), small.received(small.sent(task))
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(sent.tensors[name], state[name])
        assert torch.equal(received.tensors[name], state[name])
    assert "0.weight" not in sent.tensors
    assert sent.tensors[f"{MESSAGE}.0.weight"].shape == (0, 16, 6)


# Rounds


def test_the_identity_is_no_codec() -> None:
    plain, given = run(build("small", None, None)), run(build("small", Identity(), Identity()))
    assert all(map(alike, plain, given))


KINDS = [
    pytest.param(kind, marks=[pytest.mark.release] * (kind in ("ensemble", "fedavg", "adaptive")))
    for kind in METHODS
]


@pytest.mark.one_in_ci
@pytest.mark.parametrize("kind", KINDS)
def test_fine_codecs_change_little_and_coarse_ones_save_much(kind: str) -> None:
    (*_, plain), (*_, fine) = (
        run(build(kind, None, None)),
        run(build(kind, Quantized(bits=8), Quantized(bits=8))),
    )
    names = [
        name
        for name, each in plain.state.items()
        if each.is_floating_point() and "running" not in name and name[0] != "."
    ]
    moved = {name: plain.state[name] - build(kind).initial_state()[name] for name in names}
    apart = sum(float((plain.state[name] - fine.state[name]).square().sum()) for name in names)
    assert 0 < apart < 0.05 * sum(float(each.square().sum()) for each in moved.values())
    (*_, coarse) = run(build(kind))
    for before, after in zip(plain.participants, coarse.participants, strict=True):
        assert after.bytes_up < before.bytes_up
        assert after.bytes_down < before.bytes_down


@pytest.mark.one_in_ci
@pytest.mark.parametrize("kind", KINDS)
def test_workers_and_resuming_change_nothing(kind: str) -> None:
    up, down = {"small": (FEW, None), "fedavg": (None, COARSE)}.get(kind, (COARSE, FEW))
    whole = run(build(kind, up, down))
    assert all(map(alike, whole, run(build(kind, up, down), workers=2)))
    middle = whole[2]
    rest = run(build(kind, up, down), state=middle.state, memories=middle.memories, first_round=3)
    assert all(map(alike, whole[3:], rest))


@pytest.mark.parametrize("late", ["drop", "downweight"])
def test_the_absent_and_the_late_find_what_they_knew(late: Any) -> None:
    def conditions() -> Conditions:
        return Conditions(
            dropout=(0.3,) * 4, seconds=lambda who, at: 1.0 + (who + at) % 3, deadline=2.5, late=late
        )

    whole = run(build("small"), conditions=conditions())
    assert any(result.attendance.late for result in whole)
    assert any(result.attendance.absent for result in whole)
    assert not any(result.left_out for result in whole)
    for stop in (1, 3):
        before = whole[stop - 1]
        rest = run(
            build("small"),
            conditions=conditions(),
            state=before.state,
            memories=before.memories,
            first_round=stop,
        )
        assert all(map(alike, whole[stop:], rest))


@pytest.mark.release
def test_over_a_network_the_server_knows_what_participants_know() -> None:
    """They keep it themselves; the server works it out, and the bits are those of one process."""
    here = run(build("blocks"))
    there = list(
        federated_rounds.run_rounds(
            build("blocks"),
            some_data(),
            RoundSettings(6),
            engine=Loopback(own=lambda method: build("blocks")),
        )
    )
    for ours, theirs in zip(here, there, strict=True):
        assert same(ours.state, theirs.state)
        for who, memory in theirs.memories.items():
            assert same(part(memory, KNOWN), part(ours.memories[who], KNOWN))
            assert not part(memory, OWED)


class Damaging(InProcess):
    """An engine in which the bytes of participant 1 come otherwise than they were sent."""

    def __init__(self, damage: Any) -> None:
        super().__init__()
        self._damage = damage

    def run(self, method: Method, asks: Sequence[Any]) -> Any:
        for answer in super().run(method, asks):
            if answer.update.participant == 1 and MESSAGE in answer.update.tensors:
                tensors = self._damage(dict(answer.update.tensors))
                answer = replace(answer, update=replace(answer.update, tensors=tensors))
            yield answer


def cut_off(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, MESSAGE: tensors[MESSAGE][:-3]}


def without_bytes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != MESSAGE}


def of_another_form(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, f"{MESSAGE}.0.weight": torch.zeros(0, 10**9, 10**9)}


def of_another_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, f"{MESSAGE}.strange": torch.zeros(0, 4)}


def not_empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, f"{MESSAGE}.0.weight": torch.zeros(4, 6)}


@pytest.mark.parametrize("damage", [cut_off, without_bytes, of_another_form, of_another_name, not_empty])
def test_damaged_bytes_cost_one_update(damage: Any) -> None:
    results = list(
        federated_rounds.run_rounds(build("small"), some_data(), RoundSettings(2), engine=Damaging(damage))
    )
    for result in results:
        assert [each.participant for each in result.left_out] == [1]
        assert "cannot be read" in result.left_out[0].reason
        assert [each.participant for each in result.participants] == [0, 2, 3]
        assert 1 not in result.memories


def test_who_was_left_out_goes_on_from_what_it_knew() -> None:
    """The server and the participant agree afterwards: each difference is to what was merged last."""
    rounds = []

    def at_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rounds.append(1)
        return cut_off(tensors) if len(rounds) == 2 else tensors

    results = list(
        federated_rounds.run_rounds(build("small"), some_data(), RoundSettings(4), engine=Damaging(at_first))
    )
    assert [len(result.left_out) for result in results] == [0, 1, 0, 0]
    kept = [result.memories[1] for result in results]
    assert same(kept[0], kept[1])
    assert not same(kept[1], kept[2])


def test_what_may_leave_is_declared() -> None:
    method = build("blocks")
    small = method.compression
    assert isinstance(small, Compression)
    task = small.sent(method.assign(method.initial_state(), 0, 0))
    outbound = declared(method, "train", task)
    assert outbound.tensors[MESSAGE] == (torch.uint8, (None,))
    assert outbound.tensors[f"{MESSAGE}.block0.0.weight"] == (torch.float32, (0, 4, 6))
    assert outbound.tensors["block0.1.running_mean"] == (torch.float32, (4,))
    assert "block0.0.weight" not in outbound.tensors
    assert CODEC_ERROR in outbound.metadata
    entries = sum(tensor.numel() for name, tensor in small.outline(task).tensors.items() if "num" not in name)
    assert outbound.most_bytes is not None
    assert 0 < outbound.most_bytes < 4 * entries + 200
    plain = declared(build("blocks", None, None), "train", method.assign(method.initial_state(), 0, 0))
    assert plain.most_bytes is None
    assert CODEC_ERROR not in plain.metadata


def test_a_method_of_ones_own_is_carried() -> None:
    data = vectors(3)
    (plain,) = run_rounds(Averaging(), data, RoundSettings(1))
    method = compressed(Averaging(), Quantized(bits=8), Quantized(bits=8))
    (result,) = run_rounds(method, data, RoundSettings(1))
    assert torch.allclose(plain.state["weight"], result.state["weight"], atol=0.05)
    assert result.state["steps"] == plain.state["steps"]
    assert payload_bytes(plain.state) == 24


def test_a_method_that_is_built_again_keeps_its_codecs() -> None:
    method = compressed(Averaging(), COARSE, None)
    model, width_map = wide()
    each = Capacities((1.0,) * 2)
    problem = Problem(model, some_data()[0], each, (TRAINING,) * 2, (13, 14), 2, known_map=width_map)
    again = method.build(problem)
    assert again.compression is not None
    assert (again.compression.method, again.compression.up) == (again, COARSE)
    assert method.compression is not None
    assert method.compression.method is method
