"""One run, from a configuration to a run directory; killed at any moment, it goes on where it was."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from msfusion.errors import ConfigError, MsfusionError, RunDirectoryError
from msfusion.experiment.advice import advice, constant_answer, costly_checkpoints
from msfusion.experiment.config import Config, config_of_run
from msfusion.experiment.config.sections import SHARDED
from msfusion.experiment.config.targets import loss_name
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.events import Events
from msfusion.experiment.fingerprint import Fingerprint, code_of
from msfusion.experiment.kinds import prepare
from msfusion.experiment.page.about import note
from msfusion.experiment.page.write import leave_report
from msfusion.experiment.prepared import Prepared
from msfusion.experiment.report.spreads import first_reached
from msfusion.experiment.setup import Parts
from msfusion.experiment.simulated import attendance_figures, simulated_figures
from msfusion.federated.compression import CODEC_ERROR
from msfusion.federated.results import LeftOut, ParticipantResult, RoundResult
from msfusion.federated.states import model_state
from msfusion.quoting import plain
from msfusion.scoring import SCORES


@runtime_checkable
class Watcher(Protocol):
    """Who wants to know how a run goes on."""

    def note(self, text: str) -> None:
        """Something was lost that should not have been; `text` says what, and where the run goes on."""

    def started(self, prepared: Prepared, done: int) -> None:
        """The run begins, or goes on after so many rounds."""

    def participant(self, result: ParticipantResult) -> None:
        """A participant has finished its part of a round."""

    def round(self, line: Mapping[str, Any]) -> None:
        """A round has ended; `line` is its line of metrics."""


class Silent:
    """Nobody wants to know."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""

    def note(self, text: str) -> None:
        """Said on standard error all the same: nobody who wants no progress wants to lose rounds unawares."""
        print(f"msfusion: {plain(text)}.", file=sys.stderr)

    def started(self, prepared: Prepared, done: int) -> None:
        """Nothing."""

    def participant(self, result: ParticipantResult) -> None:
        """Nothing."""

    def round(self, line: Mapping[str, Any]) -> None:
        """Nothing."""


def train(
    config: Config,
    path: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    parts: Parts | None = None,
    preparing: Callable[[Config, Parts | None], Prepared] | None = None,
    directory: RunDirectory | None = None,
    held: bool = False,
    report: bool = True,
) -> dict[str, Any]:
    """Train, leaving everything in the directory `path`, and return the summary.

    With `resume`, a run that is there is continued from its last checkpoint; a finished one is checked and left as it
    is, and one that has not begun is begun. The result is the same as if it had never stopped:
    model.safetensors bit for bit. `parts` are data, model and width map where they are known already;
    `preparing` makes the run of them (by default for participants that are all here); `directory` is another kind of
    directory at `path`; `held`: the caller has locked it already (`RunDirectory.locked`); `report`: at the end the
    page of the run is left there too (`experiment.page`). With run.engine = "sharded" this is one of several processes
    (`experiment.sharded`).

    Raises RunDirectoryError where the directory is in use, holds something else, or a run of another configuration,
    other data or other code, where a finished run is damaged, or it cannot be written; and what loading, tracing,
    counting costs and training raise. Checkpoints from before an error stay; where a new run fails before the end of
    its first round, nothing does.
    """
    if config.run.engine == SHARDED and preparing is None:
        from msfusion.experiment.sharded import train_under_torchrun

        return train_under_torchrun(config, path, resume=resume, watcher=watcher, parts=parts)
    config, directory = config.pinned(), directory or RunDirectory(path)
    if _begun(directory, config, resume) and directory.finished:
        return _end(directory)
    with nullcontext() if held else directory.locked():
        begun = _begun(directory, config, resume)  # once more, as another run may have come first
        if begun and directory.finished:
            return _end(directory)
        prepared = (preparing or prepared_here)(config, parts)
        prepared.figures()  # a model whose costs cannot be counted is refused before it is trained
        fingerprint = fingerprint_of(prepared, config)
        if begun:
            refuse_other(directory.read_fingerprint(), fingerprint, prepared.config, path)
        else:
            RunDirectory.create(path, config.to_toml(), fingerprint)
        try:
            summary = _run(prepared, directory, fingerprint, watcher or Silent())
        except MsfusionError:
            if not begun and not directory.read_metrics():
                directory.remove()
            raise
        if report:
            leave_report(path)
        return summary


def fingerprint_of(prepared: Prepared, config: Config) -> Fingerprint:
    """Digests of all that decides the results of a run; `config` is its configuration before it was prepared."""
    return Fingerprint(
        prepared.config.fingerprint(), prepared.data.digests, code_of(config), prepared.model_digest
    )


def is_checkpoint_due(config: Config, rounds: int) -> bool:
    """Whether the state after so many rounds is kept."""
    return rounds % config.run.checkpoint_every == 0 or rounds == config.rounds


def prepared_here(config: Config, parts: Parts | None) -> Prepared:
    """The run in this process. Raises ConfigError where somebody's data is on another machine."""
    own = config.data.own
    elsewhere = [who for who, each in enumerate(own or ()) if isinstance(each, int)]
    if elsewhere:
        raise ConfigError(
            f"data.own says only how many examples participant {elsewhere[0]} has: its data is on another machine, so "
            "use 'msfusion serve'"
        )
    return prepare(config, parts)


def _begun(directory: RunDirectory, config: Config, resume: bool) -> bool:
    """Whether there is a run to go on with. Raises RunDirectoryError where neither that nor a new one is possible."""
    if resume and directory.config.is_file():
        RunDirectory.reopen(directory.path)
        refuse_change(directory, config)
        directory.read_fingerprint().refuse_other_code(code_of(config), config, directory.path)
        return True
    try:
        RunDirectory.check_free(directory.path)
    except RunDirectoryError as error:
        if resume and directory.path.is_dir():
            raise RunDirectoryError(
                f"{directory.path} holds files and no config.toml, so there is no run in it to go on with; choose "
                "another --out."
            ) from error
        raise
    return False


def _end(directory: RunDirectory) -> dict[str, Any]:
    """The summary of a finished run. Raises RunDirectoryError where its files are damaged."""
    directory.check_end()
    return directory.read_summary()


def refuse_change(directory: RunDirectory, config: Config) -> None:
    """Raises RunDirectoryError, naming a key, where the run in the directory has another configuration."""
    difference = config_of_run(directory.config).difference(config)
    if difference is not None:
        raise RunDirectoryError(
            f"{directory.path} is a run of another configuration, in which {difference}; "
            "resume it unchanged or choose another --out."
        )


def refuse_other(began: Fingerprint, now: Fingerprint, config: Config, path: Path) -> None:
    """Raises RunDirectoryError where the run in `path` began with anything else than there is now."""
    began.refuse_other_code(now.code, config, path)
    began.refuse_other_data(now.data, config, path)
    began.refuse_other_model(now.model, config, path)
    began.refuse_other_config(config, path)


def _run(
    prepared: Prepared, directory: RunDirectory, fingerprint: Fingerprint, watcher: Watcher
) -> dict[str, Any]:
    """The rounds that are still to be run, and the end."""
    config = prepared.config
    note(prepared, directory.path)
    checkpoint = directory.load_checkpoint(fingerprint.digest, watcher.note)
    done = checkpoint.rounds if checkpoint else 0
    state: Mapping[str, Tensor] = checkpoint.state if checkpoint else prepared.initial_state()
    earlier = directory.keep_metrics(done)
    observer = prepared.observer()
    for line in earlier:
        observer.again(line)
    watcher.started(prepared, done)
    memories = checkpoint.memories if checkpoint else {}
    results = prepared.rounds(state, memories, done, watcher.participant)
    saving, rounds = 0.0, 0.0
    with closing(results), Events(directory.path, earlier) as events:
        for result in results:
            line = metrics_line(result, observer.figures(result, state))
            state = result.state
            directory.add_metrics(line)
            rounds += result.seconds
            if is_checkpoint_due(config, line["round"]):
                began = time.monotonic()
                directory.save_checkpoint(line["round"], state, fingerprint.digest, result.memories)
                saving += time.monotonic() - began
            events.add(line)
            watcher.round(line)
        directory.save_model(model_state(state))  # before anything else that can fail
    for each in costly_checkpoints(saving, rounds, config.run.checkpoint_every):
        watcher.note(each)
    metrics = directory.read_metrics()
    summary = summarise(prepared, metrics)
    directory.finish(summary)
    note(prepared, directory.path, metrics)
    return summary


_SCORES = ("accuracy", "loss", "accuracy_sd", "loss_sd")
_QUALITY = (*_SCORES, "perplexity", *(f"own_{key}" for key in _SCORES))
"""How good models are, and how far participants lie apart: on the test data; in their own proportions of labels."""


def metrics_line(result: RoundResult, own: Mapping[str, Any]) -> dict[str, Any]:
    """One round in figures, `own` those of the method. `round` counts from 1, so it says how many are done."""
    line: dict[str, Any] = {
        "round": result.number,
        "participants": [each.participant for each in result.participants],
        "training_loss": result.training_loss,
    }
    figures = result.figures()
    line |= {name: figures[name] for name in (*SCORES, CODEC_ERROR) if name in figures}
    line |= _by_class(result)
    down, up = result.bytes_moved
    line |= {
        "bytes_down": down,
        "bytes_up": up,
        "measuring_bytes": result.measuring_bytes,
        "seconds": round(result.seconds, 4),
        **attendance_figures(result.attendance),
        **own,
        "each": each_of(result.participants),
    }
    if asked := {name: value for name, value in result.own_figures().items() if name not in line}:
        line["metrics"] = {name: _finite(value) for name, value in asked.items()}
    if result.left_out:
        line["left_out"] = [_told(each, result.round_index) for each in result.left_out]
    return {key: _finite(value) for key, value in line.items()}


def _by_class(result: RoundResult) -> dict[str, Any]:
    """Where the round was evaluated: of each class the share of its test examples that are told rightly."""
    shares = None if result.evaluation is None else result.evaluation.by_class
    if shares is None:
        return {}
    return {"by_class": [None if share is None else round(share, 4) for share in shares]}


EACH = ("loss", "seconds", "bytes_down", "bytes_up")
"""What a round's line has of each of its participants."""


def each_of(participants: Sequence[ParticipantResult]) -> dict[str, list[Any]]:
    """What the participants of a round did, a list for each figure, in their order."""
    told = {name: [_finite(getattr(each, name)) for each in participants] for name in EACH}
    return {**told, "seconds": [round(each.seconds, 4) for each in participants]}


def _told(each: LeftOut, round_index: int) -> dict[str, Any]:
    """Who is left out of a round, why, and the round in which it began if that was an earlier one."""
    began = {} if each.round_index == round_index else {"began": each.round_index + 1}
    return {"participant": each.participant, **began, "reason": each.reason}


def summarise(prepared: Prepared, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The final figures of a run, and what they advise.

    `targets`: what it took to reach each accuracy that was asked for. `constant_answer`: how good it is to say the same
    of all examples. `normalised_targets`: the model has learnt numbers on another scale than that of all figures.
    """
    last, count = metrics[-1], prepared.config.participants.count
    summary = {
        "method": prepared.config.method.name,
        "seed": prepared.config.seed,
        "rounds": len(metrics),
        "data": prepared.data.description,
        **{key: last[key] for key in (*_QUALITY, "metrics", "privacy") if key in last},
        "training_loss": last["training_loss"],
        "entry_coverage": last.get("entry_coverage"),
        "seconds": round(sum(line["seconds"] for line in metrics), 3),
        "results": participant_results(metrics, count),
        **left_out_figures(metrics),
        **simulated_figures(metrics),
        "targets": [first_reached(metrics, each, count) for each in prepared.config.evaluation.targets],
        **prepared.figures(),
    }
    loss = loss_name(prepared.config.training, prepared.data)
    if (constant := constant_answer(prepared.data, loss)) is not None:
        summary["constant_answer"] = constant
    if prepared.config.normalises_targets:
        summary["normalised_targets"] = True
    return summary | {"advice": advice(summary, metrics, list(map(len, prepared.data.participants)))}


def participant_results(metrics: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """What came of each participant: in how many rounds its work counts, its last loss in training, and in all its
    seconds and bytes.
    """
    rows: list[dict[str, Any]] = [
        {"participant": who, "rounds": 0, "loss": None, "seconds": 0.0, "bytes_down": 0, "bytes_up": 0}
        for who in range(count)
    ]
    for line in metrics:
        if "each" not in line:  # an older version wrote it
            continue
        for place, who in enumerate(line["participants"]):
            row, did = rows[who], {name: values[place] for name, values in line["each"].items()}
            row["rounds"] += 1
            row["loss"] = did["loss"]
            for name in ("seconds", "bytes_down", "bytes_up"):
                row[name] += did[name]
    return rows


def left_out_figures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """In how many rounds which participant was left out, by its number, where anybody was."""
    rounds = [{each["participant"] for each in line.get("left_out", ())} for line in metrics]
    times = Counter(participant for round_ in rounds for participant in round_)
    return {"left_out": {str(each): times[each] for each in sorted(times)}} if times else {}


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a diverged perplexity is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
