"""Who carries out the rounds where every rank carries participants and has a part of the state.

A round, for as many participants at a time as there are ranks:

    each rank        its rows of every participant's task            to the rank that carries the participant
    that rank        puts them together, has it train, judges the update as a whole
    that rank        to each rank the rows of the update that it owns, and to all a few numbers

A rank so never has more than its shard and one participant's task. Participant p is carried by rank p mod N: what it
keeps for itself stays there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from msfusion import errors
from msfusion.batch import Batch
from msfusion.engines.sharded.keeping import receipt
from msfusion.engines.sharded.on_shard import OnShard
from msfusion.engines.sharded.parcels import (
    collected,
    dtype_named,
    forms_at,
    forms_of,
    from_rows,
    joined,
    parted,
    size_of,
)
from msfusion.engines.sharded.ranks import Ranks
from msfusion.errors import ConfigError, MsfusionError, TrainingError
from msfusion.federated.engine import Answer, Ask, Engine, answer_to
from msfusion.federated.method import Kind, Method, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.federated.screening import verdict_of
from msfusion.federated.sharding import Form, Places, Read, Shard, Sharding
from msfusion.federated.verdict import Norm, Verdict
from msfusion.federated.work import CPU, perform
from msfusion.width.groups import State


class Sharded(Engine):
    """The engine on this rank; its rounds must be run on all ranks, with the method `OnShard` of each."""

    def __init__(self, ranks: Ranks, sharding: Sharding, shard: Shard, device: torch.device = CPU) -> None:
        self._ranks, self._shard, self._device = ranks, shard, device
        self._carrier, self._measure = sharding.carrier, sharding.measure
        self._data: Sequence[Batch] = ()

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        """Keep what the participants have."""
        self._data = data

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds on all ranks."""
        return self._ranks.everywhere(holds)

    def payload(self, task: Task) -> int:
        """The bytes of all tensors of a task, of which a part is here."""
        return self._shard.payload(task)

    def carrier_of(self, participant: int) -> int:
        """The rank that carries a participant."""
        return participant % self._ranks.count

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """One participant of each rank at a time."""
        assert isinstance(method, OnShard)
        self._method = method
        queues: list[deque[Ask]] = [deque() for _ in range(self._ranks.count)]
        for ask in asks:
            if len(ask.who) != 1:
                raise ConfigError("run.engine = 'sharded' has each participant train by itself")
            queues[self.carrier_of(ask.who[0])].append(ask)
        while any(queues):
            at_work = {rank: queue.popleft() for rank, queue in enumerate(queues) if queue}
            yield from self._side_by_side(at_work)

    def _side_by_side(self, asks: Mapping[int, Ask]) -> Iterator[Answer]:
        """What participants answer, each carried by another rank."""
        kind = next(iter(asks.values())).kind
        parts: dict[int, _Part] = {}
        own: Task | None = None
        outgoing: dict[int, Tensor] = {}
        for rank, ask in asks.items():
            (task,) = ask.tasks()
            if kind == "measure" and self._measure is not None:
                parts[rank] = _Part(task, {}, {})
            else:
                parts[rank] = self._part(task)
                if rank != self._ranks.rank:
                    outgoing[rank] = joined({name: task.tensors[name] for name in parts[rank].places})
            if rank == self._ranks.rank:
                own = task
        whole = own
        if kind != "measure" or self._measure is None:
            whole = self._put_together(own, parts, outgoing)
        answer = self._answer(kind, whole)
        yield from self._handed_back(kind, parts, whole, answer)

    def _part(self, task: Task) -> _Part:
        """What is known of a task of which this rank has a part; its tensors are let go of."""
        places = self._shard.places([*task.tensors], task.round_index, task.participant)
        return _Part(replace(task, tensors={}, memory={}), places, forms_of(task.tensors))

    def _put_together(
        self, own: Task | None, parts: Mapping[int, _Part], outgoing: dict[int, Tensor]
    ) -> Task | None:
        """The whole task of this rank's participant, from everybody's parts."""
        others = [rank for rank in range(self._ranks.count) if rank != self._ranks.rank]
        part = parts.get(self._ranks.rank)
        forms = {} if part is None else {rank: forms_at(rank, part.places, part.forms) for rank in others}
        received = self._ranks.exchange(outgoing, {rank: size_of(each) for rank, each in forms.items()})
        outgoing.clear()
        if own is None or part is None:
            return None
        return replace(own, tensors=from_rows(received, part.places, own.tensors, self._ranks.rank))

    def _answer(self, kind: Kind, task: Task | None) -> Answer | None:
        """What this rank's participant makes of its task, judged as a whole; None without one."""
        if task is None:
            if kind == "measure" and self._measure is not None:
                self._measure(self._read_everywhere(), None)
            return None
        method: Method = self._carrier
        if kind == "measure" and self._measure is not None:
            method = _Measuring(self._carrier, self._measure, self._read_everywhere())
        (made,), seconds = perform(method, kind, [task], self._data, self._device)
        answer = answer_to(task, made, seconds)
        if kind != "train" or answer.failure is not None:
            return answer
        declared, count = self._carrier.outbound(kind, task), len(self._data[task.participant])
        unit = self._carrier.scoring.unit
        return replace(answer, verdict=verdict_of(answer.update, task.tensors, declared, count, unit))

    def _read_everywhere(self) -> Read:
        """Reads whole tensors of the state on all ranks at once."""
        return lambda names: collected(
            self._ranks, self._shard, self._method.measured, names, everywhere=True
        )

    def _handed_back(
        self, kind: Kind, parts: Mapping[int, _Part], task: Task | None, answer: Answer | None
    ) -> Iterator[Answer]:
        """Everybody's answers, each with the rows that are to be here; of a measurement with everything."""
        me, count = self._ranks.rank, self._ranks.count
        headers = self._ranks.tell(None if answer is None else _header(kind, answer))
        outgoing: dict[int, Tensor] = {}
        if answer is not None:
            tensors = answer.update.tensors
            for rank in range(count):
                if rank != me:
                    outgoing[rank] = joined(_due(kind, parts[me], tensors, rank))
        incoming = {rank: size_of(_forms(headers[rank], parts[rank], kind)) for rank in parts if rank != me}
        received = self._ranks.exchange(outgoing, incoming)
        for rank, part in parts.items():
            header = headers[rank]
            if rank == me:
                assert answer is not None
                own = _due(kind, part, answer.update.tensors, me)
                yield replace(answer, update=replace(answer.update, tensors=own))
            else:
                tensors = parted(received.pop(rank), _forms(header, part, kind))
                yield _answer_of(part.task, header, tensors)


@dataclass(frozen=True)
class _Part:
    """What this rank knows of a participant's task: whose it is, which rows each rank has, the forms of those here."""

    task: Task
    places: Mapping[str, Places]
    forms: Mapping[str, Form]


def _due(kind: Kind, part: _Part, tensors: State, rank: int) -> dict[str, Tensor]:
    """What a rank is to have of an update: its rows; and all of what is not divided, or of a measurement."""
    places = part.places if kind == "train" else {}
    return {
        name: places[name].take(tensor, rank) if name in places else tensor
        for name, tensor in tensors.items()
    }


class _Measuring(Method):
    """A method whose measurements read the whole model part by part."""

    def __init__(self, carrier: Method, measure: Any, read: Read) -> None:
        self._carrier, self._measure, self._read, self.name = carrier, measure, read, carrier.name

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        raise NotImplementedError

    def train(self, task: Task, data: Batch) -> Update:
        raise NotImplementedError

    def fuse(self, state: State, answered: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        return self._carrier.outbound(kind, task)

    def measure(self, task: Task, data: Batch) -> Update:
        update: Update = self._measure(self._read, (task, data))
        return update


def _header(kind: Kind, answer: Answer) -> dict[str, Any]:
    """What everybody is told of an answer, beside the rows that are theirs."""
    update, verdict = answer.update, answer.verdict
    header: dict[str, Any] = {
        "examples": update.examples,
        "loss": update.loss,
        "metadata": dict(update.metadata),
        "seconds": answer.seconds,
        "moved": [answer.bytes_down, answer.bytes_up],
        "keeps": bool(update.memory),
        "names": [*update.tensors],
    }
    if answer.failure is not None:
        header["failure"] = [type(answer.failure).__name__, str(answer.failure)]
    if verdict is not None:
        header["verdict"] = [verdict.norm.change, verdict.norm.sent, verdict.fault]
    if kind == "measure":
        header["forms"] = [[str(each.dtype), list(each.shape)] for each in update.tensors.values()]
    return header


def _forms(header: Mapping[str, Any], part: _Part, kind: Kind) -> dict[str, Form]:
    """The forms of what of an update comes here: rows as they were sent, of a measurement what the header says."""
    if kind == "measure":
        told = zip(header["names"], header["forms"], strict=True)
        return {name: Form(dtype_named(dtype), tuple(shape)) for name, (dtype, shape) in told}
    return {name: part.forms[name] for name in header["names"]}


def _answer_of(task: Task, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> Answer:
    """The answer of a participant that another rank carries."""
    keeps = receipt() if header["keeps"] else {}
    update = Update(
        task.participant,
        task.round_index,
        tensors,
        header["examples"],
        header["loss"],
        header["metadata"],
        keeps,
    )
    failure = _failure(*header["failure"]) if "failure" in header else None
    verdict = None
    if "verdict" in header:
        change, sent, fault = header["verdict"]
        verdict = Verdict(Norm(change, sent), fault)
    down, up = header["moved"]
    return Answer(update, header["seconds"], down, up, failure, verdict)


def _failure(kind: str, sentence: str) -> MsfusionError:
    """An error of ours that was raised on another rank."""
    found = getattr(errors, kind, None)
    known = isinstance(found, type) and issubclass(found, MsfusionError)
    return found(sentence) if known else TrainingError(sentence)  # type: ignore[misc]
