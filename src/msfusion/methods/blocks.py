"""MSfusion by remembered logits: the large model is a sum of blocks, each trained on what the others leave.

With f_b the b-th of m models of the small model's shape, the large model is

    f(x)  =  f_0(x) + f_1(x) + ... + f_{m-1}(x)                        logits are added

and a participant, which can hold one of them, trains it on the loss of the whole:

    loss(f_b(x) + c(x), y)      with c(x) = sum of f_a(x) over a != b                             train

c(x) it remembers: a block that has changed is sent to it once, it keeps the block's logits for its own examples, and
from then on they are constants. All participants train the same block in a round (`methods.phases`), and it becomes the
weighted average of what they made of it (McMahan et al., AISTATS 2017). Who can hold k blocks trains k at once, some of
which others do not. So that the *sum* moves as federated averaging would move it, by the weighted mean of what the
participants made of the whole, a block moves by what those made of it that trained it, and for all others it stays:

    theta_b  <-  theta_b + sum a_p (theta_{p,b} - theta_b) / sum a_p                              fuse
                           over the p that trained b       over all participants of the round

Where all trained it that is their average. (To take the average of the few for granted would overshoot: each of the
blocks would learn all of the rest.) A step of each of k blocks moves their sum k times as far as a step of one. That
helps at first. In the end the whole would be that of the strong, who know their own examples by heart. So with T rounds
in all the learning rate of who holds k is divided, in round t, by

    1 + (k - 1) t / T

Block 0 is the model of `small`, with the same first weights. The others begin with other units of the large model's
weights and without a say (`methods.silence`), so that the whole never begins worse than the small model. Round for
round this is boosting in the first pass over the blocks and backfitting after it (Friedman, Hastie & Tibshirani, Annals
of Statistics 28, 2000), with networks for trees and averaging for one machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from msfusion.averaging.fusion import Accumulator
from msfusion.averaging.robust import accumulator_for
from msfusion.batch import Batch
from msfusion.errors import ConfigError, UpdateError
from msfusion.federated.capacities import Capacities
from msfusion.federated.compression import Entries
from msfusion.federated.method import TRAINED, Answered, Kind, Method, Task, Update, trained_update
from msfusion.federated.privacy import Outbound
from msfusion.federated.sharding import Read, Sharding, stretched, without_label
from msfusion.federated.states import (
    labelled,
    loaded,
    model_state,
    part,
    state_of,
    with_aliases,
    without_aliases,
)
from msfusion.federated.training import TrainingSettings, local_steps
from msfusion.methods.narrow import add_update, weight_of
from msfusion.methods.parts.divided import check_divisible, evaluated_by_models
from msfusion.methods.parts.phases import Phases, Seen, Versions, blocks_in, finished_label
from msfusion.methods.parts.remembered import REMEMBERED_BYTES, Recomputed, Remembering
from msfusion.methods.parts.silence import awake, example_logits, silenced
from msfusion.methods.parts.vectorised import (
    groups_of,
    refuse_contrastive,
    refuse_own_loss,
    refuse_own_training,
    updates_together,
)
from msfusion.methods.small import SmallMethod, fresh_weights
from msfusion.models.sums import SumOfBlocks, label
from msfusion.objectives import Evaluation, Objective, logits_of
from msfusion.width.groups import ShardMap, State, WidthMap, Window
from msfusion.width.stacked import check_stackable
from msfusion.windows import window_size

CHANGES = "changes"
"""In a task's metadata: the number of changes so far (`Versions.total`), by which one of an earlier round is known."""


@dataclass(frozen=True)
class BlocksSettings:
    """How the large model is divided and trained. Raises ConfigError, naming the setting, for impossible values.

    `rounds` are those of the whole run. `blocks` is how many there are (None: as many as small models fit side by
    side into the large one). `passes` is how often each is trained, at most: a phase has at least one round. `first`
    is the share of the rounds in which block 0 is trained before the others have their turns (0: as long as they
    have). `remembered_bytes` is how much a participant remembers of what blocks say (`methods.remembered`).
    """

    rounds: int
    blocks: int | None = None
    passes: int = 8
    first: float = 0.0
    remembered_bytes: int = REMEMBERED_BYTES

    def phases(self, smallest: float) -> Phases:
        """The plan of a run in which the smallest participant has this width ratio."""
        blocks = blocks_for(self.blocks, smallest)
        return Phases(self.rounds, blocks, self.passes, self.first)


def blocks_for(blocks: int | None, smallest: float) -> int:
    """The number of blocks: as given, or as many as small models of that width ratio fit side by side."""
    return max(1, round(1 / smallest)) if blocks is None else blocks


def blocks_at_once(ratio: float, smallest: float, blocks: int) -> int:
    """How many of so many blocks a participant of this width ratio trains at once."""
    return min(blocks, max(1, math.floor(ratio / smallest + 1e-9)))


@dataclass(frozen=True, eq=False, repr=False)
class BlocksMethod(Method):
    """A sum of blocks. `small` is the small model and how it is trained.

    `starts` are the first weights of each block, which say nothing but for block 0; `awake` those with which each
    begins to be trained (`methods.silence`). `large_map` is the width map of the large model.
    """

    name: str
    small: SmallMethod
    starts: tuple[State, ...]
    awake: tuple[State, ...]
    phases: Phases
    capacities: Capacities
    remembering: Remembering
    large_map: WidthMap
    _sums: dict[tuple[str, int], SumOfBlocks] = field(default_factory=dict, repr=False)

    trains_own_models: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scoring", self.small.scoring)

    def held(self, participant: int, round_index: int) -> tuple[int, ...]:
        """The blocks that a participant trains in a round; known to both sides, so it does not travel."""
        count = self.count_at(self.capacities.ratio(participant, round_index))
        return self.phases.held(round_index, count)

    def window(self, round_index: int, participant: int) -> Window:
        """The units of the large model for which the blocks stand that a participant trains in a round."""
        smallest, held = self.capacities.smallest, self.held(participant, round_index)
        parts = [block_window(self.large_map, smallest, block) for block in held]
        return {name: torch.unique(torch.cat([each[name] for each in parts])) for name in parts[0]}

    def count_at(self, ratio: float) -> int:
        """How many blocks a participant of this width ratio trains at once."""
        return blocks_at_once(ratio, self.capacities.smallest, len(self.starts))

    def initial_state(self) -> dict[str, Tensor]:
        """The blocks' first weights, of which nobody remembers anything."""
        blocks = [labelled(label(number), start) for number, start in enumerate(self.starts)]
        first = Versions.first(len(self.capacities.each), len(self.starts)).tensors()
        return {name: tensor.clone() for each in (*blocks, first) for name, tensor in each.items()}

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The blocks that the participant trains, and those that have changed since it was sent them."""
        held, versions = self.held(participant, round_index), Versions.of(state)
        tensors: dict[str, Tensor] = {}
        begun = self._begun(state)
        for block in held:
            tensors |= labelled(label(block), self._sent(begun, block))
        for block in versions.due(participant, self.phases.phase(round_index), held):
            tensors |= labelled(finished_label(block), self._sent(state, block))
        return Task(participant, round_index, tensors, {CHANGES: versions.total})

    def train(self, task: Task, data: Batch) -> Update:
        """Some steps on the participant's own examples, on the loss of the whole."""
        held = self.held(task.participant, task.round_index)
        kept = self._kept(task, data)
        examples, objective = self._of_the_whole(kept, data, held)
        own = self._numbered(task.tensors, [label(block) for block in held])
        model = loaded(self.sum_of(len(held)), own)
        trained = local_steps(
            model,
            examples,
            self._training(task, len(held)),
            seed=self.small.seed,
            round_index=task.round_index,
            participant=task.participant,
            objective=objective,
        )
        tensors: dict[str, Tensor] = {}
        for block, each in zip(held, model.children(), strict=True):
            tensors |= labelled(label(block), without_aliases(state_of(each), self.small.width_map.aliases))
        return self._told(trained_update(task, data, trained, tensors), task, kept)

    def _training(self, task: Task, held: int) -> TrainingSettings:
        """How a participant trains so many blocks: in the end their sum is to move as far as one block would."""
        settings = self.small.training[task.participant]
        divisor = 1 + (held - 1) * min(task.round_index / self.phases.rounds, 1.0)
        return replace(settings, learning_rate=settings.learning_rate / divisor)

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """The tensors of the blocks that it trained, as they came. What it remembers stays."""
        held = tuple(f"{label(block)}." for block in self.held(task.participant, task.round_index))
        trained = {name: tensor for name, tensor in task.tensors.items() if name.startswith(held)}
        return Outbound.like(trained, TRAINED)

    def entries(self, task: Task) -> dict[str, Entries]:
        """A finished block is the block that the participant has trained."""
        return {
            f"{finished_label(block)}.{name}": Entries(f"{label(block)}.{name}")
            for block in blocks_in(task.tensors, len(self.starts))
            for name in part(task.tensors, finished_label(block))
        }

    def known_at_first(self) -> dict[str, Tensor]:
        """All blocks, as they are when their turn comes."""
        blocks = [labelled(label(number), start) for number, start in enumerate(self.awake)]
        return {name: tensor for each in blocks for name, tensor in each.items()}

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """Each block goes towards the weighted average of those who trained it; others keep their values."""
        versions, begun = Versions.of(state), self._begun(state)
        averages, seen, weights = Averages(begun, self.small), list[Seen](), list[float]()
        for task, update in answered:
            held = self.held(task.participant, task.round_index)
            self._check_names(update, held)
            for block in held:
                averages.add(block, replace(update, tensors=part(update.tensors, label(block))))
            now = task.metadata[CHANGES] == versions.total
            phase = self.phases.phase(task.round_index)
            seen.append(Seen(task.participant, phase, held, now))
            weights.append(weight_of(update, self.small.weighting) if self.small.average == "mean" else 1.0)
        moved = self._moved(begun, averages.result(), seen, weights)
        return {**state, **moved, **versions.after(seen).tensors()}

    def _moved(
        self, begun: State, averages: State, seen: Sequence[Seen], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """Each block's step towards its average: as much of the way as those who trained it weigh among all.

        Where all trained it that is the average itself, bit for bit. Statistics are not weights: of them it is always.
        """
        everybody, moved = math.fsum(weights), dict(averages)
        for block in sorted({block for each in seen for block in each.held}):
            trained = (weight for each, weight in zip(seen, weights, strict=True) if block in each.held)
            share = math.fsum(trained) / everybody
            if share < 1:
                before = part(begun, label(block))
                for name in self.small.width_map.parameters:
                    new = averages[f"{label(block)}.{name}"]
                    step = torch.lerp(before[name].double(), new.double(), share)
                    moved[f"{label(block)}.{name}"] = step.to(new.dtype)
        return moved

    def weight_in_sums(self, examples: int) -> int:
        """As `small`. Raises ConfigError where some train more blocks than others."""
        if not self.capacities.alike:
            raise ConfigError(
                f"method.secure and method.privacy do not go with {self.name} where participants have different "
                "ratios, so that some train blocks that others do not: give all the same participants.ratio"
            )
        return self.small.weight_in_sums(examples)

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        """How good the sum of all blocks is."""
        whole = loaded(self.whole, model_state(state))
        return self.small.scoring.evaluate(whole, data)

    def check_together(self) -> None:
        """Raise ConfigError where the blocks cannot be stacked."""
        refuse_contrastive(self.small.contrastive)
        refuse_own_loss(self.small.scoring)
        refuse_own_training(self.small.training)
        check_stackable(self.small.model)

    def groups(
        self, round_index: int, participants: Sequence[int], data: Sequence[Batch], limit: int
    ) -> list[tuple[int, ...]]:
        """Everybody with one block and remembered logits; the others train by themselves."""

        def alike(participant: int) -> int | None:
            one = len(self.held(participant, round_index)) == 1
            return None if one and not self.remembering.recomputes(data[participant]) else participant

        return groups_of(participants, data, self.small.training, limit, alike)

    def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Update]:
        """What `train` gives for each of a group."""
        blocks = [self.held(task.participant, task.round_index)[0] for task in tasks]
        kept = [self._kept(task, own) for task, own in zip(tasks, data, strict=True)]
        examples = [
            self._of_the_whole(mine, own, (block,))[0]
            for mine, own, block in zip(kept, data, blocks, strict=True)
        ]
        plain = [
            replace(task, tensors=part(task.tensors, label(block)), memory={})
            for task, block in zip(tasks, blocks, strict=True)
        ]
        settings = self.small.training[tasks[0].participant]
        updates = updates_together(self.small.model, plain, examples, settings, self.small.seed)
        return [
            self._told(replace(update, tensors=labelled(label(block), update.tensors)), task, mine)
            for task, block, update, mine in zip(tasks, blocks, updates, kept, strict=True)
        ]

    def sharding(self) -> Sharding:
        """Rows of every block, all alike. Raises ConfigError where they cannot be divided."""
        check_divisible(self, BlocksMethod, self.small.average)
        small, count = self.small.hollow(), len(self.starts)
        nothing = tuple({name: stretched(each) for name, each in small.start.items()} for _ in range(count))

        def on(shard: ShardMap, cut: Callable[[State], dict[str, Tensor]]) -> BlocksMethod:
            own = tuple(map(cut, self.awake))
            return replace(self, small=self.small.on_shard(shard), starts=({},) * count, awake=own, _sums={})

        def evaluate(read: Read, notes: State, data: Batch) -> Evaluation:
            labels = [*map(label, range(count))]
            names = [*small.start]
            return evaluated_by_models(
                small.model, names, labels, SumOfBlocks.joined, small.scoring, read, data
            )

        return Sharding(
            first=self.initial_state(),
            width_map=small.width_map,
            on=on,
            carrier=replace(self, small=small, starts=nothing, awake=nothing, _sums={}),
            evaluate=evaluate,
            base=without_label,
        )

    @property
    def whole(self) -> SumOfBlocks:
        """The large model: working space, its tensors are to be overwritten."""
        return self.sum_of(len(self.starts))

    def sum_of(self, count: int, use: str = "training") -> SumOfBlocks:
        """So many blocks as one model, with tensors that are to be overwritten: one per process, use and count."""
        if (use, count) not in self._sums:
            self._sums[use, count] = SumOfBlocks([deepcopy(self.small.model) for _ in range(count)])
        return self._sums[use, count]

    def trained_at(self, ratio: float) -> nn.Module:
        """What a participant of this ratio trains."""
        return self.sum_of(self.count_at(ratio))

    def _begun(self, state: State) -> dict[str, Tensor]:
        """The state, with each block that nobody has trained yet as its training begins.

        From there on it moves as well: one that had a part of a silent one's scale would be held back for long.
        """
        changes = Versions.of(state).changes.tolist()
        new = (labelled(label(block), own) for block, own in enumerate(self.awake) if not changes[block])
        return {**state, **{name: tensor for each in new for name, tensor in each.items()}}

    def _sent(self, state: State, block: int) -> dict[str, Tensor]:
        return self._without_aliases(part(state, label(block)))

    def _without_aliases(self, block: State) -> dict[str, Tensor]:
        return without_aliases(block, self.small.width_map.aliases)

    def _numbered(self, tensors: State, labels: Sequence[str]) -> dict[str, Tensor]:
        """The tensors under some labels as those of the blocks of a sum of so many."""
        found: dict[str, Tensor] = {}
        for number, each in enumerate(labels):
            found |= labelled(label(number), with_aliases(part(tensors, each), self.small.width_map.aliases))
        return found

    def _kept(self, task: Task, data: Batch) -> dict[str, Tensor]:
        """What the participant remembers once it has this task: of every block that it was sent the newest."""
        kept = dict(task.memory)
        for block in blocks_in(task.tensors, len(self.starts)):
            new: State = part(task.tensors, finished_label(block))
            if not self.remembering.recomputes(data):
                others = self._finished(kept, self._others(kept, (block,)))
                new = self.remembering.remember(self.logits(new, data), data, others)
            kept |= labelled(finished_label(block), new)
        return kept

    def _of_the_whole(self, kept: State, data: Batch, held: Sequence[int]) -> tuple[Batch, Objective]:
        """The participant's examples with what the other blocks say of them, and the loss of the whole."""
        others = self._others(kept, held)
        if not others:
            return data, self.small.scoring.objective
        if self.remembering.recomputes(data):
            finished = self._numbered(kept, [finished_label(block) for block in others])
            model = loaded(self.sum_of(len(others), "finished"), finished)
            return data, Recomputed(model, self.small.scoring)
        offset = self.remembering.recall(self._finished(kept, others))
        return replace(data, offset=offset), self.small.scoring.objective

    def _others(self, kept: State, held: Sequence[int]) -> list[int]:
        """The blocks that are remembered, without some."""
        return [block for block in blocks_in(kept, len(self.starts)) if block not in held]

    def _finished(self, kept: State, blocks: Iterable[int]) -> list[State]:
        """What is remembered of some blocks."""
        return [part(kept, finished_label(block)) for block in blocks]

    def logits(self, block: State, data: Batch) -> Iterator[Float[Tensor, "examples *time classes"]]:
        """What one block, by the small model's names, says of all examples, mini-batch by mini-batch: in evaluation
        mode, without gradients.
        """
        model = loaded(self.small.model, with_aliases(block, self.small.width_map.aliases)).eval()
        for batch in data.split(self.small.scoring.batch_size):
            with torch.no_grad():
                said = logits_of(batch.call(model))
            yield said

    def _told(self, update: Update, task: Task, kept: State) -> Update:
        """The update with what its participant keeps, if that is new."""
        return replace(update, memory=kept) if blocks_in(task.tensors, len(self.starts)) else update

    def _check_names(self, update: Update, held: Sequence[int]) -> None:
        """UpdateError where there are tensors of other blocks than those that the participant was to train."""
        ours = tuple(f"{label(block)}." for block in held)
        strange = [name for name in update.tensors if not name.startswith(ours)]
        if strange:
            raise UpdateError(
                f"participant {update.participant} in round {update.round_index + 1}: the update has a tensor "
                f"{strange[0]!r}, which is of no block that it was to train",
                update.participant,
            )


class Averages:
    """The weighted averages of several small models that lie in one state, each by itself, as updates come."""

    def __init__(self, state: State, small: SmallMethod) -> None:
        self._state, self._small = state, small
        self._sums: dict[int, Accumulator] = {}

    def add(self, number: int, update: Update) -> None:
        """Add what a participant made of one of the models. Raises UpdateError as `add_update` does."""
        own, small = part(self._state, label(number)), self._small
        if number not in self._sums:
            self._sums[number] = accumulator_for(own, small.width_map, small.average)
        add_update(self._sums[number], own, {}, update, small.weighting, small.width_map)

    @property
    def changed(self) -> list[int]:
        """The models to which something was added."""
        return [*self._sums]

    def result(self) -> dict[str, Tensor]:
        """Their tensors, by the names of the state."""
        return {
            name: tensor
            for number, total in self._sums.items()
            for name, tensor in labelled(label(number), total.result()).items()
        }


def blocks_method(
    name: str,
    small: SmallMethod,
    model: nn.Module,
    width_map: WidthMap,
    settings: BlocksSettings,
    capacities: Capacities,
) -> BlocksMethod:
    """A sum of blocks of the shape of `small`, from other units of the model's weights each.

    Raises ConfigError where a block cannot begin without a say.
    """
    if small.contrastive.weight > 0:
        raise ConfigError(
            "method.contrastive_weight does not go with method.start = 'blocks', whose blocks are not to say the same: "
            "set it to 0"
        )
    phases = settings.phases(capacities.smallest)
    starts = first_weights(small, model, width_map, capacities.smallest, phases.blocks)
    silent = [silenced(small.model, start, width_map.aliases) for start in starts[1:]]
    begin = [awake(small.model, start, quiet) for start, quiet in zip(starts[1:], silent, strict=True)]
    remembering = _remembering(small, phases.blocks, settings.remembered_bytes)
    first = starts[0]
    return BlocksMethod(
        name, small, (first, *silent), (first, *begin), phases, capacities, remembering, width_map
    )


def _remembering(small: SmallMethod, blocks: int, limit: int) -> Remembering:
    """How much of a block's logits can be kept: their number and type are asked of the example that was traced."""
    logits = example_logits(small.model, small.start)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if small.scoring.loss is not None:
        return Remembering(logits[0].numel(), dtype, blocks, limit, by_example=True)
    return Remembering(logits.shape[-1], dtype, blocks, limit)


def first_weights(
    small: SmallMethod, model: nn.Module, width_map: WidthMap, ratio: float, count: int
) -> list[State]:
    """Weights of so many models of the small model's shape: the first has its own, the next the units after those."""
    others = (block_window(width_map, ratio, block) for block in range(1, count))
    return [small.start, *(fresh_weights(model, width_map, window) for window in others)]


def block_window(width_map: WidthMap, ratio: float, block: int) -> dict[str, Tensor]:
    """The units of the large model that a block stands for: its first weights are theirs."""
    window = {}
    for group in width_map.groups:
        width = window_size(ratio, group.units)
        window[group.name] = (torch.arange(width) + block * width) % group.units
    return window
