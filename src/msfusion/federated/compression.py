"""Small messages: tasks and updates by a codec, for any method and any engine.

A participant sends what it has changed, not what it has; and the server sends what is new since it sent last. What a
codec loses is not lost: it is sent later. With Q what a codec makes of a tensor, decoded again, theta the server's
state, h_p what participant p knows of it, and e_p what p has not been able to send yet, a round is

    h_p      <-  h_p + Q(theta - h_p)              down: both sides work it out from the same bytes
    theta_p  <-  train(h_p)                        on p's own data
    d_p      <-  Q(theta_p - h_p + e_p)            up
    e_p      <-  theta_p - h_p + e_p - d_p         kept by p
    theta    <-  fuse(theta, all (h_p, h_p + d_p))

e is error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019), and h is error feedback for what
goes down (Tang et al., ICML 2019; Richtarik et al., NeurIPS 2021): what Q left out is in the next difference.
Both are kept for each entry of the state, so where windows move they wait until the participant holds the entry again.
At first h is what everybody knows without being sent anything, the state before round 0. Without a codec for what goes
down, h_p is theta.

All entries of a message go through the codec as one vector, each tensor divided by its root mean square, so that one
setting fits all. Whole numbers and running statistics (a variance must stay positive) go as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from msfusion.codecs import Codec, CodecError, Identity
from msfusion.costs import Costs
from msfusion.federated.privacy import OpenForm, Outbound
from msfusion.federated.sharding import Form, stretched
from msfusion.federated.states import labelled, last_names_of_buffers, names_of_buffers, part, payload_bytes
from msfusion.width.groups import State
from msfusion.width.slices import Cut
from msfusion.width.tensors import state_tensors

if TYPE_CHECKING:
    from msfusion.federated.method import Kind, Method, Task, Update

MESSAGE = ".message"
"""The name of the tensor that has the bytes of all tensors that went through a codec. These stand beside it without
entries, as `.message.<name>` of shape (0, *shape): a message of any kind tells names, types and shapes besides."""

KNOWN, OWED = ".known", ".owed"
"""What the names in a participant's memory begin with: what it knows of the state, and what it has not sent yet."""

CODEC_ERROR = "codec_error"
"""What a participant tells of its message: how far what was sent is from what there was to send, as the ratio of their
2-norms. 0 is as it was, 1 nothing sent. What is missing is sent later."""

SCALE = torch.bfloat16
"""Each tensor's root mean square travels as one of these, of two bytes."""


@dataclass(frozen=True)
class Entries:
    """Which entries of the state a tensor of a task has: of the tensor of that name all, or those of a cut."""

    name: str
    cut: Cut | None = None

    def take(self, state: State) -> Tensor:
        """Them, out of a state."""
        whole = state[self.name]
        return whole if self.cut is None or self.cut.whole else self.cut.take(whole)

    def put(self, state: State, tensor: Tensor) -> Tensor:
        """The state's tensor with these entries, as a new one."""
        if self.cut is None or self.cut.whole:
            return tensor
        changed = state[self.name].clone()
        self.cut.put(changed, tensor)
        return changed


@dataclass(frozen=True, eq=False)
class Compression:
    """How the messages of a method become small: a codec for what goes up, one for what comes down, or one of them."""

    method: Method
    up: Codec | None = None
    down: Codec | None = None

    def saved(self, tensors: State) -> tuple[int, int]:
        """About how many bytes less some tensors travel in, down and up. Of the tensors only types and shapes count."""
        coded = self._coded_of(tensors)
        return _saved(coded, self.down), _saved(coded, self.up)

    # In the server.

    def sent(self, task: Task) -> Task:
        """A task as it is sent to a participant; `task.memory` has what it knows."""
        if self.down is None:
            return task
        before = self._known_before(task)
        new = {name: _change(task.tensors[name], known) for name, known in before.items()}
        return replace(task, tensors=_with_message(task.tensors, new, self.down))

    def updated(self, task: Task, update: Update) -> Update:
        """An update as the method made it, from a task as the participant `received` it and what came back.

        Raises CodecError where that is no message for this task.
        """
        if self.up is None:
            return update
        coded = _shapes_of_coded(update.tensors)
        for name, form in coded.items():
            if name not in task.tensors or _form_of(task.tensors[name]) != form:
                raise CodecError(f"the update has a tensor {name!r} that does not answer what was sent")
        changes = _decoded(update.tensors, coded, self.up)
        return replace(update, tensors={**_plain(update.tensors), **_moved(task.tensors, changes)})

    def known(self, task: Task) -> dict[str, Tensor]:
        """What a participant knows once it has received a task, as entries of its memory; `task.memory` is the old."""
        if self.down is None:
            return {}
        known = self._known_of(task.memory)
        entries = self.method.entries(task)
        for name, tensor in self._coded_of(task.tensors).items():
            place = entries.get(name, Entries(name))
            if place.name in known:
                known[place.name] = place.put(known, tensor)
            elif place.cut is None or place.cut.whole:
                known[place.name] = tensor
        changed = {name: tensor for name, tensor in known.items() if tensor is not self._first.get(name)}
        return labelled(KNOWN, changed)

    # Where the participant is.

    def received(self, task: Task) -> Task:
        """The task that was sent, as far as it can be read from the bytes. Raises CodecError for a damaged message."""
        if self.down is None:
            return task
        coded = _shapes_of_coded(task.tensors)
        outline = self.outline(task)
        before = self._known_before(outline)
        if before.keys() != coded.keys():
            raise CodecError("the task has other tensors by a codec than the participant knows anything of")
        changes = _decoded(task.tensors, coded, self.down)
        tensors = {**outline.tensors, **_moved(before, changes)}
        return replace(task, tensors=tensors)

    def plain(self, task: Task) -> Task:
        """The task as the method knows it: without what the compression keeps."""
        return replace(task, memory=_others(task.memory))

    def coded(self, task: Task, update: Update) -> Update:
        """An update as it is sent, with what the participant keeps: of a task that it has `received`.

        Raises CodecError for changes that are not finite.
        """
        kept = {**(update.memory or _others(task.memory)), **self.known(task)}
        owed = part(task.memory, OWED)
        if self.up is None:
            return replace(update, memory={**kept, **labelled(OWED, owed)})
        entries = self.method.entries(task)
        changes: dict[str, Tensor] = {}
        for name in self._answering(task, update.tensors):
            place = entries.get(name, Entries(name))
            changes[name] = _change(update.tensors[name], task.tensors[name])
            if place.name in owed:
                changes[name] += place.take(owed)
        tensors = _with_message(update.tensors, changes, self.up)
        sent = _decoded(tensors, _shapes_of_coded(tensors), self.up)
        for name, change in changes.items():
            place = entries.get(name, Entries(name))
            if place.name not in owed:
                shape = change.shape if place.cut is None else place.cut.shape
                owed[place.name] = torch.zeros(shape)
            owed[place.name] = place.put(owed, change - sent[name])
        told = {**update.metadata, **_error(changes, sent)}
        return replace(update, tensors=tensors, metadata=told, memory={**kept, **labelled(OWED, owed)})

    # On both sides.

    def outline(self, task: Task) -> Task:
        """A task as the method knows it, in names, types and shapes: what went through the codec has no values."""
        coded = {name: stretched(form) for name, form in _shapes_of_coded(task.tensors).items()}
        return replace(task, tensors={**_plain(task.tensors), **coded})

    def outbound(self, task: Task, declared: Outbound) -> Outbound:
        """What may leave the participant instead of what the method declares. `task` may be an `outline`."""
        if self.up is None:
            return declared
        answers = {
            name: task.tensors[name]
            for name, form in declared.tensors.items()
            if name in task.tensors and form == (task.tensors[name].dtype, task.tensors[name].shape)
        }
        coded = self._coded_of(answers)
        empty: dict[str, OpenForm] = {
            f"{MESSAGE}.{name}": (tensor.dtype, (0, *tensor.shape)) for name, tensor in coded.items()
        }
        others = {name: form for name, form in declared.tensors.items() if name not in coded}
        entries = sum(tensor.numel() for tensor in coded.values())
        most = SCALE.itemsize * len(coded) + self.up.encoded_size((entries,), signed=True)
        tensors = {**others, **empty, MESSAGE: (torch.uint8, (None,))} if coded else others
        told = declared.metadata | self.metrics
        return replace(declared, tensors=tensors, metadata=told, most_bytes=most)

    @property
    def metrics(self) -> frozenset[str]:
        """What a participant tells of its messages, by name."""
        return frozenset() if self.up is None else frozenset([CODEC_ERROR])

    def _answering(self, task: Task, tensors: State) -> list[str]:
        """The tensors of an update that are told as changes of what was sent."""
        return [
            name
            for name, tensor in self._coded_of(tensors).items()
            if name in task.tensors and _form_of(task.tensors[name]) == _form_of(tensor)
        ]

    def _coded_of(self, tensors: State) -> dict[str, Tensor]:
        """The tensors that go through a codec."""
        return _coded(tensors, self._buffers)

    @cached_property
    def _buffers(self) -> frozenset[str]:
        return names_of_buffers(self.method)

    @cached_property
    def _first(self) -> State:
        """What everybody knows without being sent anything."""
        return self.method.known_at_first()

    def _known_of(self, memory: State) -> dict[str, Tensor]:
        return {**self._first, **part(memory, KNOWN)}

    def _known_before(self, task: Task) -> dict[str, Tensor]:
        """What a participant knows of the tensors of a task, by their names; not those of which it knows nothing."""
        known, entries = self._known_of(task.memory), self.method.entries(task)
        found: dict[str, Tensor] = {}
        for name, tensor in self._coded_of(task.tensors).items():
            place = entries.get(name, Entries(name))
            if place.name in known:
                taken = place.take(known)
                if taken.shape == tensor.shape and taken.dtype == tensor.dtype:
                    found[name] = taken
        return found


def compressed(method: Method, up: Codec | None, down: Codec | None) -> Method:
    """The method, whose messages go through these codecs from now on. The identity is no codec here."""
    up, down = _real(up), _real(down)
    if up is not None or down is not None:
        object.__setattr__(method, "_compression", Compression(method, up, down))  # a dataclass may be frozen
    return method


def compressed_costs(module: nn.Module, costs: Costs, up: Codec | None, down: Codec | None) -> Costs:
    """What a module costs whoever trains it, with messages as long as they will be through these codecs, roughly.

    How long a codec's message is depends on the values: here they are drawn from a normal distribution.
    """
    tensors = {id(tensor): (name, tensor) for name, tensor in state_tensors(module).items()}
    coded = _coded(dict(tensors.values()), last_names_of_buffers(module))
    return replace(
        costs,
        bytes_down=costs.bytes_down - _saved(coded, _real(down)),
        bytes_up=costs.bytes_up - _saved(coded, _real(up)),
    )


def _real(codec: Codec | None) -> Codec | None:
    return None if isinstance(codec, Identity) else codec


def _coded(tensors: State, buffers: Collection[str]) -> dict[str, Tensor]:
    """The tensors that go through a codec: none that is called as a buffer of the model is, such as a statistic."""
    return {
        name: tensor
        for name, tensor in sorted(tensors.items())
        if tensor.is_floating_point() and tensor.numel() and name.rpartition(".")[2] not in buffers
    }


def _saved(coded: State, codec: Codec | None) -> int:
    """About how many bytes less the tensors of a message are through a codec."""
    if codec is None or not coded:
        return 0
    entries = sum(each.numel() for each in coded.values())
    return payload_bytes(coded) - expected_bytes(entries, len(coded), codec)


def declared(method: Method, kind: Kind, task: Task) -> Outbound:
    """What may leave the participant that did a task (in an engine, on both sides); the task as it was sent."""
    small = method.compression
    if small is None or kind != "train":
        return method.outbound(kind, task)
    outline = small.outline(task)
    return small.outbound(outline, method.outbound(kind, outline))


def keeps_something(method: Method) -> bool:
    """Whether a participant may keep something for its next round."""
    return method.remembers or method.compression is not None


def _with_message(tensors: State, coded: State, codec: Codec) -> dict[str, Tensor]:
    """Some tensors as they are sent: those that go through a codec without entries, beside one message of all."""
    if not coded:
        return dict(tensors)
    empty = {f"{MESSAGE}.{name}": tensors[name].new_empty((0, *tensors[name].shape)) for name in coded}
    others = {name: tensor for name, tensor in tensors.items() if name not in coded}
    return {**others, **empty, MESSAGE: encode(coded, codec)}


def _plain(tensors: State) -> dict[str, Tensor]:
    """The tensors of a message that did not go through a codec."""
    return {name: tensor for name, tensor in tensors.items() if not _is_of_message(name)}


def _is_of_message(name: str) -> bool:
    return name == MESSAGE or name.startswith(f"{MESSAGE}.")


def _shapes_of_coded(tensors: State) -> dict[str, Form]:
    """The forms of the tensors that went through a codec. Raises CodecError where one is no form of any tensor."""
    empty = part(tensors, MESSAGE)
    if any(not (each.ndim and each.shape[0] == 0 and each.is_floating_point()) for each in empty.values()):
        raise CodecError("a message is damaged: it has a tensor among those of its codec that is not empty")
    return {name: Form(each.dtype, tuple(each.shape[1:])) for name, each in empty.items()}


def _form_of(tensor: Tensor) -> Form:
    return Form(tensor.dtype, tuple(tensor.shape))


def _decoded(tensors: State, coded: Mapping[str, Form], codec: Codec) -> dict[str, Tensor]:
    if not coded:
        return {}
    if MESSAGE not in tensors:
        raise CodecError("a message is damaged: it has no bytes for its tensors")
    return decode(tensors[MESSAGE], {name: form.shape for name, form in coded.items()}, codec)


def encode(tensors: State, codec: Codec) -> UInt8[Tensor, " bytes"]:
    """The message of some float32 tensors, in the order of their names.

    Raises CodecError for values that are not finite.
    """
    scales = torch.stack([_root_mean_square(tensor) for _, tensor in sorted(tensors.items())]).to(SCALE)
    divided = [
        tensor.reshape(-1) / scale if scale > 0 else torch.zeros(tensor.numel())
        for (_, tensor), scale in zip(sorted(tensors.items()), scales.to(torch.float32), strict=True)
    ]
    message = bytearray(scales.view(torch.uint8).numpy().tobytes() + codec.encode(torch.cat(divided)))
    return torch.frombuffer(message, dtype=torch.uint8)


def expected_bytes(entries: int, tensors: int, codec: Codec) -> int:
    """About how many bytes the message of so many normally distributed entries has, in so many tensors."""
    tried = min(entries, _TRIED)
    drawn = torch.randn(tried, generator=torch.Generator().manual_seed(0))
    return SCALE.itemsize * tensors + round(len(codec.encode(drawn)) * entries / tried)


_TRIED = 2**18


def decode(message: Tensor, shapes: Mapping[str, tuple[int, ...]], codec: Codec) -> dict[str, Tensor]:
    """The float32 tensors of a message, by name. Raises CodecError for what is no such message of these shapes.

    Nothing is allocated beyond what the shapes ask for.
    """
    names, sizes = sorted(shapes), [math.prod(shapes[name]) for name in sorted(shapes)]
    begin = SCALE.itemsize * len(names)
    if message.dtype != torch.uint8 or message.ndim != 1 or len(message) < begin:
        raise CodecError("a message is damaged: it is no vector of bytes, or too short")
    data = message.contiguous().numpy().tobytes()
    scales = torch.frombuffer(bytearray(data[:begin]), dtype=torch.uint8).view(SCALE).to(torch.float32)
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise CodecError("a message is damaged: it has an impossible scale")
    values = codec.decode(data[begin:], max_elements=sum(sizes))
    if values.dtype != torch.float32 or tuple(values.shape) != (sum(sizes),):
        raise CodecError(f"a message has {tuple(values.shape)} entries, where {sum(sizes)} are expected")
    split = zip(names, torch.split(values, sizes), scales, strict=True)
    return {name: (each * scale).view(shapes[name]) for name, each, scale in split}


def _error(changes: State, sent: State) -> dict[str, float]:
    """How far what was sent is from what there was to send; nothing where there was nothing."""

    def norm(tensors: Iterable[Tensor]) -> float:
        return math.sqrt(math.fsum(float(each.double().square().sum()) for each in tensors))

    whole = norm(changes.values())
    return {CODEC_ERROR: norm(changes[name] - sent[name] for name in changes) / whole} if whole else {}


def _root_mean_square(tensor: Tensor) -> Tensor:
    found = tensor.double().square().mean().sqrt()
    if not bool(found.isfinite()):
        raise CodecError("what is to be sent is not finite (NaN or infinite)")
    return found


def _moved(tensors: State, changes: State) -> dict[str, Tensor]:
    """The tensors that change, changed, in their own types."""
    return {name: tensors[name] + change.to(tensors[name].dtype) for name, change in changes.items()}


def _change(tensor: Tensor, before: Tensor) -> Tensor:
    """In float32, as codecs take it."""
    return (tensor - before).to(torch.float32)


def _others(memory: State) -> dict[str, Tensor]:
    """What a method keeps for itself."""
    ours = (f"{KNOWN}.", f"{OWED}.")
    return {name: tensor for name, tensor in memory.items() if not name.startswith(ours)}
