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
import io
import math
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from msfusion.errors import ConfigError, RunDirectoryError
from msfusion.federated.results import ParticipantResult, RoundResult
from msfusion.files import refusing_write_errors, write_text
from msfusion.scoring import FIGURES, SCORES, loss_told, number_told
from msfusion.tensorboard import EventWriter, require_tensorboard

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
        told = [f"{name} {loss_told(value)}" for name, value in result.figures().items() if name in _TOLD]
        known = [f"{name} {number_told(value)}" for name, value in result.own_figures().items()]
        print(f"round {result.number}/{federation.planned}: " + ", ".join([*told, *known]), flush=True)


_TOLD = ("training_loss", *SCORES)


class CSVFile(Callback):
    """The figures of each round as a line of a CSV file, which a run that goes on continues.

    Figures that are not there in the first round, such as those of rounds with an evaluation, have columns where the
    method or the scoring is known to tell them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def begin(self, federation: Federation) -> None:
        """Open the file; of an earlier run the rounds that are done stay, with all their columns.

        Raises RunDirectoryError where it cannot be written, or holds something else.
        """
        columns = dict.fromkeys(["round", *FIGURES, *federation.figure_names])
        kept: list[dict[str, str]] = []
        with refusing_write_errors(self.path):
            if federation.done and self.path.exists():
                with self.path.open(newline="") as before:
                    rows = list(csv.DictReader(before))
                if any(not (row.get("round") or "").isdigit() for row in rows):
                    raise RunDirectoryError(f"{self.path} holds no figures of rounds: choose another file.")
                kept = [row for row in rows if int(row["round"]) <= federation.done]
                columns |= dict.fromkeys(name for row in kept for name in row)
            text = io.StringIO()
            writer = csv.DictWriter(text, list(columns), restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
            write_text(self.path, text.getvalue())  # whole or not at all
            self._file = self.path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, list(columns), restval="", extrasaction="ignore")

    def round(self, federation: Federation, result: RoundResult) -> None:
        """Write its line."""
        assert self._file is not None
        self._writer.writerow({"round": result.number, **result.figures()})
        self._file.flush()

    def end(self, federation: Federation) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class TensorBoard(Callback):
    """The figures of each round as TensorBoard events in a directory. Raises ConfigError where it is not installed."""

    def __init__(self, path: str | Path) -> None:
        require_tensorboard()
        self._path = Path(path)
        self._writer: EventWriter | None = None

    def begin(self, federation: Federation) -> None:
        """Open the directory."""
        self._writer = EventWriter(self._path)

    def round(self, federation: Federation, result: RoundResult) -> None:
        """Write its figures."""
        assert self._writer is not None
        self._writer.add(result.number, result.figures())

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
        self.best, self.waited = -math.inf, 0

    def begin(self, federation: Federation) -> None:
        """Look at the rounds that are done. Raises ConfigError where no round will have the figure."""
        evaluated = (*SCORES, *federation.scoring.metrics)
        missing = {
            "accuracy": not federation.scoring.labels,
            "perplexity": not federation.scoring.language_modelling,
        }
        known = [
            name
            for name in (*FIGURES, *federation.figure_names)
            if not missing.get(name) and (federation.test is not None or name not in evaluated)
        ]
        if self.figure not in known:
            raise ConfigError(f"there is no figure {self.figure!r} here: choose one of {', '.join(known)}")
        self.best, self.waited = -math.inf, 0
        for line in federation.figures:
            self.notes(line.get(self.figure))

    def notes(self, value: float | None) -> bool:
        """Take in a round's value (None: it has none); whether it is the best so far."""
        if value is None:
            return False
        better = self._sign * value > self.best
        self.best = max(self.best, self._sign * value) if not math.isnan(value) else self.best
        self.waited = 0 if better else self.waited + 1
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
        if every < 1:
            raise ConfigError(f"every is {every}: it must be at least 1")
        self.directory, self.every = Path(directory), every

    def round(self, federation: Federation, result: RoundResult) -> None:
        """Save what is due."""
        if result.number % self.every == 0:
            federation.save(self.directory / "last")
        if self.notes(result.figures().get(self.figure)):
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
        if patience < 1:
            raise ConfigError(f"patience is {patience}: it must be at least 1")
        self.patience = patience

    def begin(self, federation: Federation) -> None:
        """Look at the rounds that are done; who goes on after it has stopped has as much patience again."""
        super().begin(federation)
        if self.waited >= self.patience:
            self.waited = 0

    def round(self, federation: Federation, result: RoundResult) -> bool:
        """Whether to stop."""
        self.notes(result.figures().get(self.figure))
        return self.waited >= self.patience
