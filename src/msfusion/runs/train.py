"""One run, from a configuration to a run directory; killed at any moment, it goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from msfusion.config import Config, load_config
from msfusion.engines.local import ParticipantResult, RoundResult, run_rounds
from msfusion.errors import RunDirectoryError
from msfusion.methods.adaptive import model_state
from msfusion.methods.small import SmallMethod
from msfusion.runs.directory import RunDirectory
from msfusion.runs.events import Events
from msfusion.runs.figures import Reached, run_figures
from msfusion.runs.setup import Parts, Setup, prepare
from msfusion.runs.simulated import arrivals, attendance_figures, simulated_figures
from msfusion.runs.targets import first_reached


@runtime_checkable
class Watcher(Protocol):
    """Who wants to know how a run goes on."""

    def started(self, setup: Setup, done: int) -> None:
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

    def started(self, setup: Setup, done: int) -> None:
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
) -> dict[str, Any]:
    """Train, leaving everything in the directory `path`, and return the summary.

    With `resume`, a run that is there is continued from its last checkpoint; a finished one is left as it
    is, and one that has not begun is begun. The result is the same as if it had never stopped:
    model.safetensors bit for bit. `parts` are data, model and width map where they are known already.

    Raises RunDirectoryError where the directory holds something else, or a run of another configuration, or
    cannot be written; and what loading, tracing and training raise. Checkpoints from before an error stay.
    """
    there = resume and (path / "config.toml").is_file()
    if there:
        directory = RunDirectory.reopen(path)
        refuse_change(directory, config)
        if directory.finished:
            return directory.read_summary()
    else:
        RunDirectory.check_free(path)
    setup = prepare(config, parts)
    if not there:
        directory = RunDirectory.create(path, config.to_toml())
    with directory.locked():
        return _run(setup, directory, watcher or Silent())


def refuse_change(directory: RunDirectory, config: Config) -> None:
    """Raises RunDirectoryError, naming a key, where the run in the directory has another configuration."""
    difference = load_config(directory.config).difference(config)
    if difference is not None:
        raise RunDirectoryError(
            f"{directory.path} is a run of another configuration, in which {difference}; "
            "resume it unchanged or choose another --out."
        )


def _run(setup: Setup, directory: RunDirectory, watcher: Watcher) -> dict[str, Any]:
    """The rounds that are still to be run, and the end."""
    config = setup.config
    fingerprint = config.fingerprint()
    checkpoint = directory.load_checkpoint(fingerprint)
    done = checkpoint.rounds if checkpoint else 0
    state: Mapping[str, Tensor] = checkpoint.state if checkpoint else setup.method.initial_state()
    earlier = directory.keep_metrics(done)
    reached = None if isinstance(setup.method, SmallMethod) else Reached(setup)
    for line in earlier:
        if reached is not None:
            reached.after(line["round"] - 1, line["participants"], line.get("overlap"), arrivals(line))
    watcher.started(setup, done)
    results = run_rounds(
        setup.method,
        setup.data.participants,
        setup.rounds,
        state=state,
        memories=checkpoint.memories if checkpoint else {},
        first_round=done,
        workers=config.run.workers,
        threads=config.run.threads,
        test=setup.data.test,
        conditions=setup.conditions,
        on_participant=watcher.participant,
    )
    with closing(results), Events(directory.path, earlier) as events:
        for result in results:
            overlap = setup.overlap(result.round_index, state)
            state = result.state
            line = metrics_line(result, reached, overlap)
            directory.add_metrics(line)
            if line["round"] % config.run.checkpoint_every == 0 or line["round"] == config.rounds:
                directory.save_checkpoint(line["round"], state, fingerprint, result.memories)
            events.add(line)
            watcher.round(line)
    summary = summarise(setup, directory.read_metrics())
    directory.finish(model_state(state), summary)
    return summary


def metrics_line(result: RoundResult, reached: Reached | None, overlap: float | None) -> dict[str, Any]:
    """One round in figures. `round` counts from 1, so it says how many rounds are done."""
    examples = sum(each.examples for each in result.participants)
    losses = sum(each.loss * each.examples for each in result.participants)
    line: dict[str, Any] = {
        "round": result.round_index + 1,
        "participants": [each.participant for each in result.participants],
        "training_loss": losses / examples if examples else None,
    }
    if result.evaluation is not None:
        line |= {"loss": result.evaluation.loss, "accuracy": result.evaluation.accuracy}
        if result.evaluation.perplexity is not None:
            line["perplexity"] = result.evaluation.perplexity
    if reached is not None:
        arriving = result.attendance.arriving
        line["entry_coverage"] = reached.after(result.round_index, line["participants"], overlap, arriving)
    if overlap is not None:
        line["overlap"] = overlap
    late_down, late_up = result.late_bytes
    line |= {
        "bytes_down": sum(each.bytes_down for each in result.participants) + late_down,
        "bytes_up": sum(each.bytes_up for each in result.participants) + late_up,
        "measuring_bytes": result.measuring_bytes,
        "seconds": round(result.seconds, 4),
        **attendance_figures(result.attendance),
    }
    return {key: _finite(value) for key, value in line.items()}


def summarise(setup: Setup, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The final figures of a run. `targets`: what it took to reach each accuracy that was asked for."""
    last, count = metrics[-1], setup.config.participants.count
    return {
        "method": setup.config.method.name,
        "seed": setup.config.seed,
        "rounds": len(metrics),
        "data": setup.data.description,
        **{key: last[key] for key in ("accuracy", "loss", "perplexity") if key in last},
        "training_loss": last["training_loss"],
        "entry_coverage": last.get("entry_coverage"),
        "seconds": round(sum(line["seconds"] for line in metrics), 3),
        **simulated_figures(metrics),
        "targets": [first_reached(metrics, each, count) for each in setup.config.evaluation.targets],
        **run_figures(setup),
    }


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a diverged perplexity is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
