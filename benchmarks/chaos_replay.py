"""One process in place of a network in which some were left out of some rounds: the same are left out here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from chaos_hostile import echo

from msfusion.errors import TrainingError
from msfusion.federated.engine import Answer, Ask, InProcess, answer_to
from msfusion.federated.method import Kind, Method, Task

MEASURED = "what it measured is not used"


class Replayed(InProcess):
    """Of a run's lines of metrics: whoever is not in a round's line, or is left out of its measuring, fails here.

    Those in `hostile` answer with what they were sent.
    """

    def __init__(self, lines: Sequence[dict[str, Any]], hostile: frozenset[int]) -> None:
        super().__init__()
        self._hostile = hostile
        self._there = [frozenset(line["participants"]) for line in lines]
        self._unmeasured = [
            frozenset(
                each["participant"]
                for each in line.get("left_out", ())
                if each["reason"].startswith(MEASURED)
            )
            for line in lines
        ]

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """As `InProcess` does it, but for these."""
        for ask in asks:
            for task in ask.tasks():
                if not self._counts(ask.kind, task):
                    yield answer_to(task, TrainingError("it was left out"), 0.0)
                elif task.participant in self._hostile:
                    yield answer_to(task, echo(method, task, len(self._data[task.participant])), 0.0)
                else:
                    yield from super().run(method, [Ask(ask.kind, lambda task=task: [task])])

    def _counts(self, kind: Kind, task: Task) -> bool:
        if kind == "measure":
            return task.participant not in self._unmeasured[task.round_index]
        return task.participant in self._there[task.round_index]
