"""Large models are compared on a short example: nothing may be found there that is not so, or missed that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msfusion.errors import UntraceableModelError
from msfusion.width import short
from msfusion.width.trace import trace

TOKENS = torch.randint(1, 30, (2, 24), generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    """One layer of attention over tokens; `mask` is 0 at tokens that nobody may look at."""

    def __init__(self, longest: int = 40) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(30, 16), nn.Embedding(longest, 16)
        self.queries, self.keys, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        scores = self.queries(x) @ self.keys(x).transpose(1, 2)
        return self.out(scores.masked_fill(mask[:, None] == 0, float("-inf")).softmax(-1) @ x)


class Doubled(torch.autograd.Function):
    """Passes values on, and twice their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class WrongGradient(Tagger):
    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return Doubled.apply(super().forward(tokens, mask))  # type: ignore[no-any-return,no-untyped-call]


class FirstEight(Tagger):
    """Reads eight tokens at most: Python decides it by the length, while tracing."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        length = min(int(tokens.shape[1]), 8)
        return super().forward(tokens[:, :length], mask[:, :length])


@pytest.fixture(autouse=True)
def every_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short, "_LARGE", 0)


def inputs(mask: Tensor | None = None) -> dict[str, Tensor]:
    return {"tokens": TOKENS, "mask": torch.ones_like(TOKENS) if mask is None else mask}


def test_free_axes_are_cut_together_and_the_map_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = trace(Tagger(), inputs())
    assert cut.program is not None
    assert [tuple(tensor.shape) for tensor in cut.program.short] == [(2, 4), (2, 4)]
    monkeypatch.setattr(short, "_LARGE", 2**24)
    whole = trace(Tagger(), inputs())
    assert whole.program is not None
    assert [tuple(tensor.shape) for tensor in whole.program.short] == [(2, 24), (2, 24)]
    assert [(g.name, g.units, g.places) for g in cut.groups] == [
        (g.name, g.units, g.places) for g in whole.groups
    ]


def test_an_example_that_begins_with_padding_is_cut_less() -> None:
    """The first four tokens of both texts are padding: attention over nothing is not a number."""
    mask = torch.ones_like(TOKENS)
    mask[:, :6] = 0
    program = trace(Tagger(), inputs(mask)).program
    assert program is not None
    assert [tuple(tensor.shape) for tensor in program.short] == [(2, 8), (2, 8)]


def test_a_gradient_of_the_users_own_is_found() -> None:
    with pytest.raises(UntraceableModelError, match="Doubled"):
        trace(WrongGradient(), inputs())


def test_what_happens_at_the_examples_own_length_is_not_cut_away() -> None:
    """Python has fixed the length of 24 by its `min`, so it stays; a sub-model of four tokens would be another."""
    program = trace(FirstEight(), inputs()).program
    assert program is not None
    assert [tuple(tensor.shape) for tensor in program.short] == [(2, 24), (2, 24)]
