"""What the server is sent in secure sums: it says nothing but in the sum of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from building import build_method
from secured import PEOPLE, SECRET, TRAINING, run, same, secure, secured, some_data
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import MsfusionError
from msfusion.federated.conversation import Conversation, Request, Response
from msfusion.federated.engine import Answer, Ask, Engine, InProcess
from msfusion.federated.method import Method
from msfusion.federated.participation import RoundSettings
from msfusion.federated.protected import as_run
from msfusion.federated.results import RoundResult
from msfusion.federated.secure_sums import (
    SecureMethod,
    SecureSums,
)
from msfusion.width.groups import State
from msfusion.width.trace import trace


class Overhearing(Engine):
    """One process, in which is heard what participants say and are told: (participant, request, response)."""

    converses = True

    def __init__(self) -> None:
        self.engine, self.heard = InProcess(), list[tuple[int, Request, Any]]()

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        self.engine.open(data, test)

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        assert asks[0].conversation is not None
        between = Between(asks[0].conversation, self.heard)
        yield from self.engine.run(method, [replace(ask, conversation=between) for ask in asks])


class Between(Conversation):
    def __init__(self, conversation: Conversation, heard: list[tuple[int, Request, Any]]) -> None:
        self._conversation, self._heard = conversation, heard

    def answer(self, turn: Sequence[tuple[int, Request]]) -> Sequence[Response | MsfusionError]:
        told = self._conversation.answer(turn)
        self._heard += [(who, request, each) for (who, request), each in zip(turn, told, strict=True)]
        return told


def sent(heard: Sequence[tuple[int, Request, Any]], name: str) -> dict[int, Tensor]:
    return {who: request.tensors[name] for who, request, _ in heard if name in request.tensors}


@cache
def overheard() -> tuple[Overhearing, RoundResult]:
    """One round of a larger model, so that there are numbers enough to count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 3))
    made: Method = build_method(
        "fedavg", model, trace(model, (torch.randn(2, 6),)), (1.0,) * PEOPLE, TRAINING, rounds=1
    )
    engine = Overhearing()
    (result,) = run(secured(made, SecureSums()), engine, settings=RoundSettings(1))
    return engine, result


def test_an_update_itself_has_no_tensors_and_the_loss_of_all() -> None:
    _, result = overheard()
    assert len({each.loss for each in result.participants}) == 1
    for each in run(secure())[0].participants:
        assert each.examples == 13 + each.participant


def test_what_is_sent_looks_like_noise() -> None:
    """Each byte of a masked update is as frequent as the others: 255 degrees of freedom, 4.5 standard deviations."""
    engine, _ = overheard()
    for numbers in sent(engine.heard, "masked").values():
        counts = np.bincount(numbers.numpy().view(np.uint8), minlength=256)
        expected = counts.sum() / 256
        squares = float(((counts - expected) ** 2 / expected).sum())
        assert abs(squares - 255) < 4.5 * (2 * 255) ** 0.5


def test_what_is_sent_goes_with_nothing() -> None:
    """Neither with what another sends nor with the sum; entries of a true update do, by 0.5 and more."""
    engine, result = overheard()
    masked = [each.double() for each in sent(engine.heard, "masked").values()]
    first = result.state
    started = build_first()
    change = torch.cat([(first[name] - started[name]).flatten() for name in sorted(first)]).double()
    others = [*masked, change, change.abs()]
    bound = 4.5 / len(change) ** 0.5
    for number, each in enumerate(masked):
        for other in others[:number] + others[number + 1 :]:
            both = torch.stack([each[: len(change)], other[: len(change)]])
            assert abs(float(torch.corrcoef(both)[0, 1])) < bound


def build_first() -> State:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 3)
    ).state_dict()


def test_the_sum_of_a_part_of_them_is_still_masked() -> None:
    """Also with their own masks taken away, which the server knows in the end."""
    from itertools import combinations

    from msfusion.federated.masks import add_stream, add_wrapping, is_a_sum

    engine, _ = overheard()
    masked, own = sent(engine.heard, "masked"), sent(engine.heard, "own")
    assert len(masked) == len(own) == PEOPLE
    for count in range(1, PEOPLE + 1):
        for some in combinations(range(PEOPLE), count):
            total = torch.zeros_like(masked[0])
            for who in some:
                add_wrapping(total, masked[who])
                add_stream(total, own[who].numpy().tobytes(), subtract=True)
            assert is_a_sum(total) == (count == PEOPLE)
            if count < PEOPLE:
                counts = np.bincount(total.numpy().view(np.uint8), minlength=256)
                expected = counts.sum() / 256
                assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 6 * (2 * 255) ** 0.5


def test_nothing_else_is_sent() -> None:
    engine, _ = overheard()
    entries = 6 * 300 + 300 + 300 * 100 + 100 + 100 * 3 + 3
    by_participant: dict[int, list[tuple[str, ...]]] = {}
    for who, request, _ in engine.heard:
        by_participant.setdefault(who, []).append((*request.tensors, *request.metadata))
        assert not request.pieces
    assert [*by_participant.values()] == [
        [("key", "examples"), ("masked",), ("pairs",), ("own",)],
    ] * PEOPLE
    assert {len(each) for each in sent(engine.heard, "masked").values()} == {entries + 1}
    assert {len(each) for each in sent(engine.heard, "pairs").values()} == {0}


def test_masks_of_another_attempt_are_others() -> None:
    """The same participants with the same secrets, in the same round: a server that was started again."""
    begun = run(secure(), settings=RoundSettings(1))[-1]

    def attempt() -> tuple[dict[int, Tensor], State]:
        engine = Overhearing()
        (result,) = run(
            secure(),
            engine,
            settings=RoundSettings(2),
            state=begun.state,
            memories=begun.memories,
            first_round=1,
        )
        return sent(engine.heard, "masked"), result.state

    (first, state), (second, other) = attempt(), attempt()
    assert same(state, other)
    for who in first:
        assert int((first[who] == second[who]).sum()) == 0


def test_the_key_of_another_update_is_another() -> None:
    """So its masks are others too, even for a server that says again what it said: the same masks on two updates of a
    round would cancel in their difference. The same update, of a participant that was killed, has the same key.
    """
    method = as_run(secure())
    assert isinstance(method, SecureMethod)
    task = method.assign(method.initial_state(), 0, 1)
    task = replace(task, memory={SECRET: torch.arange(32, dtype=torch.uint8)})
    own = some_data()[1]
    assert isinstance(own.inputs, tuple)
    changed = own.inputs[0].clone()
    changed[3, 2] += 1e-3
    sent = {name: tensor + 1e-3 for name, tensor in task.tensors.items()}
    keys = []
    for each, data in (
        (task, own),
        (task, own),
        (task, replace(own, inputs=(changed,))),
        (replace(task, tensors=sent), own),
        (replace(task, round_index=1), own),
    ):
        keys.append(next(method.train(each, data)).tensors["key"].numpy().tobytes())
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
