"""Split learning as a method: the bits of the readable loop, whoever carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from loopback import Loopback
from splitting import SETTINGS, TRAINING, Job, digits, drawing_network, same

from msfusion.batch import Batch
from msfusion.codecs import Identity, TopK
from msfusion.engines.processes import Processes
from msfusion.errors import CodecError, ConfigError, MsfusionError, TrainingError, UpdateError
from msfusion.federated.conversation import Request
from msfusion.federated.engine import Answer, Ask, Engine, InProcess
from msfusion.federated.method import Method, Released
from msfusion.federated.participation import RoundSettings
from msfusion.federated.screening import Screening
from msfusion.methods.split.method import SplitSettings
from msfusion.methods.split.rounds import SplitRound

WAYS = {
    "each": SETTINGS,
    "joined": replace(SETTINGS, server_step="joined"),
    "relayed": replace(SETTINGS, clients="relayed"),
    "true derivative": SplitSettings("layers.3", TopK(0.1), Identity(), derivative="true"),
}
LAST = replace(digits(12, 300), inputs=(digits(12, 300).inputs[0] * torch.nan,))
"""The examples of a participant that cannot train."""


@cache
def job_and_loop(way: str, draws: bool = False) -> tuple[Job, list[SplitRound]]:
    """A job and what the loop makes of it, which several engines are compared with."""
    job = Job(settings=WAYS[way])
    if draws:
        training = replace(TRAINING, local_epochs=2, clip_norm=1.0)
        job = replace(job, training=training, whole=drawing_network())
    return job, job.reference()


@pytest.mark.one_in_ci
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "engine", [lambda: None, lambda: Processes(2), Loopback], ids=["one process", "two", "network"]
)
def test_the_bits_of_the_loop(way: str, engine: Callable[[], Engine | None]) -> None:
    job, loop = job_and_loop(way)
    same(loop, job.run(engine()))


@pytest.mark.one_in_ci
@pytest.mark.parametrize("way", ["each", "joined", "relayed"])
@pytest.mark.parametrize("workers", [1, 2])
def test_statistics_and_dropout_are_the_same(way: str, workers: int) -> None:
    job, loop = job_and_loop(way, draws=True)
    same(loop, job.run(None if workers == 1 else Processes(workers)))


@pytest.mark.parametrize("way", ["each", "joined", "relayed"])
def test_whoever_cannot_train_is_left_out_as_in_the_loop(way: str) -> None:
    job = Job(data=[digits(20), LAST, digits(17, 200)], settings=WAYS[way])
    ours, theirs = job.reference(), job.run()
    same(ours, theirs)
    assert [[each.participant for each in one.left_out] for one in theirs] == [[1], [1]]
    with pytest.raises(TrainingError, match="participant 1"):
        replace(job, screening=Screening("stop")).run()


class Stripping(InProcess):
    """Brings back, of one participant, an update that has only its first tensors."""

    def __init__(self, participant: int, kept: int) -> None:
        super().__init__()
        self._participant, self._kept = participant, kept

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        for each in super().run(method, asks):
            some = dict(list(each.update.tensors.items())[: self._kept])
            stripped = replace(each.update, tensors=some)
            mine = each.update.participant == self._participant
            yield replace(each, update=Released(stripped)) if mine else each


@pytest.mark.parametrize("way", ["each", "joined", "relayed"])
@pytest.mark.parametrize("kept", [0, 1])
def test_an_update_that_lacks_layers_is_left_out(way: str, kept: int) -> None:
    found = Job(settings=WAYS[way]).run(Stripping(1, kept))
    assert [[each.participant for each in one.left_out] for one in found] == [[1], [1]]
    assert "its update lacks" in found[0].left_out[0].reason
    with pytest.raises(UpdateError, match="participant 1: its update lacks"):
        Job(settings=WAYS[way], screening=Screening("stop")).run(Stripping(1, kept))


@pytest.mark.parametrize("way", ["each", "relayed"])
def test_a_run_that_goes_on_ends_with_the_same_bits(way: str) -> None:
    job = Job(settings=WAYS[way], rounds=RoundSettings(3))
    whole = job.run()
    same(whole[2:], job.run(state=whole[1].state, first_round=2))


def mini_batch(job: Job, batch: Batch) -> Request:
    """What an honest participant asks with first."""
    method = job.method()
    training = method.train(method.assign(method.initial_state(), 0, 0), batch)
    return next(training)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda asked: replace(asked, tensors={}), "without targets"),
        (lambda asked: replace(asked, pieces=()), "tensors came"),
        (lambda asked: replace(asked, pieces=(b"garbage",)), ""),
        (lambda asked: replace(asked, tensors={"targets": asked.tensors["targets"] + 9}), "none of the 10 classes"),
        (lambda asked: replace(asked, tensors={"targets": asked.tensors["targets"][:3]}), "elements allowed"),
        (lambda asked: replace(asked, tensors={"targets": asked.tensors["targets"][:0]}), "came for a mini-batch"),
        (lambda asked: replace(asked, tensors={"targets": asked.tensors["targets"].repeat(9)}), "mini-batch"),
        (lambda asked: replace(asked, tensors={"targets": torch.tensor(3)}), "mini-batch"),
        (lambda asked: replace(asked, pieces=(Identity().encode(torch.zeros(8, 8, 2, 8)),)), "came where"),
        (lambda asked: replace(asked, pieces=(Identity().encode(torch.full((8, 8, 4, 4), 1e30)),)), "as large as"),
    ],
    ids=[
        "no targets", "no pieces", "garbage", "class", "fewer targets", "none", "too many", "one number", "shape",
        "absurd",
    ],
)  # fmt: skip
def test_bad_mini_batches_change_nothing(change: Callable[[Request], Request], expected: str) -> None:
    job = Job(settings=replace(SETTINGS, activations=Identity(), gradients=Identity()))
    method = job.method()
    server = method.conversation(method.initial_state(), 0)
    before = {name: tensor.clone() for name, tensor in server.state().items()}
    good = mini_batch(job, job.data[0])
    (answer,) = server.answer([(0, change(good))])
    assert isinstance(answer, CodecError)
    assert expected in str(answer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in server.state().items())
    assert server.figures()["activations_bytes"] == 0
    (answer,) = server.answer([(0, good)])
    assert not isinstance(answer, MsfusionError)


def test_a_request_is_no_longer_than_was_said() -> None:
    for settings in WAYS.values():
        job = Job(settings=settings)
        method = job.method()
        asked = mini_batch(job, job.data[0])
        most = method.outbound_request(method.assign(method.initial_state(), 0, 0)).most_bytes
        assert most is not None
        assert 0 < asked.nbytes <= most


@pytest.mark.parametrize("training", [replace(TRAINING, precision="bfloat16")], ids=["precision"])
def test_what_it_cannot_do_is_refused(training: object) -> None:
    with pytest.raises(ConfigError, match="float32"):
        Job(training=training).method()  # type: ignore[arg-type]
