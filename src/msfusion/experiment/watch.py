"""What a user sees while a run goes on: a progress bar in a terminal, a line a round elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from msfusion.experiment.prepared import Prepared
from msfusion.experiment.report.words import duration, left_out_lines, quality
from msfusion.federated.participation import Calendar
from msfusion.federated.results import ParticipantResult
from msfusion.scoring import loss_told


class Bar:
    """A progress bar over rounds, with how good the model is."""

    def __init__(self, console: Console, title: str = "") -> None:
        self._title = title
        self._progress = progress_over_rounds(console)
        self._task: TaskID | None = None
        self._rounds = 1
        self._done = 0
        self._calendar: Calendar | None = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """What was lost, above the bar."""
        self._print(text)

    def started(self, prepared: Prepared, done: int) -> None:
        """Show an empty bar, or one as full as the run was when it stopped."""
        self._rounds = prepared.config.rounds
        self._calendar, self._done = prepared.calendar, done
        if self._task is not None:
            self._progress.remove_task(self._task)
        for remark in prepared.remarks:
            self._print(remark)
        title = f"{self._title} round {done}/{self._rounds}".strip()
        self._task = self._progress.add_task(title, total=self._rounds, completed=done, shown="")

    def participant(self, result: ParticipantResult) -> None:
        """A participant's share of a round is done."""
        if self._task is not None and self._calendar is not None:
            present = self._calendar.round(self._done)
            if result.participant in present.on_time:
                self._progress.advance(self._task, 1 / len(present.on_time))

    def round(self, line: Mapping[str, Any]) -> None:
        """A round is done."""
        if self._task is None:
            return
        self._done = line["round"]
        title = f"{self._title} round {line['round']}/{self._rounds}".strip()
        self._progress.update(self._task, completed=line["round"], description=title)
        for sentence in left_out_lines(line):
            self._print(sentence)
        if "loss" in line:
            self._progress.update(self._task, shown=quality(line))

    def _print(self, text: str) -> None:
        line = f"{self._title} {text}".strip()
        self._progress.console.print(line, soft_wrap=True, highlight=False, markup=False)


class Lines:
    """A plain line a round, for logs and pipes."""

    def __init__(self, console: Console, title: str = "") -> None:
        self._console = console
        self._title = title
        self._rounds = 1

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""

    def note(self, text: str) -> None:
        """Say what was lost."""
        self._say(text)

    def started(self, prepared: Prepared, done: int) -> None:
        """Say what is trained."""
        self._rounds = prepared.config.rounds
        method = prepared.config.method.name
        text = f"{method} on {prepared.data.description}"
        self._say(f"{text}, continued after round {done}" if done else text)
        for remark in prepared.remarks:
            self._say(remark)

    def participant(self, result: ParticipantResult) -> None:
        """Too much for a log."""

    def round(self, line: Mapping[str, Any]) -> None:
        """Say how good the model is after the round."""
        loss = line["training_loss"]
        nobody = (
            "nobody's update counts, the model stays" if "left_out" in line else "nobody was there in time"
        )
        told = nobody if loss is None else f"training loss {loss_told(loss)}"
        told = quality(line) if "loss" in line else told
        if "loss" in line and loss is None and "left_out" in line:
            told = f"{nobody}, {told}"
        for sentence in left_out_lines(line):
            self._say(sentence)
        clock = f", {duration(line['simulated_seconds'])} simulated" if "simulated_seconds" in line else ""
        self._say(f"round {line['round']}/{self._rounds}: {told} ({line['seconds']:.2f} s{clock})")

    def _say(self, text: str) -> None:
        self._console.print(f"{self._title} {text}".strip(), soft_wrap=True, highlight=False, markup=False)


def progress_over_rounds(console: Console, *, disable: bool = False) -> Progress:
    """A bar that goes away when it is done; its tasks have a field `shown`."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=disable,
    )


def watcher(console: Console, title: str = "") -> Bar | Lines:
    """A bar where there is a terminal, else lines. Use it in a `with` statement."""
    return Bar(console, title) if console.is_terminal else Lines(console, title)
