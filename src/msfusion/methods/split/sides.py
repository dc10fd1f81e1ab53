"""Split learning with compressed traffic (Zhou et al., ECAI 2024, arXiv 2408.13787; SplitFed, Thapa et al., AAAI 2022).

A participant runs the first layers on its own data, a server the rest. For each mini-batch:

    participant:  z = first layers(x);  send encode(z), and the targets
    server:       z' = decode(...);  loss = cross-entropy(rest(z'), targets);  a step;  send encode(d loss / d z')
    participant:  g = decode(...);  back through the first layers with g in place of d loss / d z;  a step

The gradient goes past the codec as if it were the identity, as in the paper; or, with the `derivative` "true",
the server takes it back through the decoding, and only the gradients of the values that survived the encoding
travel. What crosses besides activations (masks, sizes) is sent as it is. Neither side executes what the other
sends: messages are tensors, by a codec or as safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import CodecError, MsfusionError, TrainingError
from msfusion.federated.compression import CODEC_ERROR
from msfusion.federated.training import TrainingSettings, build_optimizer
from msfusion.methods.split.wire import Message, Wire
from msfusion.objectives import make_dense, mean_cross_entropy, scores
from msfusion.seeds import OfSide, seed_of
from msfusion.width.cut import ClientPart, Cut, ServerPart
from msfusion.width.groups import State


@dataclass(frozen=True)
class Request:
    """A participant's mini-batch as the server gets it.

    `draw` seeds what is drawn for it (dropout), so that the result does not depend on where or when it is run.
    """

    message: Message
    targets: Int[Tensor, "..."]
    draw: int = 0


def draw_of(seed: int, round_index: int, participant: int, step: int) -> int:
    """The draw of a participant's mini-batch: both sides know it without sending it. Steps count from 0."""
    return seed_of(seed, round_index, participant, step)


class Participant:
    """The first layers in training, on a participant's machine."""

    def __init__(
        self,
        part: ClientPart,
        optimizer: torch.optim.Optimizer | None,
        wire: Wire,
        clip_norm: float | None = None,
    ) -> None:
        self.part, self.optimizer, self.wire, self.clip_norm = part, optimizer, wire, clip_norm
        self._sent: tuple[Tensor, ...] = ()
        self._message: Message = []
        self._changed = self._whole = 0.0

    def send(self, batch: Batch, draw: int = 0) -> Message:
        """Run the first layers on a mini-batch."""
        with _drawing(draw, OfSide.PARTICIPANT):
            self._sent = batch.call(self.part)
        self._message = self.wire.up(self._sent)
        changed, whole = self.wire.changed(self._sent, self._message)
        self._changed, self._whole = self._changed + changed, self._whole + whole
        return self._message

    @property
    def told(self) -> dict[str, float]:
        """How far its messages were from its activations: the ratio of their 2-norms; nothing without a codec."""
        return {CODEC_ERROR: math.sqrt(self._changed / self._whole)} if self._whole else {}

    @property
    def plain_bytes(self) -> int:
        """Bytes of the activations that were sent last, without a codec."""
        pairs = zip(self.wire.crossing, self._sent, strict=True)
        return sum(tensor.nbytes for each, tensor in pairs if each.gradient)

    def receive(self, message: Message) -> None:
        """Finish the step with the gradients that came back. Raises CodecError."""
        pairs = self.wire.gradients_for(self._sent, self._message, message)
        self._sent, self._message = (), []
        if self.optimizer is None:  # nothing in the first layers trains
            return
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
        make_dense(self.part.parameters())
        if self.clip_norm is not None:  # one side's gradients; the other side's are not known here
            nn.utils.clip_grad_norm_(self.part.parameters(), self.clip_norm)
        self.optimizer.step()


class Server:
    """The rest of the model in training, for any number of participants."""

    def __init__(
        self,
        part: ServerPart,
        optimizer: torch.optim.Optimizer,
        wire: Wire,
        clip_norm: float | None = None,
    ) -> None:
        self.part, self.optimizer, self.wire, self.clip_norm = part, optimizer, wire, clip_norm

    def step(self, requests: Sequence[Request]) -> list[tuple[Message, float]]:
        """One step on one or several mini-batches: for each what goes back to its participant, and its loss.

        Of several, the loss is the mean over all their examples. Raises CodecError for a bad message and
        TrainingError for a loss or gradients that are not finite; then nothing has changed.
        """
        before = self._buffers()
        try:
            forwards = [self._forward(each, self.wire.received(each.message), before) for each in requests]
        except BaseException:
            self._put_back(before)
            raise
        return self._update(forwards)

    def step_on_good(self, requests: Sequence[Request]) -> list[tuple[Message, float] | MsfusionError]:
        """One step on those mini-batches that are good; for each the answer, or why it is no good.

        Raises what `step` does where mini-batches that are good by themselves are no good together: it is nobody's
        fault.
        """
        found: dict[int, tuple[Message, float] | MsfusionError] = {}
        left = dict(enumerate(requests))
        while left:
            try:
                found |= zip(left, self.step([*left.values()]), strict=True)
                break
            except MsfusionError as error:
                faults = {each: self.fault_of(request) for each, request in left.items() if len(left) > 1}
                bad = {each: fault for each, fault in faults.items() if fault is not None}
                if len(left) == 1:
                    bad = dict.fromkeys(left, error)
                if not bad:
                    raise
            found |= bad
            left = {each: request for each, request in left.items() if each not in bad}
        return [found[each] for each in range(len(requests))]

    def _forward(self, request: Request, received: Sequence[Tensor], before: list[Tensor]) -> Forward:
        """The first half: the loss of a mini-batch whose message has been `received`."""
        try:
            with _drawing(request.draw, OfSide.SERVER):
                batch = Batch(tuple(received), request.targets)
                loss = mean_cross_entropy(*scores(self.part, batch))
        except MsfusionError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:  # what crosses may be indices, and not fit
            reason = str(error).strip().partition("\n")[0][:200]
            raise CodecError(f"the rest of the model cannot go on with this mini-batch: {reason}") from error
        if not math.isfinite(float(loss.detach())):
            raise TrainingError("the loss on the server is not finite: lower the learning rate")
        self._check_buffers(before, len(request.targets))
        return Forward(request.message, received, loss, len(request.targets), before)

    def _update(self, forwards: Sequence[Forward]) -> list[tuple[Message, float]]:
        """The second half of a step: gradient descent on mini-batches that have been through `_forward`.

        Raises as `step` does; then nothing has changed since the first of them.
        """
        self.optimizer.zero_grad(set_to_none=True)
        everyone = sum(each.examples for each in forwards)
        torch.stack([each.loss * (each.examples / everyone) for each in forwards]).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
        make_dense(self.part.parameters())
        try:
            answers = [
                (self.wire.down(each.received, each.message), float(each.loss.detach())) for each in forwards
            ]
            norm = self._norm_of_gradients()
        except MsfusionError:
            self._put_back(forwards[0].before)
            raise
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.part.parameters(), self.clip_norm, norm)
        self.optimizer.step()
        return answers

    def fault_of(self, request: Request) -> MsfusionError | None:
        """What is wrong with one mini-batch, if a step on it alone would fail; nothing changes."""
        before = self._buffers()
        try:
            forward = self._forward(request, self.wire.received(request.message), before)
            self.optimizer.zero_grad(set_to_none=True)
            forward.loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            self.wire.down(forward.received, request.message)
            self._norm_of_gradients()
        except MsfusionError as error:
            return error
        finally:
            self._put_back(before)
        return None

    def _norm_of_gradients(self) -> Tensor:
        gradients = [each.grad for each in self.part.parameters() if each.grad is not None]
        norm: Tensor = nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            raise TrainingError("the gradients on the server are not finite: lower the learning rate")
        return norm

    def _buffers(self) -> list[Tensor]:
        """Copies of what a forward pass may change: running statistics."""
        return [buffer.clone() for buffer in self.part.buffers()]

    def _check_buffers(self, before: Sequence[Tensor], examples: int) -> None:
        """TrainingError where a forward pass has spoilt running statistics, which a mini-batch of one does."""
        for buffer, earlier in zip(self.part.buffers(), before, strict=True):
            if not bool(torch.isfinite(buffer).all()) and bool(torch.isfinite(earlier).all()):
                raise TrainingError(
                    "a mini-batch of a single example has no variance that BatchNorm could divide by: give its "
                    "participant a second example"
                    if examples == 1
                    else "the running statistics on the server are not finite: lower the learning rate"
                )

    def _put_back(self, buffers: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for buffer, before in zip(self.part.buffers(), buffers, strict=True):
                buffer.copy_(before)


def server_of(
    part: ServerPart, state: State, wire: Wire, training: TrainingSettings, round_index: int
) -> Server:
    """The server's side at the beginning of a round; the part gets what it has of the whole model's state."""
    part.load_state_dict(part_of(state, part))
    part.train()
    return Server(part, build_optimizer(part, training, round_index), wire, training.clip_norm)


def participant_of(
    parts: Cut, layers: State, wire: Wire, training: TrainingSettings, round_index: int
) -> Participant:
    """A participant's side at the beginning of a round, with first layers of its own."""
    part = parts.copy_of_client()
    part.load_state_dict(dict(layers))
    part.train()
    return Participant(part, client_optimizer(part, training, round_index), wire, training.clip_norm)


def client_optimizer(
    part: nn.Module, training: TrainingSettings, round_index: int
) -> torch.optim.Optimizer | None:
    """A participant's fresh optimiser for a round; None where nothing in the first layers trains."""
    trains = any(parameter.requires_grad for parameter in part.parameters())
    return build_optimizer(part, training, round_index) if trains else None


def part_of(state: State, part: nn.Module) -> dict[str, Tensor]:
    """What a part has of the whole model's state."""
    return {name: state[name] for name in part.state_dict()}


@dataclass(frozen=True)
class Forward:
    """A mini-batch that has been through the server part: what came of it, and the buffers before it."""

    message: Message
    received: Sequence[Tensor]
    loss: Tensor
    examples: int
    before: list[Tensor]


@contextmanager
def _drawing(draw: int, side: OfSide) -> Iterator[None]:
    """Dropout is drawn from a seed of this mini-batch and side; the global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(draw, side))
        yield


def averaged(states: Sequence[tuple[State, float]]) -> dict[str, Tensor]:
    """The mean of several client parts, each with its weight; integers (counters) are the first one's."""
    total = sum(weight for _, weight in states)
    first = states[0][0]
    mean = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            mean[name] = tensor.clone()
            continue
        terms = torch.stack([state[name].double() * (weight / total) for state, weight in states])
        mean[name] = terms.sum(0).to(tensor.dtype)
    return mean
