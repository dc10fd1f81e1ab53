"""Llama grown by copies, against the model written out in float64 (its norms compute in float32 whatever its dtype).

Grouped queries are what is special: target heads that read one key-value head must be copies of heads that read one.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from growth_families import (
    GROUPED,
    GROUPED_LARGE,
    GROUPED_ODD,
    Size,
    call,
    llama,
    planned,
    tied_llama,
    traced,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msfusion.errors import GrowthError
from msfusion.growth import LiGO, Space, Start, copying, fill, preserving
from msfusion.growth.starts import copied_from

pytestmark = pytest.mark.slow


def heads(queries: int, keys: int) -> Size:
    """Nothing but the heads differs."""
    return Size(24, queries, 1, 40, keys)


TOKENS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(3))
FEWER_QUERIES = [
    (GROUPED, heads(4, 4)),  # the same queries, a key for each
    (GROUPED, heads(8, 8)),
    (heads(4, 1), GROUPED),  # a single key-value head
    (heads(6, 2), heads(8, 4)),  # three queries for each key over two heads of two
]


def logits_by_hand(state: dict[str, Tensor], size: Size) -> Tensor:
    """RMSNorm, rotary positions, grouped queries and a gated feed-forward layer, in float64."""
    weights = {name: tensor.double() for name, tensor in state.items()}
    features, time = size.head or 8, TOKENS.shape[1]
    frequencies = 10000.0 ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
    angles = torch.outer(torch.arange(time, dtype=torch.float64), frequencies).repeat(1, 2)
    future = torch.full((time, time), -math.inf, dtype=torch.float64).triu(1)

    def normalised(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def projected(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    x = weights["model.embed_tokens.weight"][TOKENS]
    for block in (f"model.layers.{layer}." for layer in range(size.layers)):
        read = normalised(x, block + "input_layernorm")
        q, k, v = (
            projected(read, f"{block}self_attn.{name}_proj").unflatten(-1, (-1, features)).transpose(1, 2)
            for name in "qkv"
        )
        k, v = (each.repeat_interleave(size.heads // size.groups, 1) for each in (rotated(k), v))
        attention = (rotated(q) @ k.mT / math.sqrt(features) + future).softmax(-1)
        x = x + projected((attention @ v).transpose(1, 2).flatten(2), block + "self_attn.o_proj")
        read = normalised(x, block + "post_attention_layernorm")
        gate = torch.nn.functional.silu(projected(read, block + "mlp.gate_proj"))
        x = x + projected(gate * projected(read, block + "mlp.up_proj"), block + "mlp.down_proj")
    return projected(normalised(x, "model.norm"), "lm_head")


def in_double(source: Size, tied: bool = False) -> dict[str, Tensor]:
    model = traced(tied_llama if tied else llama, source)[0]
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("small", "large", "rule"),
    [
        (GROUPED, GROUPED_LARGE, "tile"),  # more queries for each key
        pytest.param(GROUPED, GROUPED_ODD, "zero", marks=pytest.mark.release),  # more key-value heads; tied
        *(pytest.param(*sizes, "tile", marks=pytest.mark.release) for sizes in FEWER_QUERIES),
    ],
)
def test_function_preserving_growth_of_llama(small: Size, large: Size, rule: str) -> None:
    family = tied_llama if rule == "zero" else llama
    (source, source_map), (target, target_map) = traced(family, small), traced(family, large)
    operator = preserving(planned(family, small, large), source_map, target_map, source.state_dict())
    assert operator.stream == rule
    state = in_double(small, rule == "zero")
    grown, expected = operator.materialise(state), logits_by_hand(state, small)
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(logits_by_hand(grown, large), expected, rtol=1e-9, atol=1e-9)
    model = fill(copy.deepcopy(target), grown)
    torch.testing.assert_close(call(model, {"input_ids": TOKENS}).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.release
@pytest.mark.parametrize(("small", "large"), FEWER_QUERIES)
def test_stacking_and_ligo_start_exact_too(small: Size, large: Size) -> None:
    source, source_map = traced(llama, small)
    plan, state = planned(llama, small, large), in_double(small)
    stacked = copying(plan, source_map, traced(llama, large)[1], source.state_dict(), "stack")
    for operator in (stacked, LiGO(plan, Start(noise=0.0), tied=large.heads == small.heads)):
        grown = {name: tensor.detach() for name, tensor in operator.materialise(state).items()}
        torch.testing.assert_close(
            logits_by_hand(grown, large), logits_by_hand(state, small), rtol=1e-9, atol=1e-9
        )


@pytest.mark.release
def test_too_few_key_value_heads_are_refused_with_the_sizes_that_could_be() -> None:
    """Three queries for each of two keys do not fit into three heads of two: one would have to lose a query."""
    small, large = heads(6, 2), heads(6, 3)
    (source, source_map), target_map = traced(llama, small), traced(llama, large)[1]
    sizes = "give the target 3 query heads for each key-value head, or 2 and at least 4 key-value heads"
    with pytest.raises(GrowthError, match=sizes):
        preserving(planned(llama, small, large), source_map, target_map, source.state_dict())


numbers = st.integers(1, 4)


@given(numbers, numbers, numbers, st.integers(0, 3))
def test_copies_of_queries_meet_copies_of_their_key(keys: int, queries: int, served: int, more: int) -> None:
    """Every query occurs, and a head is a copy of one that reads what its key-value head is a copy of."""
    split = math.ceil(queries / served)
    grown = keys * split + more
    query = copied_from(Space("q", (keys, queries, 2), (grown, served, 2), split=split)).view(
        grown, served, 2
    )
    key = copied_from(Space("k", (keys, 2), (grown, 2), split=split)).view(grown, 2)
    assert query.flatten().unique().tolist() == list(range(keys * queries * 2))
    assert torch.equal((query // 2 // queries)[..., 0], (key // 2)[:, :1].expand(-1, served))
    assert torch.equal(query % 2, torch.arange(2).expand_as(query))
    assert torch.equal(key % 2, torch.arange(2).expand_as(key))
