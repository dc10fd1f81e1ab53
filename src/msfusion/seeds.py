"""Random numbers that begin at a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the numbers of torch (on the CPU), NumPy and Python begin at `seed`: weights that are drawn with any of
    them are the same in every process. Afterwards all three go on as if nothing had been drawn.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def seed_of(*path: int) -> int:
    """A seed drawn from several non-negative numbers; paths that differ have unrelated seeds."""
    return int(np.random.SeedSequence([len(path), *path]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def chance(*path: int) -> float:
    """A number above 0 and below 1, drawn evenly from a path as in `seed_of`."""
    return ((seed_of(*path) >> 11) + 0.5) / 2**52
