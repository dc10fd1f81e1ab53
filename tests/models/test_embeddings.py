"""Embeddings that are too small for the tokens are refused before training; sparse ones train as dense ones do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import msfusion
from msfusion.batch import Batch
from msfusion.errors import DataError
from msfusion.objectives import cross_entropy, gradient_step, require_embeddings

TOKENS, LABELS = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class Classifier(nn.Module):
    """Tokens and positions are embedded; the tokens in a table of `rows`."""

    def __init__(self, rows: int, *, sparse: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(rows, 8, sparse=sparse)
        self.places = nn.Embedding(4, 8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        embedded = self.tokens(input_ids) + self.places(places)
        return self.head(torch.relu(self.hidden(embedded.mean(1))))


@pytest.mark.parametrize("named", [True, False])
def test_fewer_rows_than_tokens_are_refused_by_name(named: bool) -> None:
    batch = Batch({"input_ids": TOKENS} if named else (TOKENS,), LABELS)
    model = Classifier(9)
    require_embeddings(model, batch, 9)  # positions have fewer rows, and need no more
    assert model.training
    with pytest.raises(
        DataError, match="the model's tokens has 9 rows, and the vocabulary of the data 10 tokens"
    ):
        require_embeddings(model, batch, 10)  # though the largest of these tokens is 4
    with pytest.raises(DataError, match="the model's tokens has 3 rows"):
        require_embeddings(Classifier(3), batch, 10)
    require_embeddings(model, batch, None)


Optimizers = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.1),
}


@pytest.mark.one_in_ci
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_sparse_embedding_trains_bit_by_bit_as_a_dense_one(optimizer: str, clip_norm: float | None) -> None:
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = Classifier(20, sparse=sparse)
        width_map = msfusion.trace(model, (TOKENS,))
        window = {group.name: torch.arange(group.units // 2) for group in width_map.groups}
        sub_model = msfusion.narrow(model, width_map, window)
        assert sub_model(TOKENS).shape == (6, 3)
        making = OPTIMIZERS[optimizer](sub_model)
        for _ in range(3):
            gradient_step(sub_model, Batch((TOKENS,), LABELS), making, clip_norm, cross_entropy)
        ends.append(sub_model.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
