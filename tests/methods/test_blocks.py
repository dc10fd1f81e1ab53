"""A sum of blocks: what a block learns, what participants remember, and when they are sent it."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_cases import SETTINGS, build, memory_of, run, said, same, some_data, wide
from building import build_method
from simulated import fuse_updates
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from msfusion.batch import Batch
from msfusion.costs import inference_flops
from msfusion.errors import ConfigError, PrivacyError, UpdateError
from msfusion.federated.method import Task, Update
from msfusion.federated.participation import Conditions
from msfusion.federated.rounds import RoundSettings
from msfusion.federated.states import holding, labelled, loaded, model_state, part
from msfusion.federated.training import TrainingSettings, local_steps
from msfusion.methods.blocks import BlocksMethod
from msfusion.methods.one_wide import is_one_wide_model, one_wide_state
from msfusion.methods.parts.contrastive import ContrastiveSettings
from msfusion.methods.parts.phases import Phases, Seen, Versions, finished_label
from msfusion.methods.parts.remembered import Remembering
from msfusion.methods.parts.silence import silenced
from msfusion.methods.small import small_method
from msfusion.models.sums import label
from msfusion.models.transformer import DecoderLM
from msfusion.objectives import cross_entropy, evaluate
from msfusion.width.groups import State, WidthMap
from msfusion.width.trace import trace

# What a block learns


def test_one_block_is_the_small_model_bit_for_bit() -> None:
    data, training = some_data(), replace(SETTINGS, learning_rate_schedule="cosine", rounds=5)
    blocks = run(build(5, training=training, blocks=1), data, 5)
    small = run(build_method("small", *wide(), (0.25,) * 4, training), data, 5)
    for ours, theirs in zip(blocks, small, strict=True):
        assert same(part(ours.state, "block0"), theirs.state)
        assert [each.loss for each in ours.participants] == [each.loss for each in theirs.participants]
        assert [each.bytes_down for each in ours.participants] == [
            each.bytes_down for each in theirs.participants
        ]


def test_two_linear_blocks_by_hand() -> None:
    """One unit each: f_b(x) = v_b (u_b . x). A full-batch step on v_1 is what f_0 leaves, times the unit's answer."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    traced = model, trace(model, (torch.randn(2, 5).double(),))
    x, y = torch.randn(7, 5).double(), torch.randint(3, (7,))
    training = TrainingSettings(learning_rate=0.3, momentum=0.0, batch_size=7)
    method = build(2, (0.5,), model=traced, training=training, passes=1)
    first, second = run(method, [Batch((x,), y)], 2)
    u, v = first.state["block0.0.weight"], first.state["block0.1.weight"]
    left = torch.softmax(x @ u.T @ v.T, -1) - F.one_hot(y, 3)
    unit = x @ first.state["block1.0.weight"].T
    assert torch.equal(first.state["block1.1.weight"], torch.zeros(3, 1).double())
    assert torch.allclose(second.state["block1.1.weight"], -0.3 * (left.T @ unit) / 7, atol=1e-14)
    assert torch.equal(second.state["block1.0.weight"], first.state["block1.0.weight"])  # no gradient yet
    assert same(part(second.state, "block0"), part(first.state, "block0"))


def test_the_whole_is_the_sum_of_its_blocks_and_begins_as_the_small_model() -> None:
    method, (data, *_) = build(), some_data()
    state = method.initial_state()
    small = loaded(method.small.model, part(state, "block0"))
    assert method.evaluate(state, data) == evaluate(small, data)
    state = {
        name: tensor + torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    each = [said(method, part(state, label(block)), data) for block in range(4)]
    whole = loaded(method.whole, {name: tensor for name, tensor in state.items() if name[0] != "."})
    assert torch.allclose(data.call(whole), sum(each[1:], each[0]), atol=1e-14)


def test_blocks_have_other_weights_of_the_large_model() -> None:
    method = build()
    first = [start["0.weight"] for start in method.starts]
    assert torch.equal(torch.cat(first), wide()[0].state_dict()["0.weight"])
    assert [bool(start["4.weight"].any()) for start in method.starts] == [True, False, False, False]
    assert [bool(start["4.bias"].any()) for start in method.starts] == [True, False, False, False]


def test_who_holds_two_blocks_trains_their_sum() -> None:
    data = some_data(2)
    method = build(4, (0.25, 0.5), passes=1)
    assert [method.held(1, each) for each in range(4)] == [(0, 1), (1, 2), (2, 3), (0, 3)]
    state = run(method, data, 2)[-1].state
    task = method.assign(state, 2, 1)
    update = method.train(replace(task, memory=memory_of(method, state, data[1], (0, 1))), data[1])
    assert {name.split(".")[0] for name in update.tensors} == {"block2", "block3"}
    offset = sum(said(method, part(state, label(block)), data[1]) for block in (0, 1))
    model = method.sum_of(2)
    own = {**labelled("block0", part(state, "block2")), **labelled("block1", part(state, "block3"))}
    slower = replace(
        SETTINGS, learning_rate=SETTINGS.learning_rate / (1 + 2 / 4)
    )  # two blocks, after half of 4 rounds
    local_steps(
        loaded(model, own), replace(data[1], offset=offset), slower, seed=0, round_index=2, participant=1
    )
    for name, tensor in model.state_dict().items():
        trained = update.tensors[name.replace("block1", "block3").replace("block0", "block2")]
        assert torch.allclose(trained, tensor, atol=1e-14)


def test_a_new_block_has_no_say_whatever_the_model_calls_its_layers() -> None:
    torch.manual_seed(0)
    model = DecoderLM(20, block_length=6, features=16, heads=4, layers=1)  # tied: its last matrix also embeds
    width_map = trace(model, (torch.randint(20, (2, 6)),))
    small = small_method(model, width_map, 0.25, (SETTINGS,))
    quiet = silenced(small.model, small.start, width_map.aliases)
    silent = [name for name, tensor in quiet.items() if not torch.equal(tensor, small.start[name])]
    assert silent == ["decoder.norm.weight"]  # its bias is zero already
    logits = loaded(small.model, quiet).train()(torch.randint(20, (3, 6)))
    assert not logits.any()
    (logits * torch.randn_like(logits)).sum().backward()
    gradients = {name: each.grad for name, each in small.model.named_parameters()}
    assert all(gradients[f"decoder.norm.{name}"].abs().sum() > 0 for name in ("weight", "bias"))  # type: ignore[union-attr]


def test_a_block_of_a_tied_model_begins_quiet_so_that_its_matrix_learns_at_once() -> None:
    model, width_map = language_model()
    method, texts = build(4, model=(model, width_map)), some_texts()
    state = method.initial_state()
    assert not any(said(method, part(state, "block1"), each).any() for each in texts)
    task = method.assign(state, 1, 0)
    begins = part(task.tensors, "block1")
    spread = torch.cat([*method.logits(begins, texts[0])]).std(-1)
    assert 0 < float(spread.mean()) < 0.15
    alone = loaded(method.small.model, {**part(state, "block1"), **begins})
    cross_entropy(alone, texts[0]).backward()
    first = dict(alone.named_parameters())["decoder.tokens.weight"].grad
    assert first is not None
    assert bool(
        first.any(1).all()
    )  # every word's row, not only those of the texts: the matrix is the head as well
    done = run(method, texts, 2)[-1].state
    assert torch.equal(
        method.assign(done, 2, 0).tensors["block2.decoder.norm.weight"],
        method.awake[2]["decoder.norm.weight"],
    )


def test_a_block_with_a_head_of_its_own_begins_silent() -> None:
    method = build()
    assert all(same(awake, start) for awake, start in zip(method.awake, method.starts, strict=True))


def test_a_model_that_cannot_be_silenced_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Sigmoid())
    traced = model, trace(model, (torch.randn(2, 6),))
    with pytest.raises(ConfigError, match="begin without a say"):
        build(model=traced)


def test_where_nothing_couples_blocks_the_sum_is_the_wide_model_with_zeros() -> None:
    model, width_map = wide()
    method, (data, *_) = build(), some_data()
    assert is_one_wide_model(method, model, width_map)
    state = run(method, [data] * 4, 8)[-1].state
    one = one_wide_state(method, width_map, model_state(state))
    assert one is not None
    with holding(model, one) as whole:
        assert evaluate(whole, data).loss == pytest.approx(method.evaluate(state, data).loss, rel=1e-12)
    assert not is_one_wide_model(build(blocks=3), model, width_map)  # units are left over
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    traced = normed, trace(normed, (torch.randn(2, 6).double(),))
    assert not is_one_wide_model(build(model=traced), *traced)


@pytest.mark.slow
def test_blocks_learn_together_what_one_of_them_cannot() -> None:
    """Exclusive or: one hidden unit cannot tell it, four can. The same rounds, steps and sub-models for both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    traced = model, trace(model, (torch.randn(2, 2).double(),))
    x = torch.randn(96, 2).double()
    x += 0.3 * x.sign()
    y = (x[:, 0] * x[:, 1] > 0).long()
    data, test, rounds = [Batch((x[each::3],), y[each::3]) for each in range(3)], Batch((x,), y), 24
    training = TrainingSettings(optimizer="adam", learning_rate=0.1, batch_size=16, local_epochs=2)
    small = build_method("small", *traced, (0.25,) * 3, training)
    blocks = build(rounds, (0.25,) * 3, model=traced, training=training, passes=2)
    settings = RoundSettings(rounds, evaluate_every=rounds)
    found = [
        run(each, data, rounds, settings=settings, test=test, together=3)[-1].evaluation
        for each in (blocks, small)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].loss < 0.85 * found[1].loss
    assert found[0].accuracy > found[1].accuracy


def test_statistics_of_batchnorm_are_averaged_and_nobody_measures() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    traced = model, trace(model, (torch.randn(2, 6).double(),))
    method, data = build(3, model=traced), some_data()
    assert not method.recalibrates
    results = run(method, data, 3, test=data[0])
    assert all(result.measuring_bytes == 0 for result in results)
    means = [results[-1].state[f"block{block}.1.running_mean"] for block in range(4)]
    assert [bool(mean.any()) for mean in means] == [True, True, True, False]


# What participants remember


@pytest.mark.parametrize("seed", [0, 1])
def test_whoever_comes_back_is_sent_just_what_it_misses(seed: int) -> None:
    """Whatever the absences, late and refused updates: at its first round in a phase a participant remembers the
    present logits of all blocks that it does not train. It is never sent what it has, unless its update was late.
    """
    rounds, data, draw = 24, some_data(5), random.Random(seed)
    method = build(rounds, (0.25, 0.25, 0.25, 0.5, 0.25), passes=3)
    state, late = method.initial_state(), list[tuple[Task, Update]]()
    memories: dict[int, State] = {each: {} for each in range(5)}
    checked, were_late = dict[int, int](), set[int]()
    for round_index in range(rounds):
        phase, updates = method.phases.phase(round_index), late
        late = []
        for each in draw.sample(range(5), 3):
            task = replace(method.assign(state, round_index, each), memory=memories[each])
            held, update = method.held(each, round_index), method.train(task, data[each])
            sent = {name.split(".")[0] for name in task.tensors}
            kept = {**task.memory, **update.memory}
            if checked.get(each) == phase:
                assert sent == {label(block) for block in held}
            else:
                for block in set(range(4)) - {*held}:
                    now = said(method, part(state, label(block)), data[each])
                    assert torch.equal(
                        kept.get(f"{finished_label(block)}.logits", torch.zeros_like(now)), now
                    )
                    had = task.memory.get(f"{finished_label(block)}.logits")
                    known = had is not None and torch.equal(had, now) and each not in were_late
                    assert not known or finished_label(block) not in sent
            fate = draw.choice(["merged", "merged", "refused", "late"])
            if fate != "refused":
                memories[each] = kept
            if fate == "merged":
                updates.append((task, update))
                checked[each] = phase
            if fate == "late":
                late.append((task, replace(update, share=0.5)))
                were_late.add(each)
        state = method.fuse(state, updates) if updates else state


def test_versions_follow_what_was_merged() -> None:
    versions = Versions.first(2, 3)
    assert versions.due(0, 0, (0,)) == []  # nobody needs to be sent silence
    assert versions.due(0, 0, (1,)) == [0]  # the small model has a say from the first round on
    versions = versions.after([Seen(0, 0, (0,), True), Seen(1, 0, (0,), False)])
    assert versions.changes.tolist() == [1, 0, 0]
    assert versions.due(0, 1, (1,)) == [0]
    after = versions.after([Seen(0, 1, (1,), True)])
    assert after.due(0, 1, (1,)) == []
    assert after.remembered(0) == [0]
    assert after.due(1, 1, (1,)) == [0]  # absent: it still misses the first
    assert after.due(0, 2, (2,)) == [1]
    late = versions.after([Seen(0, 1, (1,), False)])
    assert late.changes.tolist() == [1, 1, 0]
    assert late.due(0, 1, (1,)) == [0]  # what it was sent then is not known: once more


@pytest.mark.parametrize("first", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize(
    ("rounds", "blocks", "passes"),
    [(160, 4, 8), (10, 4, 8), (7, 3, 2), (2, 4, 8), (1, 1, 1), (9, 1, 1), (24, 1, 3), (100, 3, 1)],
)
def test_phases_divide_the_rounds_evenly(rounds: int, blocks: int, passes: int, first: float) -> None:
    phases = Phases(rounds, blocks, passes, first=first)
    each = [phases.phase(round_index) for round_index in range(rounds)]
    lengths = [each.count(phase) for phase in range(phases.count)]
    assert sorted(each) == each
    assert sum(lengths) == rounds
    alone = int(first * rounds) if blocks * passes > 1 else 0
    assert phases.count == min(blocks * passes, rounds - alone + (alone > 0))
    if alone:
        assert lengths[0] == alone
        lengths = lengths[1:]
    assert max(lengths) - min(lengths) <= 1
    lengths = [each.count(phase) for phase in range(phases.count)]
    places = [(round_index, *phases.place(round_index)) for round_index in range(rounds)]
    assert all(length == lengths[each[at]] and 0 <= step < length for at, step, length in places)
    assert all(step == each[:at].count(each[at]) for at, step, _ in places)


def test_who_can_hold_more_blocks_trains_those_that_come_next() -> None:
    phases = Phases(8, 4, 2)
    assert [phases.held(each) for each in range(4)] == [(0,), (1,), (2,), (3,)]
    assert [phases.held(each, 2) for each in range(4)] == [(0, 1), (1, 2), (2, 3), (0, 3)]
    assert phases.held(3, 9) == (0, 1, 2, 3)
    alone = Phases(8, 4, 2, first=0.5)
    assert [alone.held(each) for each in range(6)] == [(0,)] * 4 + [(1,), (2,)]


def test_remembered_and_recomputed_logits_train_the_same() -> None:
    data = some_data()
    remembered = run(build(6), data, 6)[-1]
    recomputed = run(build(6, remembered_bytes=0), data, 6)[-1]
    for name, tensor in remembered.state.items():
        assert torch.allclose(tensor.double(), recomputed.state[name].double(), atol=1e-12), name
    assert {name.split(".", 1)[1] for name in remembered.memories[0]} == {"logits"}
    assert {name.split(".", 1)[1] for name in recomputed.memories[0]} == set(build().starts[0])
    first, second = ([each.bytes_down for each in result.participants] for result in (remembered, recomputed))
    assert first == second


def language_model() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = DecoderLM(256, features=16, heads=4, layers=1).double()
    return model, trace(model, (torch.randint(256, (2, 8)),))


def some_texts(participants: int = 3) -> list[Batch]:
    torch.manual_seed(1)
    return [
        Batch((tokens[:, :-1],), tokens[:, 1:])
        for tokens in torch.randint(256, (participants, 10, 9)).unbind()
    ]


@pytest.mark.release
def test_the_largest_logits_alone_train_almost_the_same() -> None:
    """Of 256 logits of each position 16 or 64 are kept: the more, the nearer to remembering all of them."""
    texts, apart = some_texts(), list[float]()
    adam = replace(SETTINGS, optimizer="adamw", learning_rate=0.02)
    exact = build(16, model=language_model(), training=adam)
    expected = exact.evaluate(run(exact, texts, 16)[-1].state, texts[0]).loss
    began = exact.evaluate(exact.initial_state(), texts[0]).loss
    for kept in (16, 64):
        limit = 2 * 4 * (8 * 256 + texts[0].targets.numel() * (8 + kept * 12))
        method = build(16, model=language_model(), training=adam, remembered_bytes=limit)
        assert method.remembering.kept(texts[0]) == kept
        result = run(method, texts, 16)[-1]
        names = {name.split(".", 1)[1] for name in result.memories[0]}
        assert names == {"common", "rest", "extra", "classes"}
        apart.append(abs(method.evaluate(result.state, texts[0]).loss - expected))
    assert 0 < apart[1] < apart[0] < 0.1 * (began - expected)


@pytest.mark.parametrize("classes", [10, 100])
def test_what_is_remembered_as_logits_keeps_within_its_limit(classes: int) -> None:
    """With the sum of all blocks beside each of them: at a byte less than that not all logits are kept."""
    data = Batch((torch.zeros(8, 2),), torch.zeros(8, dtype=torch.long))
    every = 8 * classes * 4
    for blocks in (2, 3, 8):
        for limit in range(0, 2 * blocks * every, every // 4):
            remembering = Remembering(classes, torch.float32, blocks, limit)
            assert remembering.recomputes(data) or remembering.bytes_for(data, blocks) <= limit
        room = (blocks + 1) * every
        assert Remembering(classes, torch.float32, blocks, room).kept(data) == classes
        assert Remembering(classes, torch.float32, blocks, room - 1).kept(data) < classes


def test_a_single_block_has_nothing_to_remember() -> None:
    data = Batch((torch.zeros(8, 2),), torch.zeros(8, dtype=torch.long))
    alone = Remembering(10, torch.float32, 1, limit=0)
    assert not alone.recomputes(data)
    assert alone.bytes_for(data, 0) == 0


# However it is run


def test_two_workers_and_a_resume_at_each_round_change_no_bit() -> None:
    data, rounds = some_data(), 6
    conditions = Conditions(dropout=(0.3,) * 4)
    whole = run(build(rounds), data, rounds, conditions=conditions)
    two = run(build(rounds), data, rounds, conditions=conditions, workers=2)
    assert same(two[-1].state, whole[-1].state)
    for done in range(1, rounds):
        before, kept = whole[done - 1].state, dict[int, State](whole[done - 1].memories)
        rest = run(
            build(rounds), data, rounds, conditions=conditions, state=before, memories=kept, first_round=done
        )
        assert same(rest[-1].state, whole[-1].state)
        assert all(same(rest[-1].memories[each], whole[-1].memories[each]) for each in rest[-1].memories)


def test_participants_trained_at_once_give_the_same_but_for_rounding() -> None:
    data, ratios = some_data(), (0.25, 0.25, 0.5, 0.25)
    alone = run(build(6, ratios), data, 6)
    grouped = run(build(6, ratios), data, 6, together=3)
    for one, many in zip(alone, grouped, strict=True):
        assert all(
            torch.allclose(one.state[name].double(), many.state[name].double(), atol=1e-12)
            for name in one.state
        )
        assert [each.bytes_up for each in one.participants] == [each.bytes_up for each in many.participants]


def test_only_the_blocks_that_it_trained_may_leave_a_participant() -> None:
    data, method = some_data(), build(8)
    state: dict[str, Tensor] = run(method, data, 2)[-1].state
    task = method.assign(state, 2, 0)
    assert {name.split(".")[0] for name in task.tensors} == {"block2", "finished1"}
    update = method.train(task, data[0])
    outbound = method.outbound("train", task)
    assert outbound.select(update.tensors, update.metadata, "it").keys() == update.tensors.keys()
    for leak in (update.memory, {name: task.tensors[name] for name in task.tensors if name[0] == "f"}):
        with pytest.raises(PrivacyError):
            outbound.select(leak, {}, "it")


def test_an_update_of_another_block_is_refused_by_its_participant() -> None:
    data, method = some_data(), build(8)
    state = method.initial_state()
    update = method.train(method.assign(state, 0, 1), data[1])
    strange = {name.replace("block0", "block1"): tensor for name, tensor in update.tensors.items()}
    with pytest.raises(UpdateError, match="participant 1") as caught:
        fuse_updates(method, state, [replace(update, tensors=strange)])
    assert caught.value.participant == 1
    with pytest.raises(UpdateError, match="no block that it was to train"):
        fuse_updates(method, state, [replace(update, tensors={**update.tensors, **strange})])


def test_one_bad_participant_does_not_spoil_a_block() -> None:
    class Spoiling(BlocksMethod):
        def train(self, task: Any, data: Batch) -> Update:
            update = super().train(task, data)
            if task.participant or task.round_index != 3:
                return update
            return replace(
                update, tensors={name: tensor * torch.nan for name, tensor in update.tensors.items()}
            )

    good = build(6)
    method = Spoiling(**{each.name: getattr(good, each.name) for each in fields(good)})
    results = run(method, some_data(), 6)
    assert [[each.participant for each in result.left_out] for result in results] == [[], [], [], [0], [], []]
    moved = [{each.participant: each.bytes_down for each in result.participants} for result in results]
    assert moved[4][0] > moved[4][1]  # it was not merged: what it was sent then is sent once more
    assert all(bool(tensor.isfinite().all()) for tensor in results[-1].state.values())


def test_the_contrastive_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="contrastive_weight"):
        build_method(
            "msfusion", *wide(), (0.25,), SETTINGS, contrastive=ContrastiveSettings(1.0), start="blocks",
        )  # fmt: skip


def test_forward_flops_are_those_that_a_counter_sees() -> None:
    method, (data, *_) = build(), some_data()
    with FlopCounterMode(display=False) as counter:
        said(method, method.starts[0], data)
    assert counter.get_total_flops() == inference_flops(method.small.model, data) * len(data)
