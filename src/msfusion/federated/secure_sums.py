"""Secure sums: the server learns the sum of a round's updates, and no single one.

A participant p with weight a_p sends what it has changed as whole numbers x_p = round(a_p change 2^k), modulo 2^64,
under masks that nobody else can make all of (Bonawitz et al., ACM CCS 2017, without the sharing of secrets):

    y_p  =  x_p  +  own_p  +  sum of pair_{p,q} over q > p  -  sum of pair_{p,q} over q < p

where pair_{p,q} is known to p and q, and own_p to p alone. The participants of a round train, and then exchange four
messages each with the server (as a conversation, so every engine carries them that carries conversations):

    key       p's public key, and how many examples it has    ->  those of everybody who has trained: the roster
    masked    y_p                                             ->  who has dropped out since
    pairs     the seeds of p's pairs with those               ->  who has dropped out since; again until nobody has
    own       the seed of own_p                               ->  the mean loss

Now the server adds up the y_p of those who are left, takes all their own masks away, and what they share with those who
dropped out; among themselves the pairs cancel. Whoever drops out before `own` has told nobody its own mask, so its y_p
stays hidden though others tell what they share with it; and once p is told that everybody is agreed, it tells nothing
of its pairs with those who are left. Should one of these be gone before its own seed is there, then nothing can be
opened safely: the round leaves the model as it was.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from msfusion.batch import Batch
from msfusion.costs import Costs
from msfusion.errors import ConfigError, MsfusionError, SumError, UpdateError
from msfusion.federated.conversation import Conversation, Request, Response, Turn
from msfusion.federated.masks import (
    SEED_BYTES,
    FixedPoint,
    Identity,
    add_stream,
    add_wrapping,
    context_of,
    is_a_key,
    is_a_sum,
)
from msfusion.federated.method import Answered, Kind, Method, Task, Training, Update
from msfusion.federated.privacy import Form, Outbound
from msfusion.federated.screening import DEFAULT, Screening
from msfusion.federated.states import payload_bytes
from msfusion.federated.wrapped import Wrapped, bytes_of, checked_weight, secret_for, tensor_of
from msfusion.setting import check, setting
from msfusion.width.groups import State
from msfusion.width.tensors import state_tensors

if TYPE_CHECKING:
    from msfusion.federated.participation import Conditions

SUMMED = "summed"
"""The name, in a round's figures, of how many updates its sum is of; none where it could not be had."""


@dataclass(frozen=True)
class SecureSums:
    """That the server learns sums alone. Raises ConfigError, naming the setting, for an impossible value."""

    minimum: int = setting(
        3,
        "the fewest participants whose sum is opened; with fewer left, a round leaves the model as it was",
        ge=2,
    )

    def __post_init__(self) -> None:
        check(self, prefix="secure.")

    def costs(self, module: Any, costs: Costs, participants: int) -> Costs:
        """What a module costs whoever trains it, with everybody there: eight bytes an entry, keys, seeds."""
        tensors = {id(tensor): tensor for tensor in state_tensors(module).values()}
        entries = sum(tensor.numel() for tensor in tensors.values())
        up = 8 * (entries + 1) + 2 * SEED_BYTES
        down = SEED_BYTES + participants * (SEED_BYTES + 16)
        before = payload_bytes({str(key): tensor for key, tensor in tensors.items()})
        return replace(costs, bytes_down=costs.bytes_down + down, bytes_up=costs.bytes_up - before + up)


def check_rounds(secure: SecureSums, asked: int, conditions: Conditions | None, screening: Screening) -> None:
    """Raise ConfigError where the settings of the rounds need single updates, or too few are asked in a round."""
    if asked < secure.minimum:
        raise ConfigError(
            f"{asked} participants are asked in a round, and method.secure.minimum is {secure.minimum}: no sum would "
            "ever be opened"
        )
    if conditions is not None and conditions.deadline is not None and conditions.late == "downweight":
        raise ConfigError(
            "method.secure does not go with late updates that count in part, which are in no round's sum: set "
            "network.late to 'drop'"
        )
    if screening.max_update_norm not in (0, DEFAULT.max_update_norm):
        raise ConfigError(
            "method.secure does not go with method.max_update_norm, since nobody sees the norm of a single update: "
            "leave it out"
        )


class SecureMethod(Wrapped):
    """Another method, `inner`, of whose updates the server learns the weighted sum alone.

    What the inner method fuses is, in place of each participant's update, what the participant was sent moved by the
    mean change of all: a method whose `fuse` goes by the weighted sum of updates alone comes to the same.
    """

    secret = ".secret"

    def __init__(self, inner: Method, settings: SecureSums) -> None:
        super().__init__(inner)
        self.settings = settings
        object.__setattr__(self, "metrics", inner.metrics | {SUMMED})

    # Where the participant is.

    def train(self, task: Task, data: Batch) -> Training:
        """Train as the inner method does; then tell the server what it needs for the sum, and nothing else."""
        update, secret = self.inner_update(task, data, "method.secure")
        mine = Summand(self, task, update, Identity(secret_for(secret, b"key", task, update)))
        answer = yield mine.key()
        mine.meet(answer)
        answer = yield mine.masked()
        update = replace(update, tensors={})  # nobody needs them any more
        while not mine.heard(answer):
            answer = yield mine.pairs()
        answer = yield mine.own()
        return replace(update, loss=mine.mean_loss(answer))

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """Of training, numbers alone: tensors are in the sum."""
        declared = self.inner.outbound(kind, task)
        return declared if kind != "train" else replace(declared, tensors={}, optional=frozenset())

    def outbound_request(self, task: Task) -> Outbound:
        """A public key, numbers under masks, seeds."""
        seed, entries = (torch.uint8, (SEED_BYTES,)), self.layout(task).entries
        forms = {
            "key": seed,
            "masked": (torch.int64, (entries,)),
            "pairs": (torch.uint8, (None, SEED_BYTES)),
            "own": seed,
        }
        # of one kind in each request; far more than the seeds of all participants
        return Outbound(forms, frozenset({"examples"}), most_bytes=8 * entries + 2**20)

    # In the server.

    def conversation(self, state: State, round_index: int) -> Conversation:
        """Who adds up the updates of a round."""
        return SumOfRound(self, state, round_index)

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """The state as it is: the sum has been fused when it was opened (`SumOfRound.state`)."""
        for _ in answered:
            pass
        return dict(state)

    # On both sides.

    @property
    def loss_unit(self) -> float:
        """By what losses are divided before they are added up, so that those of large targets lie in the range."""
        return self.inner.scoring.unit

    def layout(self, task: Task) -> Layout:
        """How an update of this task lies in the numbers that are added up."""
        return Layout.of(self.inner.outbound("train", task))


@dataclass(frozen=True)
class Layout:
    """The tensors of an update, one after the other in the order of their names; after them comes the loss."""

    forms: Mapping[str, Form]

    @classmethod
    def of(cls, declared: Outbound) -> Layout:
        """Raises ConfigError for tensors that cannot be added up, or whose shape is not known beforehand."""
        forms: dict[str, Form] = {}
        for name, (dtype, lengths) in sorted(declared.tensors.items()):
            shape = tuple(length for length in lengths if length is not None)
            if dtype.is_complex or len(shape) != len(lengths) or name in declared.optional:
                raise ConfigError(
                    f"method.secure cannot add up the tensor {name!r}: it is complex, optional, or of any length"
                )
            forms[name] = (dtype, shape)
        return cls(forms)

    @property
    def entries(self) -> int:
        """How many numbers there are, with the loss."""
        return 1 + sum(math.prod(shape) for _, shape in self.forms.values())

    def numbers(
        self, task: Task, update: Update, point: FixedPoint, weight: int, unit: float
    ) -> Int64[Tensor, " entries"]:
        """An update as numbers to be added up, its loss divided by `unit`.

        Raises UpdateError or TrainingError for one that cannot be.
        """
        parts = []
        for name, form in self.forms.items():
            if name not in update.tensors:
                raise UpdateError(f"the update lacks the tensor {name!r}, which its method declares")
            change = _real(update.tensors[name].detach().cpu()) - self._sent(name, form, task)
            parts.append(point.encode(change, weight, f"the tensor {name!r}"))
        loss = torch.tensor([update.loss / unit], dtype=torch.float64)
        return torch.cat([*parts, point.encode(loss, weight, "the loss")])

    def moved(
        self, task: Task, total: Int64[Tensor, " entries"], point: FixedPoint, weight: int
    ) -> dict[str, Tensor]:
        """What a participant was sent, moved by the mean change of all."""
        sizes = [math.prod(shape) for _, shape in self.forms.values()]
        moved: dict[str, Tensor] = {}
        for (name, form), part in zip(self.forms.items(), torch.split(total[:-1], sizes), strict=True):
            dtype, shape = form
            mean = point.mean if dtype.is_floating_point else point.mean_of_counts
            moved[name] = (self._sent(name, form, task) + mean(part, weight).view(shape)).to(dtype)
        return moved

    def _sent(self, name: str, form: Form, task: Task) -> Tensor:
        """What the participant was sent under a name; zeros where that was nothing of this form."""
        sent = task.tensors.get(name)
        dtype, shape = form
        if sent is None or (sent.dtype, tuple(sent.shape)) != form:
            sent = torch.zeros(shape, dtype=dtype)
        return _real(sent.detach().cpu())


def _real(tensor: Tensor) -> Tensor:
    """Exactly the same, in 64 bits."""
    return tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64)


@dataclass(frozen=True)
class Roster:
    """Whose updates of a round may be in its sum: the public keys and numbers of examples, in the participants' order.

    `nonce` is drawn anew by the server in every attempt at a round.
    """

    nonce: bytes
    keys: Mapping[int, bytes]
    examples: Mapping[int, int]

    def response(self) -> Response:
        """As it is told to the participants."""
        keys = torch.stack([tensor_of(key) for key in self.keys.values()])
        return Response(
            tensors={
                "nonce": tensor_of(self.nonce),
                "participants": torch.tensor([*self.keys]),
                "keys": keys,
                "examples": torch.tensor([*self.examples.values()]),
            }
        )

    @classmethod
    def of(cls, response: Response) -> Roster:
        """As a participant was told. Raises SumError for what is none."""
        found = {name: tensor.cpu() for name, tensor in response.tensors.items()}
        try:
            who, examples = found["participants"].tolist(), found["examples"].tolist()
            keys, nonce = [bytes_of(key) for key in found["keys"]], bytes_of(found["nonce"])
            if not len(who) == len(keys) == len(examples) == len(set(who)) == len(set(keys)):
                raise ValueError("of different lengths, or somebody twice")
            if not all(isinstance(count, int) and count > 0 for count in examples):
                raise ValueError("no numbers of examples")
        except (KeyError, ValueError, TypeError) as error:
            raise SumError("the server told what is no list of participants: nothing is sent") from error
        return cls(nonce, dict(zip(who, keys, strict=True)), dict(zip(who, examples, strict=True)))

    def context(self, round_index: int) -> bytes:
        """What seeds are for: this attempt at this round, with these participants."""
        each = (
            part for who, key in self.keys.items() for part in (_count(who), key, _count(self.examples[who]))
        )
        return context_of(self.nonce, _count(round_index), *each)


def _count(number: int) -> bytes:
    return number.to_bytes(8, "little")


class Summand:
    """One participant's side of a round: what it says, and what it will not say.

    It tells the seeds of its pairs only with those that have dropped out, before it has told its own seed, and never
    more after that. So the server can take the masks of this update away all together, in a sum, or not at all.
    Raises SumError where what the server says contradicts what it has said, or would leave too few.
    """

    def __init__(self, method: SecureMethod, task: Task, update: Update, identity: Identity) -> None:
        self._method, self._task, self._update, self._identity = method, task, update, identity
        self._left: set[int] = set()  # the others, as far as is known
        self._asked: list[int] = []  # of which the server needs the seeds of the pairs

    def key(self) -> Request:
        """The public key."""
        key = tensor_of(self._identity.public_key)
        return Request(tensors={"key": key}, metadata={"examples": self._update.examples})

    def meet(self, response: Response) -> None:
        """Hear who the others are."""
        self._roster = roster = Roster.of(response)
        me, mine = self._task.participant, (self._identity.public_key, self._update.examples)
        if (roster.keys.get(me), roster.examples.get(me)) != mine:
            raise SumError(
                f"the server knows another key of participant {me}, or another number of examples: it was started "
                "again in the middle of the exchange, and its training came out otherwise (another number of threads, "
                "other data); it takes part in the next round; nothing is sent"
            )
        self._left = set(roster.keys) - {me}
        self._check_enough()
        self._context = roster.context(self._task.round_index)
        self._seeds = {who: self._identity.pair_seed(roster.keys[who], self._context) for who in self._left}

    def masked(self) -> Request:
        """The update under all masks."""
        me, weights = self._task.participant, weights_in_sums(self._method, self._roster.examples)
        layout, point = self._method.layout(self._task), FixedPoint(sum(weights.values()))
        unit = self._method.loss_unit
        numbers = layout.numbers(self._task, self._update, point, weights[me], unit)
        add_stream(numbers, self._identity.own_seed(self._context))
        for who, seed in self._seeds.items():
            add_stream(numbers, seed, subtract=who < me)
        self._update = replace(self._update, tensors={})
        return Request(tensors={"masked": numbers})

    def heard(self, response: Response) -> bool:
        """Hear who has dropped out since; whether everybody is agreed on who is left."""
        if response.metadata.get("agreed") is True:
            self._check_enough()
            return True
        gone = response.tensors.get("dropped")
        asked = [] if gone is None else gone.tolist()
        if gone is None or len(set(asked)) != len(asked) or not self._left.issuperset(asked):
            raise SumError(
                "the server says of somebody that it has dropped out who cannot have: nothing more is sent"
            )
        self._left -= set(asked)
        self._asked = asked
        self._check_enough()
        return False

    def pairs(self) -> Request:
        """The seeds of the pairs with those that have dropped out."""
        seeds = b"".join(self._seeds[who] for who in self._asked)
        return Request(tensors={"pairs": tensor_of(seeds).view(-1, SEED_BYTES)})

    def own(self) -> Request:
        """The seed of the own mask; after it there is nothing more to say."""
        self._seeds.clear()
        return Request(tensors={"own": tensor_of(self._identity.own_seed(self._context))})

    def mean_loss(self, response: Response) -> float:
        """The mean loss of the round, which stands for the participant's."""
        loss = response.metadata.get("loss")
        if not isinstance(loss, float):
            raise SumError("the server did not say the mean loss of the round")
        return loss

    def _check_enough(self) -> None:
        least = self._method.settings.minimum
        if len(self._left) + 1 < least:
            raise SumError(
                f"{len(self._left) + 1} participants are left, and method.secure.minimum is {least}: nothing is told"
            )


class SumOfRound(Conversation):
    """The server's side of a round. What it keeps are masked updates and seeds, and of those only in memory."""

    def __init__(self, method: SecureMethod, state: State, round_index: int) -> None:
        self._method, self._state, self._round = method, state, round_index
        self._step: Callable[[Turn], list[Response | MsfusionError]] = self._meet
        self._known: Mapping[int, int] = {}  # how many examples each has
        self._masked: dict[int, Tensor] = {}  # of those who are left
        self._asked: list[int] = []  # who has dropped out, of which the seeds of pairs are awaited
        self._pairs: dict[tuple[int, int], bytes] = {}  # (who is left, who has dropped out) -> seed
        self._learned: dict[str, Tensor] = {}
        self.opened: tuple[list[int], Tensor] | None = None  # of whom the sum is, and the sum

    def begin(self, examples: Mapping[int, int]) -> None:
        """Remember how many examples each has: what a participant says is its weight, and everybody's scale."""
        self._known = examples

    def answer(self, turn: Turn) -> Sequence[Response | MsfusionError]:
        """One step of the exchange, once everybody who is there has taken it."""
        return self._step(turn)

    def state(self) -> dict[str, Tensor]:
        """The next global state, once the sum is known."""
        return self._learned

    def figures(self) -> dict[str, float | int]:
        """How many updates are in the sum."""
        return {SUMMED: len(self.opened[0]) if self.opened else 0}

    def _meet(self, turn: Turn) -> list[Response | MsfusionError]:
        keys, examples = dict[int, bytes](), dict[int, int]()
        for who, request in sorted(turn, key=lambda each: each[0]):
            key, count = request.tensors.get("key"), request.metadata.get("examples")
            if key is None or type(count) is not int or not 0 < count == self._known.get(who, count):
                continue
            if is_a_key(bytes_of(key)) and bytes_of(key) not in keys.values():
                keys[who], examples[who] = bytes_of(key), count
        if len(keys) < self._method.settings.minimum:
            return self._given_up(turn, keys)
        self._roster, self._step = Roster(os.urandom(SEED_BYTES), keys, examples), self._add
        told = self._roster.response()
        return [
            told if who in keys else _wrong(who, "public key and its number of examples") for who, _ in turn
        ]

    def _add(self, turn: Turn) -> list[Response | MsfusionError]:
        for who, request in turn:
            if "masked" in request.tensors:
                self._masked[who] = request.tensors["masked"]
        return self._told_who_dropped(turn, set(self._roster.keys) - self._masked.keys(), "masked update")

    def _agree(self, turn: Turn) -> list[Response | MsfusionError]:
        there = set()
        for who, request in turn:
            seeds = request.tensors.get("pairs")
            if seeds is not None and len(seeds) == len(self._asked):
                self._pairs |= {
                    (who, gone): bytes_of(seed) for gone, seed in zip(self._asked, seeds, strict=True)
                }
                there.add(who)
        gone = self._masked.keys() - there
        if gone:
            return self._told_who_dropped(turn, gone, "seed for each who has dropped out")
        self._step = self._open
        return [Response(metadata={"agreed": True}) for _ in turn]

    def _told_who_dropped(self, turn: Turn, gone: set[int], what: str) -> list[Response | MsfusionError]:
        """Go on without some; those that are left are asked for the seeds that they have in common with them."""
        for who in gone:
            self._masked.pop(who, None)
        if len(self._masked) < self._method.settings.minimum:
            return self._given_up(turn, self._masked)
        self._asked, self._step = sorted(gone), self._agree
        told = Response(tensors={"dropped": torch.tensor(self._asked, dtype=torch.int64)})
        return [told if who in self._masked else _wrong(who, what) for who, _ in turn]

    def _open(self, turn: Turn) -> list[Response | MsfusionError]:
        seeds = {who: bytes_of(request.tensors["own"]) for who, request in turn if "own" in request.tensors}
        gone = sorted(self._masked.keys() - seeds.keys())
        if gone:
            return self._ended(
                turn,
                f"participant {gone[0]} was gone when everybody had agreed on the sum, which cannot be opened safely "
                "then; the model stays as it was",
            )
        total = self._unmasked(seeds)
        if not is_a_sum(total):
            return self._ended(
                turn,
                "without the masks there is no sum of updates, so a participant has told a wrong seed; the model stays "
                "as it was",
            )
        loss = self._fuse(total)
        return self._ended(turn, Response(metadata={"loss": loss}))

    def _unmasked(self, seeds: Mapping[int, bytes]) -> Int64[Tensor, " entries"]:
        """The sum of the updates of all who are left."""
        total = torch.zeros_like(next(iter(self._masked.values())))
        for who, numbers in self._masked.items():
            add_wrapping(total, numbers)
            add_stream(total, seeds[who], subtract=True)
        for (who, gone), seed in self._pairs.items():
            if who in self._masked:
                add_stream(total, seed, subtract=gone > who)
        return total

    def _fuse(self, total: Int64[Tensor, " entries"]) -> float:
        """Let the inner method fuse it; the mean loss."""
        left = sorted(self._masked)
        answered = (self.read(total, left, who) for who in left)
        self._learned, self.opened = self._method.inner.fuse(self._state, answered), (left, total)
        return self.read(total, left, left[0])[1].loss

    def read(self, numbers: Int64[Tensor, " entries"], of: Sequence[int], who: int) -> tuple[Task, Update]:
        """A participant's task and the update with which it would move by the mean change, if `numbers` are the sum of
        what some have sent, without masks.
        """
        weights = self._weights
        point, weight = FixedPoint(sum(weights.values())), sum(weights[each] for each in of)
        task = self._method.inner.assign(self._state, self._round, who)
        moved = self._method.layout(task).moved(task, numbers, point, weight)
        loss = float(point.mean(numbers[-1:], weight)) * self._method.loss_unit
        return task, Update(who, self._round, moved, self._roster.examples[who], loss)

    def shares(self, of: Sequence[int]) -> dict[int, float]:
        """What share of a mean over some participants each has."""
        weights = self._weights
        return {who: weights[who] / sum(weights[each] for each in of) for who in of}

    @property
    def _weights(self) -> dict[int, int]:
        return weights_in_sums(self._method, self._roster.examples)

    def _given_up(self, turn: Turn, left: Mapping[int, object]) -> list[Response | MsfusionError]:
        return self._ended(
            turn,
            f"{len(left)} participants are left in the round, and method.secure.minimum is "
            f"{self._method.settings.minimum}: their sum is not opened, and the model stays as it was",
        )

    def _ended(self, turn: Turn, told: Response | str) -> list[Response | MsfusionError]:
        """The end, with the same word for everybody: what it was, or why it was nothing."""
        self._masked, self._pairs = {}, {}
        return [SumError(told) if isinstance(told, str) else told for _ in turn]


def weights_in_sums(method: Method, examples: Mapping[int, int]) -> dict[int, int]:
    """The weight of each participant with so many examples."""
    return {who: checked_weight(method, count) for who, count in examples.items()}


def _wrong(who: int, what: str) -> UpdateError:
    return UpdateError(f"participant {who} did not send a {what} when that was due", who)
