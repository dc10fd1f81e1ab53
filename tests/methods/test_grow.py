"""Fed-Grow: what a round does, what travels, every rival, and that a run resumes to the same bits."""

from __future__ import annotations

import statistics
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from building import build_method
from grow_cases import (
    EXAMPLE,
    INTERMEDIATE,
    LIGO,
    ROUND,
    TARGET,
    WIDE,
    classifier,
    data,
    method_of,
    model_of,
    same,
    same_memories,
    smalls,
    tensors_of,
    texts,
    trace_once,
)
from loopback import Loopback
from simulated import fuse_updates, run_rounds

from msfusion.codecs import DeadZone
from msfusion.errors import UpdateError
from msfusion.federated import rounds as federated_rounds
from msfusion.federated.compression import compressed
from msfusion.federated.participation import Conditions
from msfusion.federated.rounds import RoundResult, RoundSettings
from msfusion.federated.states import labelled, part, state_of
from msfusion.federated.training import local_steps
from msfusion.growth import GrownModel, Start
from msfusion.methods.fedgrow.costs import grow_costs
from msfusion.methods.fedgrow.method import GrowMethod
from msfusion.methods.fedgrow.private import SmallModel, private_stages
from msfusion.methods.fedgrow.settings import GrowSettings
from msfusion.objectives import evaluate, evaluate_for

VARIANTS: dict[str, GrowSettings] = {
    "dual-ligo": LIGO,
    "then alone": replace(LIGO, growth_rounds=1, further="alone"),
    "then federated": replace(LIGO, growth_rounds=1, further="federated"),
    "without federation": replace(LIGO, share="nothing"),
    "average everything": replace(LIGO, share="everything"),
    "net2net, federated": replace(LIGO, growth="preserve", further="federated"),
    "stacked, alone": replace(LIGO, growth="stack", further="alone"),
    "interlaced, alone": replace(LIGO, growth="interlace", further="alone"),
    "scratch, alone": replace(LIGO, growth="scratch", further="alone"),
}
IN_CI = {"dual-ligo", "then federated", "stacked, alone"}
"""Of these, the variants that `scripts/check` resumes after each round."""

CHANGING = Conditions(dropout=(0.3, 0.5, 0.6))
"""Under the seed of `rounds` the first comes alone in round 0, all in round 1, two in round 2."""


def rounds(method: GrowMethod, count: int = 3, **options: Any) -> list[RoundResult]:
    return list(run_rounds(method, data(), RoundSettings(rounds=count, seed=1), test=texts(30, 9), **options))


@lru_cache
def whole(variant: str) -> list[RoundResult]:
    """An undisturbed run of three rounds, with somebody absent in each."""
    return rounds(method_of(VARIANTS[variant]), conditions=CHANGING)


def test_a_round_is_the_average_of_what_participants_make_of_the_operator() -> None:
    method = method_of()
    state = method.initial_state()
    updates = [method.train(method.assign(state, 0, p), own) for p, own in enumerate(data())]
    assert all(update.tensors.keys() == state.keys() for update in updates)
    expected = {name: sum(u.tensors[name].double() * u.examples for u in updates) / 48 for name in state}
    fused = fuse_updates(method, state, updates)
    assert all(torch.equal(fused[name], expected[name].float()) for name in state)  # type: ignore[union-attr]
    assert same(fused, fuse_updates(method, state, updates[::-1]))
    (result,) = rounds(method, 1)
    assert same(result.state, fused)
    uniform = fuse_updates(replace(method, weighting="uniform"), state, updates)
    assert all(
        torch.equal(uniform[name], (sum(u.tensors[name].double() for u in updates) / 3).float())  # type: ignore[union-attr]
        for name in state
    )
    short = replace(updates[0], tensors=dict(list(updates[0].tensors.items())[1:]))
    with pytest.raises(UpdateError, match="participant 0 in round 1: the update lacks 1 tensors"):
        fuse_updates(method, state, [short])


def test_one_participant_at_equal_sizes_is_plain_training_of_the_operator() -> None:
    """Its small model is the intermediate, and what it begins from is what it has: the loop written out."""
    settings = replace(LIGO, start=Start(noise=0.0))
    small = SmallModel(model_of(INTERMEDIATE), state_of(model_of(INTERMEDIATE)), trained=True)
    method = method_of(settings, own=[small], target=INTERMEDIATE)
    grown = method.new_operator().materialise(small.state)
    assert all(torch.equal(grown[name], tensor) for name, tensor in small.state.items())  # the identity
    own = data()[0]
    results = list(run_rounds(method, [own], RoundSettings(rounds=2)))
    intermediate = part(results[0].memories[0], "intermediate")
    operator = method.new_operator()
    for round_index in range(2):
        model = GrownModel(operator, intermediate, classifier(INTERMEDIATE))
        local_steps(model, own, ROUND, seed=0, round_index=round_index, participant=0)
        assert same(results[round_index].state, labelled("operator", operator.tensors()))


def test_the_private_stages_come_once_whenever_a_participant_appears() -> None:
    method = method_of()
    first, later = (method.train(method.assign(method.initial_state(), at, 1), data()[1]) for at in (0, 3))
    assert same(first.memory, later.memory)
    stages = private_stages(method.growers[1], model_of(INTERMEDIATE), 1, data()[1], LIGO, 0)
    assert same(first.memory, labelled("intermediate", stages.intermediate))
    again = method.train(replace(method.assign(method.initial_state(), 1, 1), memory=first.memory), data()[1])
    assert again.memory == {}
    trained = [SmallModel(s.model, stages.small, trained=True) for s in smalls()]
    ready = method_of(own=[trained[1]] * 3)
    assert same(
        private_stages(ready.growers[1], model_of(INTERMEDIATE), 1, data()[1], LIGO, 0).small, stages.small
    )


@pytest.mark.release
def test_participants_differ_and_say_how_good_their_models_are() -> None:
    method = replace(method_of(), own_labels=True)
    results = rounds(method, 3, conditions=Conditions(dropout=(0.0, 0.0, 0.9)))
    last = results[-1]
    assert last.evaluation is not None
    assert last.evaluation.loss == statistics.fmean(report.test.loss for report in last.reports)
    assert last.spread is not None
    assert last.spread.accuracy == statistics.stdev(report.test.accuracy for report in last.reports)
    assert len({report.test.loss for report in last.reports}) == len(last.reports) >= 2
    assert [report.participant for report in last.reports] == sorted(last.memories)
    operator_bytes = grow_costs(method, texts(8, 0)).bytes_down
    assert {result.measuring_bytes for result in results} == {3 * operator_bytes}  # scores are no tensors
    for report in last.reports:
        operator = method.new_operator()
        operator.load_tensors(part(last.state, "operator"))
        model = classifier(TARGET)
        with torch.no_grad():
            model.load_state_dict(
                operator.materialise(part(last.memories[report.participant], "intermediate"))
            )
        scores = evaluate_for(model, texts(30, 9), data()[report.participant].targets)
        for reported, found in zip((report.test, report.own), scores, strict=True):
            # the report was made before what is kept was laid out anew, and sums then round otherwise
            assert reported == replace(found, loss=reported.loss)
            assert reported.loss == pytest.approx(found.loss, rel=1e-6)
        assert report.test.accuracy == evaluate(model, texts(30, 9)).accuracy
    assert last.own_evaluation is not None
    assert last.own_spread is not None
    own = [report.own.accuracy for report in last.reports if report.own is not None]
    assert (last.own_evaluation.accuracy, last.own_spread.accuracy) == (
        statistics.fmean(own),
        statistics.stdev(own),
    )


def test_who_shares_a_target_can_say_what_it_is_worth_as_well() -> None:
    federated = replace(LIGO, growth="scratch", further="federated")
    plain, asked = (rounds(replace(method_of(federated), own_labels=ask), 1)[0] for ask in (False, True))
    assert plain.reports == ()
    assert same(plain.state, asked.state)
    assert plain.evaluation is not None
    assert asked.evaluation is not None
    assert asked.evaluation.accuracy == pytest.approx(plain.evaluation.accuracy)
    assert asked.spread is not None
    assert asked.spread.accuracy == 0
    model = classifier(TARGET)
    model.load_state_dict(part(asked.state, "target"))
    for report in asked.reports:
        assert (report.test, report.own) == evaluate_for(
            model, texts(30, 9), data()[report.participant].targets
        )


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    "variant",
    [pytest.param(each, marks=() if each in IN_CI else pytest.mark.release) for each in VARIANTS],
)
def test_resumed_after_any_round_with_participants_absent_it_gives_the_same_bits(variant: str) -> None:
    """With one worker and with two."""
    results = whole(variant)
    assert [len(result.participants) for result in results] == [1, 3, 2]
    for done, middle in enumerate(results[:-1], 1):
        rest = rounds(
            method_of(VARIANTS[variant]),
            state=middle.state,
            memories=middle.memories,
            first_round=done,
            conditions=CHANGING,
            workers=1 + done % 2,
        )
        for one, other in zip(rest, results[done:], strict=True):
            assert same(one.state, other.state)
            assert same_memories(one.memories, other.memories)  # type: ignore[arg-type]
            assert one.reports == other.reports
            assert one.evaluation == other.evaluation


@pytest.mark.parametrize(
    "variant",
    [
        "then federated",
        *(pytest.param(e, marks=pytest.mark.release) for e in ("dual-ligo", "average everything")),
    ],
)
def test_by_codecs_the_bits_are_the_same_after_a_resume_and_over_a_network(variant: str) -> None:
    """What a participant knows and owes waits, with its intermediate model, until it is there again."""

    def by_codecs() -> GrowMethod:
        method = method_of(VARIANTS[variant])
        compressed(method, DeadZone(step=1.4), DeadZone(step=1.4))
        return method

    results = rounds(by_codecs(), conditions=CHANGING)
    middle = results[1]
    (rest,) = rounds(
        by_codecs(),
        state=middle.state,
        memories=middle.memories,
        first_round=2,
        conditions=CHANGING,
        workers=2,
    )
    assert same(rest.state, results[2].state)
    assert same_memories(rest.memories, results[2].memories)  # type: ignore[arg-type]
    assert rest.reports == results[2].reports
    settings, network = RoundSettings(rounds=3, seed=1), Loopback(own=lambda _: deepcopy(by_codecs()))
    there = list(
        federated_rounds.run_rounds(by_codecs(), data(), settings, conditions=CHANGING, engine=network)
    )
    for ours, theirs in zip(results, there, strict=True):
        assert same(ours.state, theirs.state)


def test_by_codecs_the_operator_travels_in_a_tenth_of_the_bytes_and_learns_as_much() -> None:
    plain, small = method_of(), method_of()
    compressed(small, DeadZone(step=1.4), DeadZone(step=1.4))
    before, after = rounds(plain, 6), rounds(small, 6)
    for one, other in zip(before[1:], after[1:], strict=True):  # in round 0 nothing is new to anybody
        for each, less in zip(one.participants, other.participants, strict=True):
            assert less.bytes_up < each.bytes_up / 10
            assert less.bytes_down < each.bytes_down / 10
    first = method_of().initial_state()
    moved, apart = (
        sum(float((before[-1].state[name] - others[name]).square().sum()) for name in first)
        for others in (first, after[-1].state)
    )
    assert apart < 0.3 * moved


@pytest.mark.release
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_travels_and_what_is_kept(variant: str) -> None:
    settings = VARIANTS[variant]
    for result in whole(variant):
        growing = settings.growing(result.round_index)
        travels = {name.partition(".")[0] for name in result.state}
        kept = {name.partition(".")[0] for memory in result.memories.values() for name in memory}
        up = {each.bytes_up for each in result.participants}
        if variant in ("without federation", "stacked, alone", "interlaced, alone", "scratch, alone"):
            assert (travels, up) == (set(), {0})
            assert kept == ({"intermediate", "operator"} if growing else {"target"})
        elif variant == "average everything":
            assert (travels, kept) == ({"operator", "intermediate", "target"}, set())
            assert result.reports == ()  # there is one model for all
        elif variant == "net2net, federated":
            assert (travels, kept) == ({"target"}, set())
        else:
            assert travels == ({"target"} if variant == "then federated" and not growing else {"operator"})
            assert kept == ({"target"} if variant == "then alone" and not growing else {"intermediate"})
        assert result.evaluation is not None


@pytest.mark.release
def test_from_scratch_the_federated_target_is_fedavg() -> None:
    settings = GrowSettings(growth="scratch", further="federated", training=ROUND)
    method = method_of(settings)
    start = {name: tensor.clone() for name, tensor in method.fresh.items()}
    model = classifier(TARGET)
    model.load_state_dict(start)
    fedavg = build_method("fedavg", model, trace_once(model, EXAMPLE), [1.0] * 3, ROUND)
    for ours, theirs in zip(rounds(method, 2), rounds(fedavg, 2), strict=True):  # type: ignore[arg-type]
        assert same(part(ours.state, "target"), theirs.state)
        assert ours.evaluation == theirs.evaluation
        assert [each.loss for each in ours.participants] == [each.loss for each in theirs.participants]


def test_a_copy_starts_where_the_small_model_is() -> None:
    for growth, exact in (("preserve", True), ("stack", False)):
        method = method_of(replace(LIGO, growth=growth, further="alone"))  # type: ignore[arg-type]
        (small, grown) = (classifier(WIDE), classifier(TARGET))
        tensors = part(method._begin(1, data()[1]), "target")
        grown.load_state_dict(tensors)
        small.load_state_dict(model_of(WIDE).state_dict())  # which was trained there a moment ago
        outputs = [model(*data()[1].inputs) for model in (small, grown)]
        assert torch.allclose(*outputs, atol=1e-5) == exact


def test_late_updates_are_merged_and_an_operator_is_let_go_where_targets_are_averaged() -> None:
    method = method_of(VARIANTS["then federated"])
    late = method.train(method.assign(method.initial_state(), 0, 0), data()[0])
    here = [method.train(method.assign(method.initial_state(), 1, p), data()[p]) for p in (1, 2)]
    fused = fuse_updates(method, method.initial_state(), [replace(late, share=0.5), *here])
    assert same(fused, fuse_updates(method, method.initial_state(), here))
    assert same(fuse_updates(method, fused, [replace(late, share=0.5)]), fused)
    state = method.initial_state()
    half = fuse_updates(method, state, [replace(late, share=0.5)])
    for name, tensor in half.items():
        assert torch.allclose(tensor, (state[name] + late.tensors[name]) / 2, atol=1e-6)


@pytest.mark.release
def test_the_costs_are_those_of_the_wire() -> None:
    target = sum(p.numel() for p in classifier(TARGET).parameters())
    for variant in ("dual-ligo", "net2net, federated"):
        method = method_of(VARIANTS[variant])
        costs = grow_costs(method, texts(8, 0))
        result = whole(variant)[-1]
        assert {(each.bytes_up, each.bytes_down) for each in result.participants} == {
            (costs.bytes_up, costs.bytes_down)
        }
        assert costs.target.parameters == target
        if method.plan is None:
            assert (costs.fewer_parameters, costs.fewer_bytes) == (0, 0)
        else:
            assert costs.trainable == sum(p.numel() for p in method.new_operator().parameters())
            assert costs.flops_per_example > costs.target.flops_per_example


def test_the_operator_learns() -> None:
    settings = replace(LIGO, training=replace(ROUND, learning_rate=1e-2, local_epochs=4))
    results = rounds(method_of(settings), 4)
    losses = [sum(each.loss for each in result.participants) for result in results]
    assert losses[-1] < 0.9 * losses[0]
    assert not tensors_of(results[-1].state, "intermediate")
