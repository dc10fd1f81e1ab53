"""One bad participant in split learning: the others train as without it, in one process and over a network."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from streaming import NOTHING, Hand, Job, Running, Served, digits, first_step, hello, network, same, served
from torch import Tensor

from msfusion.batch import Batch
from msfusion.codecs import Identity
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.packing import check_agreement, pack
from msfusion.engines.stream.client import Connecting
from msfusion.engines.stream.contract import Contract
from msfusion.engines.stream.frames import Step
from msfusion.engines.stream.terms import Terms
from msfusion.errors import DataError, StreamError, TrainingError
from msfusion.federated.screening import Screening
from msfusion.methods.split.results import SplitRound
from msfusion.methods.split.rounds import SplitSettings, run_split_rounds
from msfusion.methods.split.turnout import Turnout
from msfusion.mini_batches import epoch_sizes

LISTENING = Listening("127.0.0.1:0", NOTHING)
PLAIN = SplitSettings("layers.3", Identity(), Identity())
LAST = replace(digits(12, 300), inputs=(digits(12, 300).inputs[0] * torch.nan,))
"""The examples of a participant that cannot train."""


def state_of(rounds: list[SplitRound]) -> dict[str, Tensor]:
    return rounds[-1].state


def run(job: Job, screening: Screening) -> list[SplitRound]:
    return list(
        run_split_rounds(
            job.parts(),
            network()[0],
            job.data,
            job.settings,
            job.training,
            job.rounds,
            state=job.state,
            screening=screening,
        )
    )


@pytest.mark.parametrize("way", [{}, {"server_step": "joined"}, {"clients": "relayed"}], ids=str)
def test_the_others_train_as_if_it_were_not_there(way: dict[str, str]) -> None:
    good = Job(settings=replace(PLAIN, **way))
    bad = replace(good, data=[*good.data, LAST])
    expected, found = good.in_process(), run(bad, Screening())
    assert [[each.participant for each in one.left_out] for one in found] == [[3], [3]]
    assert [each.participant for each in found[-1].participants] == [0, 1, 2]
    assert all(torch.equal(tensor, state_of(found)[name]) for name, tensor in state_of(expected).items())
    with pytest.raises(TrainingError, match="participant 3"):
        run(bad, Screening("stop"))


def test_absurd_activations_are_their_participants() -> None:
    job = Job(settings=PLAIN)
    pixels = digits(12, 300)
    huge = Batch((pixels.inputs[0] * 1e30,), pixels.targets)
    found = run(replace(job, data=[huge, *job.data]), Screening())
    assert [[each.participant for each in one.left_out] for one in found] == [[0], [0]]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state_of(found).values())


def test_more_examples_than_allowed_are_refused() -> None:
    with pytest.raises(DataError, match="participant 0 has 20 examples"):
        run(Job(), Screening(max_examples=19))


def test_first_layers_that_moved_too_far_do_not_count() -> None:
    """Changes of 1, 2 and 100 from ones: the mean over 1 and 3 examples of 2 and 3 is 2.75."""
    before = {"w": torch.ones(2)}
    finished = [(0, {"w": torch.full((2,), 2.0)}, 1), (1, {"w": torch.full((2,), 3.0)}, 3)]
    far = (2, {"w": torch.full((2,), 101.0)}, 10)
    with closing(Turnout(Screening(), 3, 0)) as turnout:
        assert turnout.averaged([*finished, far], before)["w"].tolist() == [2.75, 2.75]
        assert list(turnout.reasons) == [2]
    with closing(Turnout(Screening(max_update_norm=0.0), 3, 0)) as turnout:
        assert turnout.averaged([*finished, far], before)["w"][0] == pytest.approx((2 + 9 + 1010) / 14)


def bad_step(job: Job, hand: Hand, participant: int) -> bytes:
    begun = hand.begin(job, participant)
    good = first_step(job, begun)
    codec = job.settings.activations
    return pack(Step(0, 0, [codec.encode(torch.full((8, 8, 4, 4), 1e30))], good.targets))


def test_over_a_network_the_round_goes_on_without_it() -> None:
    """Participant 2 sends what it should not, and does not come back; the others end with the numbers of two."""
    job = Job(settings=PLAIN)
    where = {"patience": 20.0, "deadline": 4.0, "farewell": 0.2}
    server = Served(job, replace(LISTENING, **where))
    others = [Running(job.join, each, Connecting(server.address, NOTHING, patience=20.0)) for each in (0, 1)]
    with Hand(server) as hand:
        assert hand.refused(bad_step(job, hand, 2))[0] == "INVALID_ARGUMENT"
    assert [each.wait() for each in others] == [2, 2]
    server.thread.wait()
    assert [[each.participant for each in one.left_out] for one in server.rounds] == [[2], [2]]
    assert "as large as 1e+30" in server.rounds[0].left_out[0].reason
    expected = replace(job, data=job.data[:2]).in_process()
    same(expected, [replace(one, traffic=one.traffic[:2]) for one in server.rounds])


def test_a_count_that_is_not_to_be_believed_is_refused() -> None:
    terms = Terms(2, 1, 8, 1, None, 1000, 1000, {}, max_examples=100)
    terms.check_examples(0, 100)
    for count in (101, 10**6, 2**62):
        with pytest.raises(StreamError, match=rf"participant 1 says that it has {count} examples"):
            terms.check_examples(1, count)
    with pytest.raises(StreamError, match="needs examples"):
        terms.check_examples(0, 0)


def test_labels_that_mean_something_else_are_refused() -> None:
    job = Job()

    def contract(names: str) -> Contract:
        return Contract(
            job.parts(), job.settings, job.training, job.rounds, 3, meaning={"class names": names}
        )

    ours, same_names, others = contract("a"), contract("a"), contract("b")
    check_agreement(ours.terms.agreement, same_names.terms.agreement)
    for theirs in (others.terms.agreement, job.contract().terms.agreement):
        with pytest.raises(StreamError, match="class names"):
            check_agreement(ours.terms.agreement, theirs)
    assert hello(job).agreement == job.contract().terms.agreement


def test_a_participant_says_what_it_waits_for() -> None:
    told: list[str] = []
    job = Job(data=[digits(20)])
    with served(job) as server:
        Running(job.join, 0, Connecting(server.address, NOTHING, on_event=told.append)).wait()
    assert server.address in told[0]
    assert "begins when all are there" in told[1]


@pytest.mark.parametrize(
    ("examples", "size", "sizes"),
    [(10, 4, (2, 2)), (9, 4, (2, 0)), (8, 4, (2, 0)), (1, 4, (0, 1)), (3, 1, (3, 0)), (0, 4, (0, 0))],
)
def test_the_mini_batches_of_an_epoch(examples: int, size: int, sizes: tuple[int, int]) -> None:
    assert epoch_sizes(examples, size) == sizes
