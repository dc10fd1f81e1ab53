"""What Python decides while a model runs, and what it keeps between calls, is refused."""

from __future__ import annotations

import itertools
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from narrowed import Net, X
from torch import Tensor

from msfusion.errors import UntraceableModelError
from msfusion.width.trace import trace


class Coin(Net):
    def __init__(self, toss: Any) -> None:
        super().__init__()
        self.toss = toss

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if not self.training or self.toss() < 0.5:
            h = h + torch.relu(self.b(h))
        return self.o(h)


@pytest.mark.parametrize(
    ("toss", "word"),
    [(random.random, "Python"), (lambda: float(np.random.rand()), "numpy")],
    ids=["random", "numpy"],
)
def test_random_numbers_of_python_are_refused(toss: Any, word: str) -> None:
    with pytest.raises(UntraceableModelError, match=word):
        trace(Coin(toss), (X,))


class Counts(Net):
    """Counts its calls; `every` says after how many the answer changes, 0 that it never does."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.calls, self.every = 0, every

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + (self.calls // self.every if self.every else 0))


@pytest.mark.parametrize("every", [1, 500])
def test_a_counter_that_decides_is_refused(every: int) -> None:
    with pytest.raises(UntraceableModelError, match="calls"):
        trace(Counts(every), (X,))


class Keeps(Net):
    """Keeps something between its calls where no attribute of a module is a number."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.counts = {"calls": 0}
        self.history: list[float] = []
        self.recent: deque[float] = deque(maxlen=50)
        self.helper = SimpleNamespace(calls=0)
        self.left = 700
        self.number = np.int64(0)
        self.numbers = itertools.count()
        self.chance = np.random.default_rng(0)
        self.python_chance = random.Random(0)
        self.steps = torch.zeros(())
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.late(x) else 1)

    def late(self, x: Tensor) -> bool:
        method: Any = getattr(self, self.what.replace(" ", "_"))
        return bool(method(x))

    def dict(self, x: Tensor) -> bool:
        self.counts["calls"] += 1
        return self.counts["calls"] > 500

    def list(self, x: Tensor) -> bool:
        self.history.append(0.0)
        return len(self.history) > 500

    def deque(self, x: Tensor) -> bool:
        self.recent.append(0.0)
        return len(self.recent) == 50

    def object(self, x: Tensor) -> bool:
        self.helper.calls += 1
        return bool(self.helper.calls > 500)

    def down(self, x: Tensor) -> bool:
        self.left -= 1
        return self.left < 0

    def between(self, x: Tensor) -> bool:
        self.left += 1
        return 710 < self.left < 720

    def numpy(self, x: Tensor) -> bool:
        self.number = self.number + np.int64(1)
        return bool(self.number == 1000)

    def module(self, x: Tensor) -> bool:
        COUNTED["calls"] += 1
        return COUNTED["calls"] > 500

    def iterator(self, x: Tensor) -> bool:
        return next(self.numbers) > 500

    def own_generator(self, x: Tensor) -> bool:
        return bool(self.chance.random() < 1e-6)

    def own_generator_of_Python(self, x: Tensor) -> bool:
        return self.python_chance.random() < 1e-6

    def not_read(self, x: Tensor) -> bool:
        self.history.append(0.0)
        self.counts["calls"] += 1
        self.helper.calls += 1
        self.last = x
        return False


COUNTED = {"calls": 0}


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("dict", "counts"), ("list", "history"), ("deque", "recent"), ("object", "helper.calls"), ("down", "left"),
        ("numpy", "number"), ("between", "left"), ("module", "COUNTED"), ("iterator", "numbers"),
        ("own generator", "chance"),
        pytest.param("own generator of Python", "python_chance", marks=pytest.mark.without_type_checks),
    ],
)  # fmt: skip
def test_what_python_keeps_between_calls_is_refused_where_the_model_goes_by_it(what: str, word: str) -> None:
    with pytest.raises(UntraceableModelError, match=word):
        trace(Keeps(what), (X,))
    assert COUNTED["calls"] < 500


def test_what_python_keeps_and_nobody_reads_is_left_as_it_was() -> None:
    model = Keeps("not read")
    trace(model, (X,))
    assert (model.history, model.counts, model.helper.calls, model.last) == ([], {"calls": 0}, 0, None)


def test_a_counter_that_nobody_reads_is_none_of_our_business() -> None:
    model = Counts(0)
    trace(model, (X,))
    assert model.calls == 0
