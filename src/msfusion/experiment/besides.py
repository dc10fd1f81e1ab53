"""What a sum of blocks takes of a participant beside the training of its own, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from msfusion.costs import Costs


@dataclass(frozen=True)
class Block:
    """A block that a participant does not train: the bytes of its tensors on their way and in memory, and the FLOPs of
    a forward pass over an example.
    """

    sent: int
    held: int
    flops: int


@dataclass(frozen=True)
class Besides:
    """Blocks that a participant is `sent` in a round besides those that it trains, and what it remembers of others.

    That is the bytes of their `logits`, whatever a block's width; or the blocks themselves, so many of which are `kept`
    and so many `run` in each step.
    """

    sent: int = 0
    logits: int = 0
    kept: int = 0
    run: int = 0

    def or_more(self, other: Besides) -> Besides:
        """Of each the most."""
        return Besides(
            **{each.name: max(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        )

    def remembered(self, block: Block) -> int:
        """In bytes."""
        return self.logits + self.kept * block.held

    def added_to(self, training: Costs, block: Block) -> Costs:
        """The costs of training with these; what is sent counts as bytes down."""
        return replace(
            training,
            bytes_down=training.bytes_down + self.sent * block.sent,
            flops_per_example=training.flops_per_example + self.run * block.flops,
            peak_memory=training.peak_memory + self.remembered(block),
        )
