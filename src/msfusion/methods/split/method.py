"""Split learning as a method: a participant's round is a conversation with the server (Zhou et al., ECAI 2024,
arXiv 2408.13787; SplitFed, Thapa et al., AAAI 2022).

    for each round t, participants p side by side, mini-batch by mini-batch:
        participant:  z = first layers_p(x);  ask with encode(z), targets                          train
        server:       a step of the rest on each mini-batch in turn, or one on all (joined)         answer
                      tell participant p  encode(d loss / d z)
        participant:  back through the first layers;  a step                                       train
    first layers  <-  sum a_p first layers_p / sum a_p,  a_p the examples of p                     fuse

`sides` has what each side does with one mini-batch, `wire` how what crosses becomes bytes. With clients = "relayed"
participants come one after the other, each with the first layers of the one before. `rounds` is the same as one loop in
one process, to be read and to be compared with.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from msfusion.batch import Batch
from msfusion.codecs import PROFILES, Codec, Scaled
from msfusion.errors import CodecError, ConfigError, MsfusionError
from msfusion.federated.compression import CODEC_ERROR
from msfusion.federated.conversation import Conversation, Request, Response, Turn
from msfusion.federated.method import Answered, Method, Task, Training, trained_update
from msfusion.federated.privacy import Outbound
from msfusion.federated.problem import Problem, Settings, method
from msfusion.federated.states import state_of
from msfusion.federated.training import Trained, round_batches
from msfusion.methods.split import sides
from msfusion.methods.split.expected import Expected
from msfusion.methods.split.results import SplitTraffic, figures_of
from msfusion.methods.split.sides import averaged, draw_of, part_of
from msfusion.methods.split.wire import Derivative, Message, Wire, check_derivative
from msfusion.setting import check, setting
from msfusion.width.cut import Cut, cut
from msfusion.width.groups import State

ServerStep = Literal["each", "joined"]
Clients = Literal["averaged", "relayed"]


@method("split")
@dataclass(frozen=True)
class SplitSettings(Settings):
    """How a model is cut and how its parts train together. Raises ConfigError for an unknown way.

    "averaged" clients are weighted by examples (SplitFed).
    """

    at: str = setting(meaning="the module after which the model is cut, by its name")
    activations: Codec = setting(
        PROFILES["compact"],
        "a codec for what goes up: a profile, or a table { codec = 'top_k', ... } with its settings",
    )
    gradients: Codec = setting(Scaled, "a codec for what comes down: blocks of it differ much in size")
    server_step: ServerStep = setting(
        "each", "a step for each participant's mini-batch, in turn, or one for those of all (joined)"
    )
    clients: Clients = setting(
        "averaged", "first layers: averaged after each round, or relayed from one participant to the next"
    )
    derivative: Derivative = setting(
        "identity", "of the activations' codec: the identity, or the true one, whose gradients are few"
    )

    name: ClassVar[str]
    own_table: ClassVar[str | None] = "split"

    def __post_init__(self) -> None:
        check(self)
        if self.clients == "relayed" and self.server_step == "joined":
            raise ConfigError(
                "participants that relay their layers come one at a time: use server_step = 'each'"
            )
        check_derivative(self.derivative, self.activations)

    def wire(self, parts: Cut) -> Wire:
        """How what crosses between these parts becomes bytes."""
        return Wire(parts.crossing, self.activations, self.gradients, derivative=self.derivative)

    def build(self, problem: Problem) -> SplitMethod:
        """Cut the model and make the method. Raises CutError, or ConfigError for what split learning cannot do."""
        if problem.scoring.loss is not None:
            raise ConfigError("the server of split learning minimises cross-entropy: leave the loss out")
        if any(training.precision != "float32" for training in problem.training):
            raise ConfigError("split learning trains in float32: leave the precision out")
        return SplitMethod(self, problem, cut(problem.model, problem.width_map, self.at))


class SplitMethod(Method):
    """Split learning of a model that is cut in `parts`. The server trains as participant 0 does."""

    name = "split"
    holds_everything: ClassVar[bool] = False
    metrics: ClassVar[frozenset[str]] = frozenset({*figures_of([]), CODEC_ERROR})

    def __init__(self, settings: SplitSettings, problem: Problem, parts: Cut) -> None:
        self.settings, self.problem, self.parts = settings, problem, parts
        self.model, self.scoring, self.seed = problem.model, problem.scoring, problem.seed
        self.wire = settings.wire(parts)

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The first layers."""
        return Task(participant, round_index, part_of(state, self.parts.client))

    def train(self, task: Task, data: Batch) -> Training:
        """Up with what crosses and the targets, down with gradients, for each mini-batch."""
        who, round_index, training = (
            task.participant,
            task.round_index,
            self.problem.training[task.participant],
        )
        side = sides.participant_of(self.parts, task.tensors, self.wire, training, round_index)
        batches = round_batches(data, training, seed=self.seed, round_index=round_index, participant=who)
        total, seen, steps = 0.0, 0, 0
        for batch in batches:
            message = side.send(batch, draw_of(self.seed, round_index, who, steps))
            response = yield Request(tuple(message), {"targets": batch.targets})
            side.receive(list(response.pieces))
            total += float(response.metadata["loss"]) * len(batch)
            seen, steps = seen + len(batch), steps + 1
        update = trained_update(task, data, Trained(total / seen, seen, steps), state_of(side.part))
        return replace(update, metadata={**update.metadata, **side.told})

    def outbound_request(self, task: Task) -> Outbound:
        """Targets of a mini-batch, and a piece for each tensor that crosses."""
        targets = self.problem.example.targets
        return Outbound(
            {"targets": (targets.dtype, (None,) * targets.dim())},
            pieces=len(self.wire.crossing),
            most_bytes=self.expected.most_bytes,
        )

    @cached_property
    def expected(self) -> Expected:
        """What can cross for a mini-batch."""
        return Expected(self.parts, self.wire, max(each.batch_size for each in self.problem.training))

    def conversation(self, state: State, round_index: int) -> SplitServer:
        """The rest of the model in training."""
        return SplitServer(self, state, round_index)

    @property
    def sequential(self) -> bool:
        """Whether the first layers go from hand to hand."""
        return self.settings.clients == "relayed"

    @property
    def remembers(self) -> bool:
        """Nobody keeps anything."""
        return False

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """The mean of the first layers, weighted by examples; the rest is as the server has learned it."""
        layers: list[tuple[State, float]] = []
        for _, update in sorted(answered, key=lambda pair: pair[1].participant):
            layers.append((update.tensors, update.examples * update.share))
            if update.share < 1:
                layers.append((part_of(state, self.parts.client), update.examples * (1 - update.share)))
        return {**state, **averaged(layers)}


class SplitServer(Conversation):
    """The server in one round: the rest of the model, and what it has answered."""

    def __init__(self, method: SplitMethod, state: State, round_index: int) -> None:
        self.wire, self.seed, self.round_index = method.wire, method.seed, round_index
        self.expected = method.expected
        self.joined = method.settings.server_step == "joined"
        self.one_by_one = not self.joined
        part = method.parts.copy_of_server()
        self.side = sides.server_of(part, state, self.wire, method.problem.training[0], round_index)
        self.steps: Counter[int] = Counter()  # of each participant
        self.traffic = SplitTraffic()

    def answer(self, turn: Turn) -> list[Response | MsfusionError]:
        """A step for each mini-batch in turn, or one for all."""
        turns = [turn] if self.joined else [[each] for each in turn]
        return [answer for together in turns for answer in self._step(together)]

    def _step(self, turn: Turn) -> list[Response | MsfusionError]:
        """One step on the mini-batches of these participants; those that are no good are told why."""
        batches = [self._mini_batch(who, request) for who, request in turn]
        good = [each for each in batches if isinstance(each, sides.Request)]
        stepped = iter(zip(good, self.side.step_on_good(good), strict=True))
        return [
            each if isinstance(each, MsfusionError) else self._response(*next(stepped)) for each in batches
        ]

    def _response(
        self, batch: sides.Request, answer: tuple[Message, float] | MsfusionError
    ) -> Response | MsfusionError:
        """What goes back for a mini-batch; counted."""
        if isinstance(answer, MsfusionError):
            return answer
        down, loss = answer
        plain = self.expected.plain_bytes(len(batch.targets))
        self.traffic = self.traffic.crossed(self.wire, batch.message, down, plain)
        return Response(tuple(down), metadata={"loss": loss})

    def _mini_batch(self, participant: int, request: Request) -> sides.Request | MsfusionError:
        """A request with what is drawn for it, which both sides know; why it is none, if it is not."""
        draw = draw_of(self.seed, self.round_index, participant, self.steps[participant])
        self.steps[participant] += 1
        try:
            if "targets" not in request.tensors:
                raise CodecError("a mini-batch came without targets")
            self.expected.check(request.pieces, request.tensors["targets"])
        except CodecError as error:
            return error
        return sides.Request(list(request.pieces), request.tensors["targets"], draw)

    def state(self) -> dict[str, Tensor]:
        """The rest of the model."""
        return state_of(self.side.part)

    def figures(self) -> dict[str, float | int]:
        """Bytes of all participants by kind."""
        return figures_of([self.traffic])
