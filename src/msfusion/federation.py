"""A federation in a program or a notebook: a model, participants' data, a method; and what comes of their rounds.

In short:

    federation = msfusion.Federation(model, data, method=msfusion.MSfusion(ratio=0.25), test=test)
    for round in federation.rounds(20):
        print(round.number, round.evaluation)
    trained = federation.model()
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.callbacks import Callback
from msfusion.codecs import Codec
from msfusion.data.datasets import batch_of
from msfusion.data.federated import FederatedData, example_inputs
from msfusion.data.load import load_data
from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, DataError
from msfusion.federated.accounting import Privacy, Spent
from msfusion.federated.compression import compressed
from msfusion.federated.engine import Engine
from msfusion.federated.memory import with_memories, without_memories
from msfusion.federated.method import Evaluation, Method
from msfusion.federated.participation import Conditions, RoundSettings
from msfusion.federated.privacy import forms_of
from msfusion.federated.problem import METHODS, Chosen, Problem, Settings
from msfusion.federated.protected import as_run, protected, spend, spent_by
from msfusion.federated.results import ParticipantResult, RoundResult
from msfusion.federated.rounds import run_rounds
from msfusion.federated.screening import DEFAULT, Screening
from msfusion.federated.secure_sums import SecureSums
from msfusion.federated.states import loaded, model_state
from msfusion.federated.training import TrainingSettings
from msfusion.files import digest_of_json, read_tensors, refusing_write_errors, write_tensors
from msfusion.imports import in_one_line
from msfusion.methods.settings import MSfusion, capacities_of
from msfusion.objectives import evaluating, require_classes
from msfusion.quoting import short
from msfusion.scoring import Loss, Metric, Scoring
from msfusion.seeds import seeded

_FILE = "federation.safetensors"


class Federation:
    """Participants that train a model together, simulated on this machine or wherever an engine reaches.

    `model` is a module, whose weights are where training begins; it is not changed. `data` has one entry for each
    participant: a `torch.utils.data.Dataset`, a tuple of tensors (inputs, targets), or a `Batch`; or it is a
    `DataSpec` or `FederatedData`, which has a test set as well. `method` is a method or its settings
    (`MSfusion(ratio=0.25)`), or a name that one is registered under. `training` says how participants train, one for
    all or one for each. `test` is what the model is evaluated on after every `evaluate_every` rounds and the last.

    `loss(outputs, targets)` is what participants minimise (default: cross-entropy over classes); `metrics` are further
    figures of an evaluation, by name: functions of (outputs, targets), or metrics of `torchmetrics`. `engine` carries
    out the rounds (default: this process), `callbacks` are told of them. `fraction` of the participants is asked in a
    round; `conditions` say who is absent or late; `screening` what becomes of bad updates; `together` how many are
    trained at once. `codec` makes what participants send small, `codec_down` what they are sent
    (`federated.compression`). With `secure` the server learns the sum of a round's updates, and no single one
    (`federated.secure_sums`); with `privacy` participants add noise to what they send (`federated.noise`).

    Raises ConfigError or DataError for what does not fit together, in one sentence that says what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Any] | FederatedData | DataSpec,
        method: Settings | str | None = None,
        *,
        training: TrainingSettings | Sequence[TrainingSettings] | None = None,
        test: Any = None,
        loss: Loss | None = None,
        metrics: Mapping[str, Metric] | None = None,
        engine: Engine | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int = 0,
        evaluate_every: int = 1,
        fraction: float = 1.0,
        conditions: Conditions | None = None,
        screening: Screening = DEFAULT,
        together: int = 1,
        evaluation_batch_size: int = 256,
        codec: Codec | None = None,
        codec_down: Codec | None = None,
        secure: bool | SecureSums = False,
        privacy: Privacy | None = None,
    ) -> None:
        _check_arguments(model, engine, callbacks, metrics, seed, evaluation_batch_size)
        self.participants, self.test, language = _shared_out(model, data, test)
        self.settings = _named(method) if isinstance(method, str) else method or MSfusion()
        if not isinstance(self.settings, Settings):
            raise ConfigError(
                f"method is a {type(self.settings).__name__}: give a method, its settings, or a name of one"
            )
        given = training or TrainingSettings()
        self.training = (
            (given,) * len(self.participants) if isinstance(given, TrainingSettings) else tuple(given)
        )
        if len(self.training) != len(self.participants):
            raise ConfigError(
                f"there are {len(self.participants)} participants and {len(self.training)} training settings: give "
                "one, or one for each"
            )
        self.scoring = Scoring(
            loss, metrics or {}, language, evaluation_batch_size, _are_labels(self.participants)
        )
        self.seed, self.engine, self.callbacks = seed, engine, tuple(callbacks)
        self._model, self._together = model, together
        self._conditions, self._screening = conditions, screening
        self._codecs = codec, codec_down
        self._privacy = privacy
        self._secure = (SecureSums() if secure else None) if isinstance(secure, bool) else secure
        self._round_settings = RoundSettings(1, fraction, evaluate_every=evaluate_every, seed=seed)
        self._check_data()
        self.done, self.planned = 0, 0
        self._running = False
        self.history: list[RoundResult] = []
        self.figures: list[dict[str, float]] = []
        """Of each round that is done, those before a resume as well: its number and its figures."""

        self._spent: Spent | None = None
        self._chosen: Chosen | None = None
        self._state: dict[str, Tensor] | None = None
        self._memories: dict[int, Mapping[str, Tensor]] = {}

    @property
    def method(self) -> Method:
        """The method as it was made for the rounds that are planned. Raises ConfigError before any are."""
        if self._chosen is None:
            raise ConfigError("the method is made when rounds are planned: call fit or rounds first")
        return self._chosen.method

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the settings left open and was decided when rounds were planned: how MSfusion starts, and why."""
        return () if self._chosen is None or self._chosen.why is None else (self._chosen.why,)

    @property
    def state(self) -> dict[str, Tensor]:
        """The global state after the rounds that are done."""
        return self.method.initial_state() if self._state is None else self._state

    @property
    def figure_names(self) -> tuple[str, ...]:
        """What `RoundResult.figures` may have beside what all have: metrics of the method and of evaluations."""
        return (*self.scoring.metrics, *sorted(as_run(self.method).metrics))

    @property
    def privacy_spent(self) -> dict[str, float]:
        """With noise: what was set, and the epsilons of the rounds that are done, against whoever sees the models
        (`epsilon`) and against the server (`epsilon_of_server`). Empty without.
        """
        return {} if self._spent is None else self._spent.figures()

    def fit(self, rounds: int) -> list[RoundResult]:
        """Run so many rounds; what each of them came to, without its state."""
        return list(self.rounds(rounds))

    def rounds(self, count: int) -> Generator[RoundResult, None, None]:
        """Run so many rounds more, and hand on each as it ends.

        Learning rates that fall, and methods that plan ahead, go by the number of all rounds: those that are done and
        these. Ending early (`break`, a callback) is safe: the federation is in the state of the last round. Raises
        ConfigError where the method cannot go on from the rounds that are done to so many.
        """
        if self._running:
            raise ConfigError("rounds of this federation are being run already: finish or close them first")
        if not isinstance(count, int) or isinstance(count, bool):
            raise ConfigError(f"the number of rounds is a {type(count).__name__}: give an int")
        self._plan(self.done + count)
        results = run_rounds(
            self.method,
            self.participants,
            replace(self._round_settings, rounds=self.planned),
            engine=self.engine,
            state=self.state,
            memories=self._memories,
            first_round=self.done,
            together=self._together,
            test=self.test,
            conditions=self._conditions,
            screening=self._screening,
            on_participant=self._told,
        )
        with closing(results), self._called():
            for result in results:
                self._state, self._memories = result.state, dict(result.memories)
                self.done = result.round_index + 1
                if self._spent is not None:
                    spend(self._spent, result)
                self.history.append(replace(result, state={}, memories={}))
                self.figures.append({"round": result.number, **result.figures()})
                stops = [callback.round(self, result) for callback in self.callbacks]
                yield self.history[-1]
                if any(stops):
                    break

    def evaluate(self, data: Any = None) -> Evaluation:
        """How good the model is on some data (default: the test set). Raises DataError where there is none."""
        if data is None and self.test is None:
            raise DataError("there is no test set: give Federation one, or evaluate some data")
        batch = self.test if data is None else batch_of(data, "the data to evaluate on")
        assert batch is not None
        return self.method.evaluate(self.state, batch)

    def model(self) -> nn.Module:
        """What has been trained, as a module of its own, in evaluation mode.

        Of a sum of blocks, and of the small model, that is another module than the one that was given: keep its
        `state_dict()`, and load it into what `model()` of the same federation returns.
        """
        return loaded(deepcopy(self.method.whole), model_state(self.state)).eval()

    def save(self, directory: str | Path) -> None:
        """Write all that is needed to go on: the global state and what participants keep. Raises RunDirectoryError."""
        path = Path(directory)
        with refusing_write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        about = {
            "rounds": self.done,
            "planned": self.planned,
            "method": self.method.name,
            "seed": self.seed,
            "digests": self._digests,
            **({} if self._spent is None else {"spent": self._spent.told()}),
            "figures": [
                {name: value if math.isfinite(value) else None for name, value in line.items()}
                for line in self.figures
            ],
        }
        write_tensors(path / _FILE, with_memories(self.state, self._memories), about)

    def resume(self, directory: str | Path) -> Federation:
        """Go on from what `save` wrote; with the same model, data and settings the results are the same bit for bit.

        Of a directory of `Checkpoints` that is its last state. `done` and `planned` then say how many rounds are done
        and were planned, as in `federation.fit(federation.planned - federation.done)`. Raises RunDirectoryError where
        the file is missing or damaged, ConfigError where it is of another federation.
        """
        path = Path(directory)
        last = path / "last"
        tensors, about = read_tensors(
            (last if not (path / _FILE).exists() and last.is_dir() else path) / _FILE
        )
        state, memories = without_memories(tensors)
        if (about["method"], about["seed"]) != (self._name, self.seed):
            raise ConfigError(
                f"{directory} was saved by {about['method']} with seed {about['seed']}, and this is {self._name} "
                f"with seed {self.seed}: make the federation as it was"
            )
        for what in {**self._digests, **about["digests"]}:
            if about["digests"].get(what) != self._digests.get(what):
                raise ConfigError(f"{directory} was saved with other {what}: make the federation as it was")
        self._chosen, self._state, self._memories, self.done = None, None, {}, 0
        self._plan(int(about["planned"]))
        expected = forms_of(self.method.initial_state())
        if expected and forms_of(state) != expected:
            raise ConfigError(
                f"{directory} was saved with other tensors than this model and method have: make the federation as it "
                "was"
            )
        self._state, self._memories, self.done = state, dict(memories), int(about["rounds"])
        if self._spent is not None:
            self._spent = spent_by(self.method)
            assert self._spent is not None
            self._spent.again(about["spent"])
        self.history, self.figures = (
            [],
            [
                {name: math.nan if value is None else value for name, value in line.items()}
                for line in about["figures"]
            ],
        )
        return self

    @property
    def _name(self) -> str:
        """The method's name, which it may have before it is made."""
        return str(getattr(self.settings, "name", type(self.settings).__name__))

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Of what decides the results, beside the model's weights, which are in the state."""
        told = {
            "settings of the method": _told(self.settings),
            "training settings": [_told(each) for each in self.training],
            "settings of the rounds": [
                _told(self._round_settings), _told(self._screening), self._together, self._conditions is None,
            ],
            **({"codecs": [*map(repr, self._codecs)]} if any(self._codecs) else {}),
            **({} if self._secure is None else {"secure sums": _told(self._secure)}),
            **({} if self._privacy is None else {"privacy": _told(self._privacy)}),
            "losses or metrics": [self.scoring.loss is None, sorted(self.scoring.metrics), self.scoring.labels],
        }  # fmt: skip
        return {
            **{name: digest_of_json(value) for name, value in told.items()},
            "examples of the participants": digest_of_json(self._as_data().digests["training"]),
        }

    def _plan(self, rounds: int) -> None:
        """Make the method for so many rounds in all. Raises ConfigError where it cannot go on with the state."""
        if rounds < 1 or rounds <= self.done:
            raise ConfigError(f"there are {rounds - self.done} rounds to run: it must be at least 1")
        if self._chosen is not None and rounds == self.planned:
            return
        before = self._state
        problem = Problem(
            self._model,
            Batch(example_inputs(self._as_data()), self.participants[0].targets[:2]),
            capacities_of(getattr(self.settings, "ratio", 1.0), len(self.participants), self.seed),
            tuple(replace(each, rounds=rounds) for each in self.training),
            tuple(map(len, self.participants)),
            rounds,
            self.seed,
            self.scoring,
        )
        with seeded(self.seed):
            chosen = self.settings.chosen(problem)
            asked = len(self._round_settings.participants_in(0, len(self.participants)))
            protected(compressed(chosen.method, *self._codecs), self._secure, self._privacy, asked)
            first = chosen.method.initial_state()
        if before is not None and first and forms_of(first) != forms_of(before):
            raise ConfigError(
                f"{chosen.method.name} plans its rounds, and cannot go on from {self.done} that were planned as "
                f"{self.planned} to {rounds}: give all rounds at once, or run the {self.planned - self.done} that are "
                "left"
            )
        self._chosen, self.planned = chosen, rounds
        self._spent = self._spent or spent_by(chosen.method)

    def _as_data(self) -> FederatedData:
        test = self.participants[0] if self.test is None else self.test
        return FederatedData(self.participants, test, "classification", 0)

    def _check_data(self) -> None:
        """Raise DataError where participants have nothing, or labels that the model does not know."""
        if not self.participants:
            raise DataError("there are no participants: give at least one participant's data")
        for who, own in enumerate(self.participants):
            if not len(own):
                raise DataError(f"participant {who} has no examples: give it some or use fewer participants")
        shown = self.participants[0].take(slice(0, 2))
        try:
            with evaluating(self._model):
                shown.call(self._model)
        except Exception as error:  # of a shape or type that the model does not take
            raise DataError(
                f"the model cannot be called on participant 0's examples ({type(error).__name__}: {in_one_line(error)})"
            ) from error
        if self.scoring.loss is None:
            known = {f"participant {who}": own for who, own in enumerate(self.participants)}
            others = {} if self.test is None else {"the test set": self.test}
            require_classes(self._model, shown, {**known, **others})

    def _told(self, result: ParticipantResult) -> None:
        for callback in self.callbacks:
            callback.participant(self, result)

    @contextmanager
    def _called(self) -> Generator[None, None, None]:
        """Callbacks begin, and end whatever happens."""
        with ExitStack() as ends:
            self._running = True
            ends.callback(setattr, self, "_running", False)
            for callback in self.callbacks:
                callback.begin(self)
                ends.callback(callback.end, self)
            yield


def _check_arguments(
    model: object, engine: object, callbacks: object, metrics: object, seed: object, batch_size: object
) -> None:
    """ConfigError for arguments of other types than they are documented to have."""
    wanted: list[tuple[str, object, bool, str]] = [
        ("model", model, isinstance(model, nn.Module), "a torch.nn.Module"),
        ("engine", engine, engine is None or isinstance(engine, Engine), "a msfusion.Engine"),
        ("metrics", metrics, metrics is None or isinstance(metrics, Mapping), "a dict of metrics by name"),
        ("seed", seed, isinstance(seed, int) and seed >= 0, "an int of at least 0"),
        ("evaluation_batch_size", batch_size, isinstance(batch_size, int) and batch_size >= 1, "at least 1"),
        (
            "callbacks",
            callbacks,
            isinstance(callbacks, Sequence) and all(isinstance(each, Callback) for each in callbacks),
            "a list of msfusion.Callback",
        ),
    ]
    for name, value, fits, what in wanted:
        if not fits:
            raise ConfigError(f"{name} is {short(repr(value))}: give {what}")


def _named(name: str) -> Settings:
    """The settings of a method by its name, as they are by default. Raises ConfigError where some must be given."""
    made: Any = METHODS[name]
    declared = fields(made) if is_dataclass(made) else ()
    needed = [each.name for each in declared if each.default is MISSING and each.default_factory is MISSING]
    if needed:
        raise ConfigError(
            f"the method {name!r} needs settings: give {made.__name__}({needed[0]}=...) instead of its name"
        )
    settings: Settings = made()
    return settings


def _told(value: Any) -> Any:
    """Settings as plain values; of a function its name."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _told(getattr(value, each.name)) for each in fields(value)} | {
            "": type(value).__qualname__
        }
    if isinstance(value, tuple | list):
        return [_told(each) for each in value]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)


def _are_labels(participants: Sequence[Batch]) -> bool:
    """Whether targets are one class for each example."""
    return all(own.targets.ndim == 1 and not own.targets.is_floating_point() for own in participants)


def _shared_out(
    model: nn.Module, data: Sequence[Any] | FederatedData | DataSpec, test: Any
) -> tuple[tuple[Batch, ...], Batch | None, bool]:
    """Each participant's examples, the test set, and whether this is language modelling."""
    if isinstance(data, DataSpec):
        data = load_data(data)
    if isinstance(data, FederatedData):
        named = data.for_model(model)
        own = named.test if test is None else batch_of(test, "the test set")
        return named.participants, own, data.task == "language_modelling"
    if isinstance(data, Batch | Mapping | str) or not isinstance(data, Sequence):
        raise DataError(
            f"data is a {type(data).__name__}: give a list with one entry for each participant, a DataSpec or "
            "FederatedData"
        )
    participants = tuple(batch_of(each, f"participant {who}") for who, each in enumerate(data))
    return participants, None if test is None else batch_of(test, "the test set"), False
