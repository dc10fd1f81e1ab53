"""Random numbers that begin at a seed, and what each draw of a run is for.

A draw begins at a seed of a path of numbers: the run's seed, what it is about (a round, a participant, a step), and,
where several draws are about the same, which of them it is. All the paths of a run:

    (seed, round)                              who is asked in a round
    (seed, participant)                        the weights of its own small model, before any training
    (seed, round, participant)                 its local training: the order of its examples, dropout
    (seed, round, participant, OfRound)        what else it draws in a round
    (seed, round, participant, step)           split learning: a mini-batch; (that, OfSide) dropout on one side of it
    (seed, participant, quantity, MACHINE, 0)  a quantity of its machine (`network.MachineKind`)
    (seed, participant, OfGrowth)              its private stages; (seed, participant, FITTING, fit.seed) one of them

Results depend on these numbers, so none of them ever changes, and a new draw takes a number that is free. Some paths of
different meaning are equal (round 3 and participant 3); each begins a generator of its own, for draws of another kind.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class OfRound(IntEnum):
    """What a participant draws in a round beside its local training."""

    MEASURING = 1
    """The order of its examples while the statistics of BatchNorm are measured."""

    ABSENCE = 2
    """Whether it is absent."""

    CAPACITY = 3
    """Its width ratio, where that changes from round to round."""

    MACHINE = 4
    """A quantity of its machine; of no round, but no other of these draws takes the number."""


class OfGrowth(IntEnum):
    """What a participant draws once, for its private stages of growing together."""

    PRETRAINING = 1
    """The training of its small model."""

    OPERATOR = 2
    """Where its own growth operator starts."""

    FITTING = 3
    """The training of that operator."""


class OfSide(IntEnum):
    """On which side of a cut model dropout is drawn for a mini-batch."""

    PARTICIPANT = 0
    SERVER = 1


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
