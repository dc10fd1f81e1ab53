"""A run without a server: several processes, each with a part of the state and some of the participants.

All of them do the same at the same time. The first writes the run directory, with the files and the bits that a run in
one process leaves there: what others have goes through it one tensor at a time. So a run can go on with another number
of processes, or in one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import msfusion
from msfusion.data.federated import FederatedData
from msfusion.engines.sharded.engine import Sharded
from msfusion.engines.sharded.keeping import Keeping
from msfusion.engines.sharded.on_shard import OnShard
from msfusion.engines.sharded.parcels import dtype_named
from msfusion.engines.sharded.ranks import Ranks, RefusedByTheFirst, Torchrun
from msfusion.errors import ConfigError, MsfusionError
from msfusion.experiment.config import Config
from msfusion.experiment.directory import Checkpoint, RunDirectory
from msfusion.experiment.kinds import usual_run
from msfusion.experiment.local import LocalRun
from msfusion.experiment.memory_files import check_with_memories
from msfusion.experiment.prepared import Observer, Prepared
from msfusion.experiment.setup import Parts
from msfusion.experiment.slices import SlicesRun
from msfusion.experiment.train import Watcher, fingerprint_of, is_checkpoint_due, prepared_here, train
from msfusion.federated.memory import Memories
from msfusion.federated.participation import Calendar
from msfusion.federated.results import ParticipantResult, RoundResult
from msfusion.federated.sharding import Form, Shard, hollow
from msfusion.federated.states import model_state
from msfusion.federated.work import CPU
from msfusion.files import Streamed
from msfusion.width.groups import State


def train_under_torchrun(
    config: Config,
    path: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    parts: Parts | None = None,
) -> dict[str, Any]:
    """What `train` does, as one of the processes that torchrun has started; the summary in the first of them.

    The others return nothing. Raises ConfigError where torchrun did not start it, TrainingError where another process
    is lost, in the first process what `train` raises, and in the others RefusedByTheFirst then.
    """
    ranks = Torchrun(config.run.device)
    try:
        return train_on(ranks, config, path, resume=resume, watcher=watcher, parts=parts, device=ranks.device)
    finally:
        ranks.close()


def train_on(
    ranks: Ranks,
    config: Config,
    path: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    parts: Parts | None = None,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """The same as one of some ranks; participants train on the device."""
    if not ranks.is_first:
        word = ranks.from_first()
        if word == _REFUSED:
            raise RefusedByTheFirst(ranks.rank)
        if word == _BEGUN:
            _follow(ranks, config.pinned(), parts, device)
        return {}
    directory, told = _Directory(path), list[bool]()

    def preparing(config: Config, parts: Parts | None) -> Prepared:
        ranks.from_first(_BEGUN)
        told.append(True)
        directory.runs.append(ShardedRun(ranks, config, parts, device))
        return directory.runs[0]

    word = _REFUSED
    try:
        summary = train(
            config,
            path,
            resume=resume,
            watcher=watcher,
            parts=parts,
            preparing=preparing,
            directory=directory,
        )
        word = _FINISHED
    finally:
        if not told:  # nothing for the others to do
            ranks.from_first(word)
    return summary


_BEGUN, _FINISHED, _REFUSED = "begun", "finished", "refused"
"""What the first rank tells the others of a run before they prepare it."""


def _follow(ranks: Ranks, config: Config, parts: Parts | None, device: torch.device) -> None:
    """A run as another rank than the first."""
    run = ShardedRun(ranks, config, parts, device)
    checkpoint = run.loaded(None)
    done = checkpoint.rounds if checkpoint else 0
    state = checkpoint.state if checkpoint else run.initial_state()
    for result in run.rounds(state, checkpoint.memories if checkpoint else {}, done, _unseen):
        state = result.state
        if is_checkpoint_due(run.config, result.number):
            run.hand_over(state, result.memories)
    run.hand_over(model_state(state), {})


def _unseen(result: ParticipantResult) -> None:
    """The first rank shows who has finished."""


class ShardedRun:
    """What `Prepared` asks for, of one rank. All ranks make it at the same time.

    Building and tracing need the whole model once; afterwards its weights are let go of but for the rows that are here.
    """

    def __init__(self, ranks: Ranks, config: Config, parts: Parts | None, device: torch.device) -> None:
        """Raises, at the first rank, what preparing raises on any rank, and ConfigError where ranks differ."""
        self._ranks = ranks
        whole = _made_alike(ranks, config, lambda: _usual(prepared_here(config, parts)))
        self._figures = whole.figures() if ranks.is_first else {}
        sharding = whole.method.sharding()
        self._shard = Shard(sharding, ranks.rank, ranks.count)
        self._run = usual_run(replace(whole.setup, method=sharding.carrier))
        hollow(whole.setup.model)
        engine = Sharded(ranks, sharding, self._shard, device)
        self._run.method, self._run.engine = OnShard(sharding, self._shard, ranks), engine
        self._keeping = Keeping(ranks, self._shard, engine.carrier_of)
        del whole, sharding
        gc.collect()  # what is left of the whole may be in a cycle

    @property
    def config(self) -> Config:
        """The configuration, budgets turned into ratios."""
        return self._run.config

    @property
    def remarks(self) -> Sequence[str]:
        """What was decided that the configuration leaves open, and how many ranks there are."""
        ranks = (
            f"{self._ranks.count} ranks, each with a part of the model"
            if self._ranks.count > 1
            else "one rank"
        )
        return [*self._run.remarks, ranks]

    @property
    def data(self) -> FederatedData:
        """Everybody's examples and the test set."""
        return self._run.data

    @property
    def calendar(self) -> Calendar:
        """Who takes part in each round."""
        return self._run.calendar

    @property
    def model_digest(self) -> str:
        """Of what the model computes."""
        return self._run.model_digest

    def initial_state(self) -> dict[str, Tensor]:
        """The part of it that is here."""
        return self._shard.let_go_of_first()

    def rounds(
        self,
        state: State,
        memories: Memories,
        first_round: int,
        on_participant: Callable[[ParticipantResult], None],
    ) -> Generator[RoundResult, None, None]:
        """The rounds from `first_round` on, at the same time on all ranks."""
        return self._run.rounds(state, memories, first_round, on_participant)

    def observer(self) -> Observer:
        """Who adds the method's own figures."""
        return self._run.observer()

    def figures(self) -> dict[str, Any]:
        """What the run asks of each participant, worked out while the whole model was there."""
        return self._figures

    def plan(self) -> dict[str, Any]:
        """Nobody plans on ranks."""
        raise ConfigError("a plan is made without torchrun: msfusion plan")

    # Between the ranks and the run directory, at the same time on all ranks.

    def streamed(self, state: State, memories: Memories) -> Streamed:
        """What a file has of a state and memories, one tensor after the other, at the first rank."""
        kept = self._keeping.kept(state, memories)
        return Streamed({name: (form.dtype, form.shape) for name, form in kept.forms.items()}, kept.read)

    def hand_over(self, state: State, memories: Memories) -> None:
        """At the others, while the first writes it."""
        self._keeping.hand_over(self._keeping.kept(state, memories))

    def loaded(self, found: tuple[int, Streamed] | None) -> Checkpoint | None:
        """What this rank has of a checkpoint that the first has `found`; None where there is none."""
        told = None
        if found is not None:
            forms = [[name, str(dtype), list(shape)] for name, (dtype, shape) in found[1].forms.items()]
            told = [found[0], forms]
        told = self._ranks.from_first(told)
        if told is None:
            return None
        self._shard.let_go_of_first()
        named = {name: Form(dtype_named(dtype), tuple(shape)) for name, dtype, shape in told[1]}
        read = _nothing if found is None else found[1].read
        return Checkpoint(told[0], *self._keeping.taken(named, read))


def _nothing(name: str) -> Tensor:
    raise AssertionError("the first rank reads")


def _usual(prepared: Prepared) -> SlicesRun:
    """The run whose method may be divided. Raises ConfigError, in the method's words, where it cannot be."""
    if not isinstance(prepared, SlicesRun):
        assert isinstance(prepared, LocalRun)
        prepared.method.sharding()
        raise ConfigError(f"run.engine = 'sharded' does not carry {prepared.config.method.name}")
    return prepared


def _made_alike(ranks: Ranks, config: Config, make: Callable[[], SlicesRun]) -> SlicesRun:
    """The run, where it could be made on all ranks, and is the same everywhere.

    Raises at the first rank what making it raised on any; RefusedByTheFirst at others.
    """
    made, error = None, None
    try:
        made = make()
        made.method.sharding()
        decides = {"version of msfusion": msfusion.__version__, **asdict(fingerprint_of(made, config))}
        decides["run.checkpoint_every"] = config.run.checkpoint_every
    except MsfusionError as raised:
        error, decides = raised, {}
    told = ranks.tell([None if error is None else str(error), decides])
    wrong = [(rank, sentence) for rank, (sentence, _) in enumerate(told) if sentence is not None]
    if wrong:
        if not ranks.is_first:
            raise RefusedByTheFirst(ranks.rank)
        if error is not None:
            raise error
        raise ConfigError(f"rank {wrong[0][0]}: {wrong[0][1]}")
    for rank, (_, others) in enumerate(told):
        different = [key for key in others if others[key] != told[0][1][key]]
        if different:
            if not ranks.is_first:
                raise RefusedByTheFirst(ranks.rank)
            raise ConfigError(
                f"rank {rank} has another {different[0]} than the first: give all ranks the same configuration, data, "
                "files and versions"
            )
    assert made is not None
    return made


@dataclass(frozen=True)
class _Directory(RunDirectory):
    """The directory of a run on several ranks, at the first of them."""

    runs: list[ShardedRun] = field(default_factory=list)

    def load_checkpoint(
        self, fingerprint: str, tell: Callable[[str], None] = lambda _: None, at_most: int | None = None
    ) -> Checkpoint | None:
        """As of every run; each rank has its part of it."""
        return self.runs[0].loaded(self.newest_checkpoint(check_with_memories, fingerprint, tell, at_most))

    def save_checkpoint(
        self,
        rounds: int,
        state: State | Streamed,
        fingerprint: str,
        memories: Memories | None = None,
    ) -> None:
        """As of every run, one tensor after the other."""
        assert not isinstance(state, Streamed)
        super().save_checkpoint(rounds, self.runs[0].streamed(state, memories or {}), fingerprint)

    def save_model(self, state: State | Streamed) -> None:
        """As of every run, one tensor after the other."""
        assert not isinstance(state, Streamed)
        super().save_model(self.runs[0].streamed(state, {}))
