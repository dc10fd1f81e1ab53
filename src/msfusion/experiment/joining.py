"""What a participant sees that takes part over a network."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console

from msfusion.experiment.watch import progress_over_rounds


class JoinWatcher:
    """What a participant sees: a bar in a terminal, a line a round elsewhere, or nothing."""

    def __init__(self, console: Console, participant: int, rounds: int, quiet: bool) -> None:
        self._console, self._rounds, self._quiet = console, rounds, quiet
        self._name = f"participant {participant}"
        self._progress = progress_over_rounds(console, disable=quiet or not console.is_terminal)
        self._task = self._progress.add_task(self._name, total=rounds, shown="")

    def __enter__(self) -> JoinWatcher:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """What happens to the connection."""
        if not self._quiet:
            self._console.print(f"{self._name}: {text}", soft_wrap=True, highlight=False, markup=False)

    def step(self, round_index: int, done: int, steps: int, loss: float) -> None:
        """A mini-batch is done."""
        if not self._progress.disable:
            title = f"{self._name} round {round_index + 1}/{self._rounds}"
            completed = round_index + done / steps
            self._progress.update(
                self._task, completed=completed, description=title, shown=f"loss {loss:.4f}"
            )
        elif done == steps:
            self.say(
                f"round {round_index + 1}/{self._rounds}: {steps} mini-batches, the last at loss {loss:.4f}"
            )
