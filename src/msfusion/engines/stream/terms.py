"""What streams must know of a contract. Numbers and words only: the process of the streams needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from msfusion.engines.grpc.packing import Agreement
from msfusion.errors import StreamError
from msfusion.mini_batches import epoch_sizes


@dataclass(frozen=True)
class Terms:
    """How many come, for how many rounds of how many steps, the largest frames, and what must be agreed on.

    `max_examples` is the most examples that a participant may say it has: a round lasts as long as it says.
    """

    participants: int
    rounds: int
    batch_size: int
    local_epochs: int
    max_steps: int | None
    largest_up: int
    largest_down: int
    agreement: Agreement
    max_examples: int | None = None

    def steps(self, examples: int) -> int:
        """The mini-batches of a round, of a participant with so many examples: as many as `batch_sizes` lists."""
        steps = self._in_epoch(examples) * self.local_epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def examples_of(self, examples: int, step: int) -> int:
        """The examples in one of them."""
        return min(self.batch_size, examples - step % self._in_epoch(examples) * self.batch_size)

    def check_examples(self, participant: int, examples: int) -> None:
        """Raises StreamError for a participant without examples, or with more than are allowed."""
        if not self.steps(examples):
            raise StreamError("a participant needs examples", "FAILED_PRECONDITION")
        if self.max_examples is not None and examples > self.max_examples:
            raise StreamError(
                f"participant {participant} says that it has {examples} examples, more than the {self.max_examples} "
                "that this server allows (participants.max_examples)",
                "FAILED_PRECONDITION",
            )

    def _in_epoch(self, examples: int) -> int:
        full, last = epoch_sizes(examples, self.batch_size)
        return full + (last > 0)
