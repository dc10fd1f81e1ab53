"""The contrastive loss: its value by hand, whom it trains, when it is on, and what a participant remembers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from building import AVERAGING, build_method
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import fuse_updates, run_rounds
from torch import Tensor, nn

from msfusion.batch import IGNORED, Batch
from msfusion.errors import ConfigError
from msfusion.federated.method import Method, Task, Update
from msfusion.federated.rounds import RoundResult, RoundSettings
from msfusion.federated.training import TrainingSettings, local_steps
from msfusion.methods.narrow import NarrowMethod
from msfusion.methods.parts.contrastive import (
    ROUND,
    ContrastiveObjective,
    ContrastiveSettings,
    contrastive_loss,
    fast_contrastive_loss,
)
from msfusion.methods.small import SmallMethod
from msfusion.models.transformer import DecoderLM
from msfusion.objectives import cross_entropy
from msfusion.scoring import Scoring
from msfusion.width.groups import State, WidthMap
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace

SETTINGS = TrainingSettings(learning_rate=0.1, batch_size=4)
ON = ContrastiveSettings(weight=1.0, every=1)


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def linear() -> nn.Linear:
    return nn.Linear(3, 2, bias=False)


def examples(count: int = 12) -> Batch:
    return Batch((torch.randn(count, 6),), torch.randint(3, (count,)))


def texts(count: int = 6) -> Batch:
    targets = torch.randint(11, (count, 5))
    targets[:, 3:] = IGNORED
    return Batch((torch.randint(11, (count, 5)),), targets)


class Offset(nn.Module):
    """Two layers that are narrowed, and a table outside the state dict that is narrowed with them."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head((self.inside(x) * self.table).relu())
        return result


@cache
def mlp() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    return model, trace(model, (torch.randn(2, 6),))


@cache
def offset() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = Offset()
    return model, trace(model, (torch.randn(2, 6),))


@cache
def decoder() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = DecoderLM(11, block_length=5, features=8, heads=2, layers=1)
    return model, trace(model, (torch.randint(11, (2, 5)),))


def method_for(name: str = "msfusion", contrastive: ContrastiveSettings = ON) -> NarrowMethod | SmallMethod:
    return build_method(name, *mlp(), (0.5,) * 4, SETTINGS, seed=3, contrastive=contrastive)


def second_task(method: Method, data: Batch, participant: int = 1) -> Task:
    """A participant's task in its second round, with its memory of the first."""
    first = method.train(method.assign(method.initial_state(), 0, participant), data)
    state = fuse_updates(method, method.initial_state(), [replace(first, memory={})])
    return replace(method.assign(state, 1, participant), memory=first.memory)


def test_the_loss_is_what_one_computes_by_hand() -> None:
    logits = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    received = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # cosines 1 and 0
    previous = torch.tensor([[4.0, -3.0], [-5.0, 0.0]])  # cosines 0 and -1
    expected = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-2.0))) / 2  # tau is 1/2
    for loss in (contrastive_loss, fast_contrastive_loss):
        torch.testing.assert_close(loss(logits, received, previous, 0.5), torch.tensor(expected))
        # as the paper writes it
        ratio = math.exp(1.0) / (math.exp(1.0) + math.exp(0.0))
        torch.testing.assert_close(
            loss(logits[:1], received[:1], previous[:1], 1.0), torch.tensor(-math.log(ratio))
        )


@settings(max_examples=50)
@given(st.integers(1, 70), st.integers(1, 3000), st.floats(0.05, 5.0), st.integers(0, 99))
def test_the_fast_loss_is_the_readable_one(rows: int, classes: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, received, previous = torch.randn(3, rows, classes, generator=generator)
    logits[0] = 0.0  # no direction at all
    received[-1] = 0.0
    values, slopes = [], []
    for loss in (contrastive_loss, fast_contrastive_loss):
        own = logits.clone().requires_grad_()
        value = loss(own, received, previous, temperature)
        (3 * value).backward()  # type: ignore[no-untyped-call]
        assert own.grad is not None
        values.append(value.detach())
        slopes.append(own.grad)
    assert not slopes[1][0].any()  # a row without a direction has no slope; torch's cosine gives it 1e8
    slopes = [each[1:] for each in slopes]
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5)


def test_the_gradient_reaches_the_model_in_training_only() -> None:
    model, received, previous = linear(), linear().eval(), linear().eval()
    batch = Batch((torch.randn(5, 3),), torch.randint(2, (5,)))
    objective = ContrastiveObjective(received, previous, ContrastiveSettings(2.0, 0.25, 1), 0)
    loss = objective(model, batch)
    assert isinstance(batch.inputs, tuple)
    x = batch.inputs[0]
    with torch.no_grad():
        expected = F.cross_entropy(model(x), batch.targets)
        expected += 2.0 * contrastive_loss(model(x), received(x), previous(x), 0.25)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()  # type: ignore[no-untyped-call]
    assert model.weight.grad is not None
    assert not torch.equal(
        model.weight.grad, torch.autograd.grad(cross_entropy(model, batch), model.weight)[0]
    )
    assert received.weight.grad is None
    assert previous.weight.grad is None


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_kth_mini_batch_has_it_k_fold_and_each_place_in_turn(every: int) -> None:
    model, received, previous = linear(), linear(), linear()
    batch = Batch((torch.randn(5, 3),), torch.randint(2, (5,)))
    plain = cross_entropy(model, batch)
    full = ContrastiveObjective(received, previous, ContrastiveSettings(1.0, 0.5, 1), 0)(model, batch) - plain
    seen = torch.zeros(6)
    for round_index in range(every):
        settings = ContrastiveSettings(1.0, 0.5, every)
        objective = ContrastiveObjective(received, previous, settings, round_index)
        terms = torch.stack([objective(model, batch) - plain for _ in range(6)]).detach()
        assert int((terms != 0).sum()) == 6 // every
        torch.testing.assert_close(terms.mean(), full.detach())
        seen += terms
    torch.testing.assert_close(seen / every, full.detach().expand(6))


def test_tokens_without_a_target_do_not_count() -> None:
    torch.manual_seed(1)
    model, received, previous = (
        DecoderLM(11, block_length=5, features=8, heads=2, layers=1) for _ in range(3)
    )
    batch = texts()
    assert isinstance(batch.inputs, tuple)
    loss = ContrastiveObjective(received, previous, ON, 0)(model, batch)
    with torch.no_grad():
        z = [each(batch.inputs[0])[:, :3].reshape(-1, 11) for each in (model, received, previous)]
        expected = F.cross_entropy(z[0], batch.targets[:, :3].reshape(-1)) + contrastive_loss(*z, 0.5)
    torch.testing.assert_close(loss.detach(), expected)
    nothing = Batch(batch.inputs, torch.full((6, 5), IGNORED))
    assert ContrastiveObjective(received, previous, ON, 0)(model, nothing).detach() == 0.0


@pytest.mark.parametrize("name", AVERAGING)
def test_without_a_memory_it_is_plain_cross_entropy_bit_for_bit(name: str) -> None:
    data = examples()
    plain, contrastive = method_for(name, ContrastiveSettings()), method_for(name)
    one, other = (each.train(each.assign(each.initial_state(), 0, 1), data) for each in (plain, contrastive))
    assert same(one.tensors, other.tensors)
    assert (one.loss, one.examples, one.metadata) == (other.loss, other.examples, other.metadata)
    assert not one.memory
    assert same(other.memory, {**other.tensors, ROUND: torch.tensor(0)})


@pytest.mark.parametrize("name", AVERAGING)
def test_weight_zero_changes_nothing_even_with_a_memory(name: str) -> None:
    data = examples()
    task = second_task(method_for(name), data)
    off = method_for(name, ContrastiveSettings(0.0, 0.1, 1))
    assert same(off.train(task, data).tensors, off.train(replace(task, memory={}), data).tensors)
    assert not same(off.train(task, data).tensors, method_for(name).train(task, data).tensors)


@pytest.mark.parametrize("build", [mlp, offset])
def test_a_round_is_the_loop_by_hand(build: object) -> None:
    """The frozen models are the one just received and the one trained before, each in its own window."""
    model, width_map = build()  # type: ignore[operator]
    method = build_method("msfusion", model, width_map, (0.5,) * 4, SETTINGS, seed=3, contrastive=ON)
    assert isinstance(method, NarrowMethod)
    data = examples()
    task = second_task(method, data)
    assert int(task.memory[ROUND]) == 0
    windows = [method.window(round_index, 1) for round_index in (0, 1)]
    assert any(not torch.equal(windows[0][name], windows[1][name]) for name in windows[0])
    previous, received, own = (narrow(model, width_map, windows[index]) for index in (0, 1, 1))
    previous.load_state_dict({name: tensor for name, tensor in task.memory.items() if name != ROUND})
    for each in (received, own):
        each.load_state_dict(task.tensors)
    objective = ContrastiveObjective(received.eval(), previous.eval(), ON, 1)
    local_steps(own, data, SETTINGS, seed=3, round_index=1, participant=1, objective=objective)
    update = method.train(task, data)
    assert same(update.tensors, own.state_dict())
    assert same(update.memory, {**update.tensors, ROUND: torch.tensor(1)})


@pytest.mark.one_in_ci
@pytest.mark.parametrize("name", ["msfusion", "small"])
def test_one_and_two_workers_give_the_same_bits(name: str) -> None:
    model, width_map = decoder()
    chosen = RoundSettings(rounds=4, count=3, seed=1)
    data = [texts(count) for count in range(5, 9)]
    runs: list[list[RoundResult]] = []
    for weight, workers in ((1.0, 1), (1.0, 2), (0.0, 1)):
        method = build_method(
            name,
            model,
            width_map,
            (0.5, 0.25, 0.5, 1.0),
            SETTINGS,
            seed=2,
            scoring=Scoring(language_modelling=True),
            contrastive=ContrastiveSettings(weight),
        )
        runs.append(list(run_rounds(method, data, chosen, workers=workers)))
    one, two, plain = runs
    for left, right, without in zip(one, two, plain, strict=True):
        assert same(left.state, right.state)
        assert left.memories.keys() == right.memories.keys()
        assert all(same(left.memories[who], right.memories[who]) for who in left.memories)
        assert not without.memories
        for mine, theirs in zip(left.participants, without.participants, strict=True):
            assert (mine.bytes_down, mine.bytes_up) == (theirs.bytes_down, theirs.bytes_up)
    assert same(one[0].state, plain[0].state)  # nobody has a previous sub-model yet
    assert not same(one[-1].state, plain[-1].state)


def test_a_participant_remembers_nothing_that_it_did_not_hold() -> None:
    method = method_for()
    update = method.train(second_task(method, examples()), examples())
    assert isinstance(update, Update)
    assert {name: tensor.shape for name, tensor in update.memory.items() if name != ROUND} == {
        name: tensor.shape for name, tensor in update.tensors.items()
    }


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"weight": -1.0}, "contrastive_weight is -1.0: it must be at least 0"),
        ({"weight": math.inf}, "contrastive_weight is Infinity: .* finite"),
        ({"weight": math.nan}, "contrastive_weight is NaN"),
        ({"temperature": 0.0}, "contrastive_temperature is 0.0: it must be above 0"),
        ({"temperature": math.nan}, "contrastive_temperature is NaN"),
        ({"every": 0}, "contrastive_every is 0: it must be at least 1"),
    ],
)
def test_impossible_settings(wrong: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ContrastiveSettings(**wrong)  # type: ignore[arg-type]
