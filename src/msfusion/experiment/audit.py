"""What participants' updates gave away in a round of a run: made again, attacked, and compared with the truth.

Rounds are deterministic. So the updates of a round are made again as they were sent, from the nearest checkpoint before
it (or from the beginning), through an engine and all that the method's declaration and codecs let pass. The rounds that
are made again must come to the losses that the run recorded, and to its next checkpoint where that is kept; else the
audit is refused. Then each update is attacked with what the server has (`experiment.attacks`), and what was found is
compared with the participant's examples, which are on this machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, fx

from msfusion.batch import Batch
from msfusion.errors import ConfigError, MsfusionError, RunDirectoryError
from msfusion.experiment.attacks import (
    Hits,
    changed_rows,
    known_scale,
    label_shares,
    label_shares_of_weight,
    present_classes,
    total_variation,
)
from msfusion.experiment.config import Config, config_of_run
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.fingerprint import code_of
from msfusion.experiment.kinds import kind_of
from msfusion.experiment.setup import Setup, settle_process
from msfusion.experiment.slices import SlicesRun
from msfusion.experiment.train import each_of, fingerprint_of, prepared_here, refuse_other
from msfusion.federated.conversation import Conversation, Response, Turn
from msfusion.federated.engine import Answer, Ask, Engine, InProcess
from msfusion.federated.method import Method, Task, Update
from msfusion.federated.results import RoundResult
from msfusion.federated.secure_sums import SumOfRound
from msfusion.methods.parts.silence import makers_of_logits
from msfusion.width.analysis import operator_name_of
from msfusion.width.groups import State
from msfusion.width.submodel import program_of

Hear = Callable[[Task, Update], None]
"""Told of a task as its participant could read it, and of the update as the server could."""

HearSum = Callable[[Task, Update, "Behind"], None]
"""Told of the sum of a round's updates, as if it were one, and of who is behind it."""


@dataclass(frozen=True)
class Behind:
    """The participants whose examples are behind an update, and the share of those that took so many steps."""

    participants: tuple[int, ...]
    steps: Mapping[int, float]


def audit(
    path: Path,
    round_number: int = 1,
    participant: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What the updates of a round gave away: plain values, of each participant or of one, and in the mean.

    `round_number` counts from 1. Nothing is written. `tell` is given a sentence where several rounds have to be made
    again, since no checkpoint just before the round is kept. Raises RunDirectoryError where there is no such round,
    where data, code or files have changed since, and where the rounds made again are not those of the run; ConfigError
    where somebody's data is elsewhere, there is no attack for the method, or the participant sent nothing in the round.
    """
    settle_process()  # as the run did: the same data, bit for bit
    directory = RunDirectory.reopen(path)
    config = config_of_run(directory.config)
    _refuse_unaudited(config)
    lines = directory.read_metrics()
    if not 1 <= round_number <= len(lines):
        there = f"give --round 1 to {len(lines)}" if lines else "go on with it by --resume"
        raise RunDirectoryError(f"the run in {path} has no finished round {round_number}: {there}.")
    began = directory.read_fingerprint()
    began.refuse_other_code(code_of(config), config, path)
    run = prepared_here(config, None)
    assert isinstance(run, SlicesRun), "the others are unaudited"
    refuse_other(began, fingerprint_of(run, config), run.config, path)
    attacks = (LabelAttack(run.setup), TokenAttack(run.setup))
    sent: list[int] = []

    def hear(task: Task, update: Update) -> None:
        if update.round_index == round_number - 1:
            sent.append(update.participant)
            for attack in attacks if participant in (None, update.participant) else ():
                attack.look(task, update)

    def hear_sum(task: Task, update: Update, behind: Behind) -> None:
        if update.round_index == round_number - 1:
            for attack in attacks:
                attack.look_at_sum(task, update, behind)

    begun = _make_again(run, directory, lines[:round_number], (hear, hear_sum), tell)
    if participant is not None and participant not in sent:
        told = ", ".join(map(str, sorted(sent)))
        raise ConfigError(f"participant {participant} sent nothing in round {round_number}; who did: {told}")
    return {
        "method": config.method.name,
        "round": round_number,
        "made_again_from": begun,
        "compressed": run.method.compression is not None,
        "secure": run.method.secure_sums is not None,
        "attacks": {attack.name: attack.report() for attack in attacks},
    }


def _refuse_unaudited(config: Config) -> None:
    why = kind_of(config.method.name).unaudited
    if why is not None:
        raise ConfigError(f"there is nothing to audit here: {why} (docs/privacy.md)")
    elsewhere = [who for who, each in enumerate(config.data.own or ()) if isinstance(each, int)]
    if elsewhere:
        raise ConfigError(
            f"the data of participant {elsewhere[0]} is on another machine, and an audit compares what is found with "
            "the truth: audit a run of 'msfusion train' on data of the same kind"
        )


def _make_again(
    run: SlicesRun,
    directory: RunDirectory,
    lines: Sequence[Mapping[str, Any]],
    hear: tuple[Hear, HearSum],
    tell: Callable[[str], None],
) -> int:
    """Run the rounds up to the last of these lines again, and return after how many rounds that began.

    Raises RunDirectoryError where they are not those of the run.
    """
    digest, last = directory.read_fingerprint().digest, len(lines)
    before = directory.load_checkpoint(digest, at_most=last - 1)
    done = before.rounds if before else 0
    state: State = before.state if before else run.initial_state()
    if done < last - 1:
        tell(f"no checkpoint just before round {last} is kept: rounds {done + 1} to {last} are made again")
    run.engine = Listening(InProcess(run.config.run.device), *hear)
    with closing(run.rounds(state, before.memories if before else {}, done, lambda _: None)) as rounds:
        for result in rounds:
            _refuse_other_round(result, lines[result.number - 1], directory.path)
            if result.number == last:
                break
    after = directory.load_checkpoint(digest, at_most=last)
    if after is not None and after.rounds == last and not _equal(after.state, result.state):
        raise _other(last, "the checkpoint", directory.path)
    return done


def _refuse_other_round(result: RoundResult, line: Mapping[str, Any], path: Path) -> None:
    who = [each.participant for each in result.participants]
    losses = each_of(result.participants)["loss"]
    if (who, losses) != (line["participants"], line.get("each", {}).get("loss", losses)):
        raise _other(result.number, "the losses", path)


def _other(round_number: int, what: str, path: Path) -> RunDirectoryError:
    return RunDirectoryError(
        f"round {round_number}, made again here, does not come to {what} of the run in {path}, so these would not be "
        "the updates that were sent: audit it on a machine like that of the run, with the same version of PyTorch."
    )


def _equal(state: State, other: State) -> bool:
    same = state.keys() == other.keys()
    return same and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


class Listening(Engine):
    """Another engine, of which is heard what the server sees: each task of training, and the update that answers it.

    With secure sums that is what came under masks, taken for an update, and the sum.
    """

    converses = True

    def __init__(self, engine: Engine, hear: Hear, hear_sum: HearSum = lambda *_: None) -> None:
        self._engine, self._hear, self._hear_sum = engine, hear, hear_sum

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        """As the other engine."""
        self._engine.open(data, test)

    def close(self) -> None:
        """As the other engine."""
        self._engine.close()

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """As the other engine."""
        sent: dict[int, Task] = {}
        conversation = next((ask.conversation for ask in asks if ask.conversation), None)
        masked = Overheard(conversation) if isinstance(conversation, SumOfRound) else None

        def noted(ask: Ask) -> Ask:
            def tasks() -> Sequence[Task]:
                made = ask.tasks()
                sent.update((task.participant, task) for task in made if ask.kind == "train")
                return made

            return replace(ask, tasks=tasks, conversation=masked or ask.conversation)

        answers: list[Answer] = []
        for answer in self._engine.run(method, [noted(ask) for ask in asks]):
            task = sent.pop(answer.update.participant, None)
            if task is not None and answer.failure is None:
                if masked is None:
                    self._hear(*_as_read(method, task, answer.update))
                answers.append(answer)
            yield answer
        if masked is not None:
            self._hear_masked(masked, {each.update.participant: each.update for each in answers})

    def _hear_masked(self, masked: Overheard, updates: Mapping[int, Update]) -> None:
        """Hear what each sent under masks, and the sum of all. The numbers that updates have besides are known too."""
        for who, update in sorted(updates.items()):
            task, read = masked.conversation.read(masked.numbers[who], [who], who)
            self._hear(task, replace(read, metadata=update.metadata))
        if masked.conversation.opened is not None:
            left, total = masked.conversation.opened
            task, read = masked.conversation.read(total, left, left[0])
            told = [updates[who] for who in left if who in updates]
            steps: dict[int, float] = {}
            for update in told:
                count, share = (
                    update.metadata.get("steps"),
                    masked.conversation.shares(left)[update.participant],
                )
                if isinstance(count, int):
                    steps[count] = steps.get(count, 0.0) + share
            examples = sum(update.examples for update in told)
            self._hear_sum(task, replace(read, examples=examples), Behind(tuple(left), steps))


class Overheard(Conversation):
    """The conversation of secure sums, of which is kept what participants sent under masks."""

    def __init__(self, conversation: SumOfRound) -> None:
        self.conversation, self.numbers = conversation, dict[int, Tensor]()

    def answer(self, turn: Turn) -> Sequence[Response | MsfusionError]:
        """As the conversation."""
        self.numbers |= {who: each.tensors["masked"] for who, each in turn if "masked" in each.tensors}
        return self.conversation.answer(turn)


def _as_read(method: Method, task: Task, update: Update) -> tuple[Task, Update]:
    """Task and update without codecs: as the participant and the server can read them."""
    small = method.compression
    if small is None:
        return task, update
    received = small.received(task)
    return received, small.updated(received, update)


class Attack(ABC):
    """An attack on all updates of a round. `why_not` says why it does not apply, where it does not."""

    name: str
    figures: tuple[str, ...]

    def __init__(self, setup: Setup) -> None:
        self.data, self.settings = setup.data, setup.config.training_settings
        self.shapes, self.aliases = setup.width_map.shapes, setup.width_map.aliases
        self.program = program_of(setup.width_map)
        self.rows: list[dict[str, Any]] = []
        self.of_the_sum: dict[str, Any] | None = None
        self.why_not: str | None = None

    def look(self, task: Task, update: Update) -> None:
        """Attack an update, and note how well that went."""
        steps, who = update.metadata.get("steps"), update.participant
        behind = Behind((who,), {steps: 1.0} if isinstance(steps, int) else {})
        found = self._found(task, update, behind)
        if found is not None:
            self.rows.append({"participant": who, **found})

    def look_at_sum(self, task: Task, update: Update, behind: Behind) -> None:
        """The same of the sum of the updates of a round."""
        found = self._found(task, update, behind)
        if found is not None:
            self.of_the_sum = {"participants": [*behind.participants], **found}

    def _found(self, task: Task, update: Update, behind: Behind) -> dict[str, Any] | None:
        if self.why_not is None and not behind.steps:
            self.why_not = "updates of this method do not say how many steps were taken"
        if self.why_not is None and not all(self.found(name, task, update) for name in self.tensors()):
            self.why_not = f"updates of this method have no tensor {self.tensors()[0]!r}"
        if self.why_not is not None:
            return None
        return {"examples": update.examples, **self.attacked(task, update, behind)}

    @abstractmethod
    def tensors(self) -> tuple[str, ...]:
        """The names, in the model, of the tensors that are looked at."""

    @abstractmethod
    def attacked(self, task: Task, update: Update, behind: Behind) -> dict[str, Any]:
        """What is found in an update, beside what is true."""

    def found(self, name: str, task: Task, update: Update) -> list[tuple[Tensor, Tensor]]:
        """A tensor of the model as it was sent and as it came back: once, or of each block that was trained."""
        there = [
            each
            for each in sorted(update.tensors)
            if each == name or (each not in self.shapes and each.partition(".")[2] == name)
        ]
        return [(task.tensors[each], update.tensors[each]) for each in there if each in task.tensors]

    def report(self) -> dict[str, Any]:
        """Plain values: why it does not apply, or what it found of each participant and in the mean."""
        if self.why_not is not None:
            return {"applies": False, "why": self.why_not}
        rows = sorted(self.rows, key=lambda row: row["participant"])
        mean = {name: fmean(row[name] for row in rows) for name in self.figures} if rows else {}
        told = {"looked_at": list(self.tensors()), "participants": rows, "mean": mean}
        return {"applies": True, **told, **({} if self.of_the_sum is None else {"sum": self.of_the_sum})}


class LabelAttack(Attack):
    """The share of each class among a participant's labels, from the output layer."""

    name = "labels"
    figures = ("distance", "distance_of_uniform", "precision", "recall", "guessing")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        classes = self.data.classes
        makers = sorted(makers_of_logits(self.program, self.aliases))
        self.bias = [name for name in makers if self.shapes[name] == (classes,)]
        self.weight = [
            name for name in makers if len(self.shapes[name]) == 2 and self.shapes[name][0] == classes
        ]
        if self.data.task != "classification" or setup.config.training.loss != "cross_entropy":
            self.why_not = "participants do not learn labels of classes by cross-entropy"
        elif not self.tensors():
            self.why_not = "no tensors of this model make the logits of the classes and nothing else"

    def tensors(self) -> tuple[str, ...]:
        """The bias of the output layer, or its weight where it has none."""
        return tuple((self.bias or self.weight)[:1])

    def attacked(self, task: Task, update: Update, behind: Behind) -> dict[str, Any]:
        """Shares of the classes, and how far they are from the true ones."""
        changes = [sent - received for received, sent in self.found(self.tensors()[0], task, update)]
        change = torch.stack(changes).mean(0)
        if self.bias:
            shares = label_shares(change, known_scale(self.settings, task.round_index, max(behind.steps)))
        else:
            shares = label_shares_of_weight(change)
        labels = torch.cat([self.data.participants[who].targets for who in behind.participants])
        counts = labels.bincount(minlength=self.data.classes)
        true, uniform = counts.double() / counts.sum(), torch.full_like(shares, 1 / self.data.classes)
        return {
            "shares": shares.tolist(),
            "true_shares": true.tolist(),
            "distance": total_variation(shares, true),
            "distance_of_uniform": total_variation(uniform, true),
            **asdict(Hits.of(present_classes(shares, update.examples), counts > 0)),
        }


class TokenAttack(Attack):
    """Which tokens a participant's texts have, from the rows of the embeddings."""

    name = "tokens"
    figures = ("precision", "recall", "guessing")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.tables: tuple[str, ...] = ()
        if self.data.vocabulary_size is None or not len(_tokens_of(self.data.test)):
            self.why_not = "the examples are no texts"
            return
        uses = self._uses_of_tables()
        self.tables = tuple(name for name, used in sorted(uses.items()) if used == {"embedding"})
        if uses and not self.tables:
            self.why_not = (
                "the matrix that embeds tokens also makes the logits, so all its rows have a gradient; that does not "
                "say that nothing can be found in them"
            )
        elif not uses:
            self.why_not = "this model has no table of embeddings with a row for each token"

    def _uses_of_tables(self) -> dict[str, set[str]]:
        """By which operators each table with a row for each token is used that is looked up at all."""
        uses: dict[str, set[str]] = {}
        for node in self.program.graphs[True].graph.nodes:
            if node.op != "get_attr" or self.shapes.get(str(node.target), ())[:1] != (
                self.data.vocabulary_size,
            ):
                continue
            name = self.aliases.get(str(node.target), str(node.target))
            uses.setdefault(name, set()).update(_operator(user) for user in node.users)
        return {name: used for name, used in uses.items() if "embedding" in used}

    def tensors(self) -> tuple[str, ...]:
        """The table of the tokens' embeddings."""
        return self.tables[:1]

    def attacked(self, task: Task, update: Update, behind: Behind) -> dict[str, Any]:
        """How well the tokens are found; padding, which everybody has, does not count."""
        named = torch.zeros(self.data.vocabulary_size or 0, dtype=torch.bool)
        for received, sent in self.found(self.tensors()[0], task, update):
            named |= changed_rows(received, sent, self.settings, task.round_index, behind.steps)
        true = torch.zeros_like(named)
        for who in behind.participants:
            true[_tokens_of(self.data.participants[who])] = True
        if self.data.padding is not None:
            named[self.data.padding] = true[self.data.padding] = False
        found = {"tokens": int(true.sum()), "tokens_named": int(named.sum())}
        return {**found, **asdict(Hits.of(named, true))}


def _operator(node: fx.Node) -> str:
    return operator_name_of(node) if node.op == "call_function" else node.op


def _tokens_of(data: Batch) -> Tensor:
    """All tokens of some texts; nothing where no input has whole numbers."""
    inputs = (
        data.inputs
        if isinstance(data.inputs, dict)
        else {str(at): each for at, each in enumerate(data.inputs)}
    )
    whole = [tensor for tensor in inputs.values() if tensor.dtype in (torch.int64, torch.int32)]
    ids = inputs.get("input_ids", whole[0] if whole else torch.empty(0))
    return ids.flatten().long()
