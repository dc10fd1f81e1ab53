"""What happens beside the rounds of a `Federation`: told, written down, kept, or stopped early.

A logger of one's own is ten lines:

    class Tracker(msfusion.Callback):
        def begin(self, federation):
            self.run = wandb.init(project="digits")              # or mlflow.start_run()
        def round(self, federation, result):
            self.run.log(result.figures(), step=result.number)   # or mlflow.log_metrics(...)
        def end(self, federation):
            self.run.finish()
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from msfusion.errors import ConfigError
from msfusion.federated.results import ParticipantResult, RoundResult

if TYPE_CHECKING:
    from msfusion.federation import Federation

LOWER_IS_BETTER = ("loss", "perplexity", "training_loss")


class Callback:
    """Called by a `Federation`; a callback has whichever of these it needs. An error that one raises ends the run."""

    def begin(self, federation: Federation) -> None:
        """Rounds are about to be run."""

    def participant(self, federation: Federation, result: ParticipantResult) -> None:
        """A participant has finished its part of a round, in no particular order."""

    def round(self, federation: Federation, result: RoundResult) -> bool | None:
        """A round has ended, and the federation is in its state. True ends the run here."""
        return None

    def end(self, federation: Federation) -> None:
        """No more rounds are run: they are done, or something ended them."""


class Printed(Callback):
    """A line for each round on standard output, and before the first what was decided that the settings left open."""

    def begin(self, federation: Federation) -> None:
        """Print that."""
        for remark in federation.remarks:
            print(f"{federation.method.name} trains {remark}", flush=True)

    def round(self, federation: Federation, result: RoundResult) -> None:
        """Print it."""
        told = [f"{name} {_shown(value)}" for name, value in result.figures().items() if name in _TOLD]
        known = [f"{name} {value:.4g}" for name, value in result.own_figures().items()]
        print(f"round {result.number}/{federation.planned}: " + ", ".join([*told, *known]), flush=True)


_TOLD = ("training_loss", "loss", "accuracy", "perplexity")


def _shown(value: float) -> str:
    return f"{value:.4f}"


class CSVFile(Callback):
    """The figures of each round as a line of a CSV file, which a run that goes on continues.

    Figures that are not there in the first round, such as those of rounds with an evaluation, have columns where the
    method or the scoring is known to tell them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def begin(self, federation: Federation) -> None:
        """Open the file; of an earlier run the rounds that are done stay."""
        self._columns = ["round", *_FIGURES, *federation.figure_names]
        kept: list[dict[str, str]] = []
        if federation.done and self.path.exists():
            with self.path.open(newline="") as before:
                kept = [row for row in csv.DictReader(before) if int(row["round"]) <= federation.done]
        self._file = self.path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, self._columns, restval="", extrasaction="ignore")
        self._writer.writeheader()
        self._writer.writerows(kept)

    def round(self, federation: Federation, result: RoundResult) -> None:
        """Write its line."""
        assert self._file is not None
        self._writer.writerow({"round": result.number, **result.figures()})
        self._file.flush()

    def end(self, federation: Federation) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


_FIGURES = ("training_loss", "loss", "accuracy", "perplexity", "bytes_down", "bytes_up", "seconds")


class TensorBoard(Callback):
    """The figures of each round as TensorBoard events in a directory. Raises ConfigError where it is not installed."""

    def __init__(self, path: str | Path) -> None:
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                "TensorBoard is not installed: run pip install 'msfusion[tensorboard]'"
            ) from error
        self._make, self._path = EventFileWriter, Path(path)
        self._writer: Any = None

    def begin(self, federation: Federation) -> None:
        """Open the directory."""
        self._writer = self._make(str(self._path))

    def round(self, federation: Federation, result: RoundResult) -> None:
        """Write its figures."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in result.figures().items()]
        self._writer.add_event(Event(step=result.number, summary=Summary(value=values)))

    def end(self, federation: Federation) -> None:
        """Close it."""
        if self._writer is not None:
            self._writer.close()


class _Watching(Callback):
    """What goes by the best value of a figure so far, in the rounds that have it."""

    def __init__(self, figure: str, mode: Literal["min", "max"] | None) -> None:
        if mode not in (None, "min", "max"):
            raise ConfigError(f"mode is {mode!r}: it must be 'min' or 'max'")
        self.figure = figure
        self._sign = -1.0 if (mode or ("min" if figure in LOWER_IS_BETTER else "max")) == "min" else 1.0
        self.best = -math.inf

    def begin(self, federation: Federation) -> None:
        """Raises ConfigError where no round will have the figure."""
        known = [*_FIGURES, *federation.figure_names]
        if self.figure not in known:
            raise ConfigError(f"there is no figure {self.figure!r}: choose one of {', '.join(known)}")

    def improved(self, result: RoundResult) -> bool | None:
        """Whether a round is the best so far; None where it does not have the figure."""
        value = result.figures().get(self.figure)
        if value is None:
            return None
        better = self._sign * value > self.best
        self.best = max(self.best, self._sign * value) if not math.isnan(value) else self.best
        return better


class Checkpoints(_Watching):
    """The federation in `directory/last` after every `every` rounds and at the end, and its best in `directory/best`.

    `figure` says what is best: loss and perplexity where they are least, others where they are largest, or as `mode`
    ("min" or "max") says.
    """

    def __init__(
        self,
        directory: str | Path,
        every: int = 1,
        figure: str = "loss",
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        super().__init__(figure, mode)
        self.directory, self.every = Path(directory), every

    def round(self, federation: Federation, result: RoundResult) -> None:
        """Save what is due."""
        if result.number % self.every == 0:
            federation.save(self.directory / "last")
        if self.improved(result):
            federation.save(self.directory / "best")

    def end(self, federation: Federation) -> None:
        """Save the last state, whatever ended the run."""
        if federation.done:
            federation.save(self.directory / "last")


class EarlyStopping(_Watching):
    """The end of a run when a figure has not improved in so many evaluations after its best one."""

    def __init__(
        self, figure: str = "loss", patience: int = 5, mode: Literal["min", "max"] | None = None
    ) -> None:
        super().__init__(figure, mode)
        self.patience, self._waited = patience, 0

    def round(self, federation: Federation, result: RoundResult) -> bool:
        """Whether to stop."""
        better = self.improved(result)
        if better is not None:
            self._waited = 0 if better else self._waited + 1
        return self._waited >= self.patience
