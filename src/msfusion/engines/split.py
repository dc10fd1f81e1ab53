"""Split learning on one machine: the rounds of several participants and one server, all in this process.

What would cross a network is encoded, counted and decoded; nothing else is shared between the two sides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.codecs import PROFILES, Codec
from msfusion.errors import ConfigError, DataError, TrainingError
from msfusion.methods.split import Message, Participant, Server, Wire, averaged
from msfusion.methods.states import holding, state_of
from msfusion.methods.training import TrainingSettings, build_optimizer, mini_batches, seed_of
from msfusion.objectives import Evaluation, evaluate
from msfusion.width.cut import Cut, cut
from msfusion.width.groups import State, WidthMap

ServerStep = Literal["each", "joined"]
Clients = Literal["averaged", "relayed"]


@dataclass(frozen=True)
class SplitSettings:
    """How a model is cut and how its parts train together. Raises ConfigError for an unknown way.

    `at` names the module after which the model is cut. `server_step` is "each" (a step for every participant's
    mini-batch, in turn) or "joined" (one step for the mini-batches of all). `clients` are "averaged" after a
    round, weighted by examples (SplitFed), or "relayed": each goes on with the first layers of the one before.
    """

    at: str
    activations: Codec = PROFILES["paper"]
    gradients: Codec = PROFILES["accurate"]
    server_step: ServerStep = "each"
    clients: Clients = "averaged"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("server_step", self.server_step, ("each", "joined")),
            ("clients", self.clients, ("averaged", "relayed")),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(known)}")
        if self.clients == "relayed" and self.server_step == "joined":
            raise ConfigError(
                "participants that relay their layers come one at a time: use server_step = 'each'"
            )


@dataclass(frozen=True)
class SplitTraffic:
    """Bytes of the mini-batches of one participant in one round, and what they would be without a codec."""

    up: int = 0
    down: int = 0
    up_plain: int = 0
    down_plain: int = 0

    def plus(self, up: Message, down: Message, plain: int) -> SplitTraffic:
        """With one more mini-batch; `plain` are the bytes of its activations, as many as of its gradients."""
        return SplitTraffic(
            self.up + sum(map(len, up)),
            self.down + sum(map(len, down)),
            self.up_plain + plain,
            self.down_plain + plain,
        )


@dataclass(frozen=True)
class SplitRound:
    """A finished round: the whole model's state, each participant's mean loss and traffic, and how good it is."""

    round_index: int
    state: dict[str, Tensor]
    losses: tuple[float, ...]
    traffic: tuple[SplitTraffic, ...]
    evaluation: Evaluation | None
    seconds: float


def run_split_rounds(
    model: nn.Module,
    width_map: WidthMap,
    data: Sequence[Batch],
    settings: SplitSettings,
    training: TrainingSettings,
    *,
    rounds: int,
    seed: int = 0,
    state: State | None = None,
    first_round: int = 0,
    test: Batch | None = None,
    evaluate_every: int = 1,
    language_modelling: bool = False,
) -> Generator[SplitRound, None, None]:
    """Run the rounds first_round .. rounds - 1, each with all participants, and hand on each as it ends.

    A round depends on the state before it and on (seed, round) alone, so a run that goes on from any round
    gives the same numbers; optimisers begin afresh in each. Both sides train with `training`.
    Raises CutError, ConfigError or DataError at once; TrainingError for a loss that is not finite.
    """
    if not data or any(len(own) == 0 for own in data):
        raise DataError("split learning needs participants that all have examples")
    parts = cut(model, width_map, settings.at)
    current = dict(state_of(model) if state is None else state)
    for round_index in range(first_round, rounds):
        begin = time.perf_counter()
        federation = _Round(parts, current, data, settings, training, seed, round_index)
        current = federation.run()
        evaluation = None
        if test is not None and ((round_index + 1) % evaluate_every == 0 or round_index == rounds - 1):
            with holding(model, current) as whole:
                evaluation = evaluate(whole, test, language_modelling=language_modelling)
        yield SplitRound(
            round_index,
            current,
            tuple(federation.losses),
            tuple(federation.traffic),
            evaluation,
            time.perf_counter() - begin,
        )


class _Round:
    """One round in training."""

    def __init__(
        self,
        parts: Cut,
        state: State,
        data: Sequence[Batch],
        settings: SplitSettings,
        training: TrainingSettings,
        seed: int,
        round_index: int,
    ) -> None:
        self.parts, self.data, self.settings, self.training = parts, data, settings, training
        self.seed, self.round_index = seed, round_index
        self.wire = Wire(parts.crossing, settings.activations, settings.gradients)
        self.client_state = _part_of(state, parts.client)
        parts.server.load_state_dict(_part_of(state, parts.server))
        parts.server.train()
        self.server = Server(parts.server, build_optimizer(parts.server, training, round_index), self.wire)
        self.losses = [math.nan] * len(data)
        self.traffic = [SplitTraffic() for _ in data]
        self._seen = [0] * len(data)

    def run(self) -> dict[str, Tensor]:
        """The state of the whole model after the round."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, self.round_index))  # dropout
            client = self._relayed() if self.settings.clients == "relayed" else self._together()
        return {**client, **{name: tensor.clone() for name, tensor in self.parts.server.state_dict().items()}}

    def _relayed(self) -> dict[str, Tensor]:
        """One participant after the other; the first layers go from hand to hand."""
        participant = self._participant(self.client_state)
        for index in range(len(self.data)):
            participant.optimizer = self._optimizer(participant.part)
            for batch in self._mini_batches(index):
                self._exchange([(index, participant, batch)])
        return state_of(participant.part)

    def _together(self) -> dict[str, Tensor]:
        """All participants side by side, mini-batch by mini-batch; their first layers are averaged at the end."""
        everyone = [self._participant(self.client_state) for _ in self.data]
        batches = [self._mini_batches(index) for index in range(len(self.data))]
        while True:
            turn = [
                (index, everyone[index], batch)
                for index, own in enumerate(batches)
                if (batch := next(own, None)) is not None
            ]
            if not turn:
                break
            for together in [turn] if self.settings.server_step == "joined" else [[each] for each in turn]:
                self._exchange(together)
        weights = [float(len(own)) for own in self.data]
        return averaged([(state_of(each.part), w) for each, w in zip(everyone, weights, strict=True)])

    def _exchange(self, turn: Sequence[tuple[int, Participant, Batch]]) -> None:
        """Up, a step of the server, and down, for one mini-batch of each of these participants."""
        sent = [participant.send(batch) for _, participant, batch in turn]
        plain = [participant.plain_bytes for _, participant, _ in turn]
        try:
            answers = self.server.step(
                [(message, batch.targets) for message, (_, _, batch) in zip(sent, turn, strict=True)]
            )
        except TrainingError as error:
            who = ", ".join(str(index) for index, _, _ in turn)
            raise TrainingError(f"{error} (round {self.round_index}, participant {who})") from error
        for (index, participant, batch), up, size, (down, loss) in zip(
            turn, sent, plain, answers, strict=True
        ):
            participant.receive(down)
            self.traffic[index] = self.traffic[index].plus(up, down, size)
            before = self.losses[index] * self._seen[index] if self._seen[index] else 0.0
            self._seen[index] += len(batch)
            self.losses[index] = (before + loss * len(batch)) / self._seen[index]

    def _participant(self, state: Mapping[str, Tensor]) -> Participant:
        part = self.parts.copy_of_client()
        part.load_state_dict(state)
        part.train()
        return Participant(part, self._optimizer(part), self.wire)

    def _optimizer(self, part: nn.Module) -> torch.optim.Optimizer | None:
        trains = any(parameter.requires_grad for parameter in part.parameters())
        return build_optimizer(part, self.training, self.round_index) if trains else None

    def _mini_batches(self, participant: int) -> Iterator[Batch]:
        draw = seed_of(self.seed, self.round_index, participant)
        generator = torch.Generator().manual_seed(draw)
        return islice(mini_batches(self.data[participant], self.training, generator), self.training.max_steps)


def _part_of(state: State, part: nn.Module) -> dict[str, Tensor]:
    return {name: state[name] for name in part.state_dict()}
