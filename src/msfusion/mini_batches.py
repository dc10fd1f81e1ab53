"""How many mini-batches an epoch has, and of what sizes: the one place that knows. Needs no PyTorch."""

from __future__ import annotations


def epoch_sizes(examples: int, batch_size: int) -> tuple[int, int]:
    """How many full mini-batches an epoch has, and the size of the last, shorter one (0: there is none).

    A last mini-batch of a single example is left out where there are others: BatchNorm cannot normalise it.
    """
    full, rest = divmod(examples, batch_size)
    return full, rest if rest > 1 or rest == examples else 0
