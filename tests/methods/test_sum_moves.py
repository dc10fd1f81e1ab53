"""How far the blocks of a sum move where not all participants train the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from block_cases import build, memory_of, run, same, some_data
from simulated import fuse_updates
from torch import Tensor, nn

from msfusion.averaging.fusion import fuse
from msfusion.batch import Batch
from msfusion.federated.states import holding, model_state, part
from msfusion.federated.training import TrainingSettings
from msfusion.methods.blocks import BlocksMethod
from msfusion.models.sums import label
from msfusion.models.transformer import DecoderLM
from msfusion.width.groups import State
from msfusion.width.trace import trace


def one_step(weighting: str = "examples", average: str = "mean") -> tuple[BlocksMethod, list[Batch]]:
    """Two participants of one block and one of both, with blocks that are linear in all that they learn."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    model[0].weight.requires_grad_(False)
    traced = model, trace(model, (torch.randn(2, 5).double(),))
    sizes = (5, 9, 6)
    data = [Batch((torch.randn(size, 5).double(),), torch.randint(3, (size,))) for size in sizes]
    method = build(
        4, (0.5, 0.5, 1.0), model=traced, passes=1, weighting=weighting, average=average,
        training=TrainingSettings(learning_rate=0.3, momentum=0.0, batch_size=4),
    )  # fmt: skip
    return method, data


@pytest.mark.parametrize(("weighting", "weights"), [("examples", (5, 9, 6)), ("uniform", (1, 1, 1))])
@pytest.mark.parametrize("began", [False, True])
def test_the_sum_moves_as_far_as_fedavg_would_move_it(
    weighting: str, weights: Sequence[int], began: bool
) -> None:
    """f_new - f = sum_p a_p (f_p - f) / sum_p a_p, exactly, where blocks are linear: however many blocks p trained."""
    method, data = one_step(weighting)
    state, now = (run(method, data, 2)[-1].state, 2) if began else (method.initial_state(), 0)
    held = [method.held(each, now) for each in range(3)]
    assert [len(each) for each in held] == [1, 1, 2]
    tasks = [
        replace(
            method.assign(state, now, number),
            memory=memory_of(method, state, own, {0, 1} - {*held[number]}),
        )
        for number, own in enumerate(data)
    ]
    updates = [method.train(task, own) for task, own in zip(tasks, data, strict=True)]
    x = torch.randn(11, 5).double()

    def whole(tensors: State) -> Tensor:
        with holding(method.whole, model_state({**state, **tensors})) as model:
            return Batch((x,), torch.zeros(11).long()).call(model)  # type: ignore[return-value]

    expected = whole({}) + sum(
        weight * (whole(update.tensors) - whole({})) for weight, update in zip(weights, updates, strict=True)
    ) / sum(weights)
    assert torch.allclose(whole(fuse_updates(method, state, updates)), expected, atol=1e-14)


def test_what_all_have_trained_is_their_average_bit_for_bit() -> None:
    method, data = one_step()
    state = run(method, data, 2)[-1].state
    updates = [method.train(method.assign(state, 2, each), own) for each, own in enumerate(data)]
    fused, block = fuse_updates(method, state, updates), label(method.held(0, 2)[0])
    expected = fuse(
        part(state, block),
        method.small.width_map,
        [({}, part(update.tensors, block), float(update.examples)) for update in updates],
    )
    assert same(part(fused, block), expected)


@pytest.mark.parametrize("late", [1.0, 0.5])
@pytest.mark.parametrize("average", ["mean", "median"])
def test_a_quiet_block_moves_from_where_its_training_begins(average: str, late: float) -> None:
    """Not from the silent one that stands for it until then, with a part of whose scale it would be held back."""
    torch.manual_seed(0)
    model = DecoderLM(20, block_length=6, features=16, heads=4, layers=1).double()
    method = build(4, (0.5, 1.0), model=(model, trace(model, (torch.zeros(2, 6).long(),))), average=average)
    data = [Batch((torch.randint(20, (6, 6)),), torch.randint(20, (6, 6))) for _ in range(2)]
    state, began = method.initial_state(), method.awake[1]
    updates = [method.train(method.assign(state, 0, each), own) for each, own in enumerate(data)]
    fused = fuse_updates(method, state, [updates[0], replace(updates[1], share=late)])
    for name in ("decoder.norm.weight", "decoder.tokens.weight"):
        step = updates[1].tensors[f"block1.{name}"] - began[name]
        assert torch.allclose(fused[f"block1.{name}"], began[name] + late * step / 2, atol=1e-14)
    assert torch.equal(fused["block1.head.weight"], fused["block1.decoder.tokens.weight"])  # they are tied


def test_of_a_robust_average_each_participant_is_one_part() -> None:
    method, data = one_step(average="median")
    state = run(method, data, 2)[-1].state
    strong = method.train(method.assign(state, 2, 2), data[2])
    weak = [method.train(method.assign(state, 2, each), data[each]) for each in (0, 1)]
    fused = fuse_updates(method, state, [strong, *weak])
    (other,) = set(method.held(2, 2)) - set(method.held(0, 2))
    name = f"{label(other)}.1.weight"
    assert torch.allclose(fused[name], state[name] + (strong.tensors[name] - state[name]) / 3, atol=1e-14)


def test_what_came_late_of_another_block_counts_among_the_participants_of_its_round() -> None:
    """Participant 2 trained block 0, and arrives when 0 and 1 have gone on to block 1: one of three, half of it."""
    data, method = some_data(3), build(4, (0.25,) * 3, passes=1, weighting="uniform")
    states = [method.initial_state(), *(each.state for each in run(method, data, 1))]
    tasks = [method.assign(states[1], 1, 0), method.assign(states[1], 1, 1), method.assign(states[0], 0, 2)]
    tasks[:2] = [
        replace(task, memory=memory_of(method, states[1], own, (0,)))
        for task, own in zip(tasks[:2], data[:2], strict=True)
    ]
    updates = [method.train(task, own) for task, own in zip(tasks, data, strict=True)]
    updates[2] = replace(updates[2], share=0.5)
    answers = list(zip(tasks, updates, strict=True))
    fused = method.fuse(states[1], answers)
    name, before = "4.weight", states[1]
    new = [update.tensors[f"block1.{name}"] - before[f"block1.{name}"] for update in updates[:2]]
    assert torch.allclose(
        fused[f"block1.{name}"], before[f"block1.{name}"] + (new[0] + new[1]) / 3, atol=1e-14
    )
    old = updates[2].tensors[f"block0.{name}"] - before[f"block0.{name}"]
    assert torch.allclose(fused[f"block0.{name}"], before[f"block0.{name}"] + 0.5 * old / 3, atol=1e-14)
    for order in permutations(answers):
        assert same(method.fuse(states[1], order), fused)


def test_statistics_of_a_block_are_those_of_whoever_trained_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    traced = model, trace(model.eval(), (torch.randn(4, 6).double(),))
    method, data = build(4, (0.5, 1.0), model=traced), some_data(2)
    state = method.initial_state()
    updates = [method.train(method.assign(state, 0, each), own) for each, own in enumerate(data)]
    fused = fuse_updates(method, state, updates)
    assert torch.allclose(
        fused["block1.1.running_var"], updates[1].tensors["block1.1.running_var"], atol=1e-14
    )
    assert int(fused["block1.1.num_batches_tracked"]) == int(
        updates[1].tensors["block1.1.num_batches_tracked"]
    )
