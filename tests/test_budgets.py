"""The widest sub-model that keeps within a budget, against trying all ratios."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from msfusion.batch import Batch
from msfusion.budgets import Budget, largest_ratio
from msfusion.costs import Costs, costs_of
from msfusion.errors import ConfigError
from msfusion.width.groups import WidthMap
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace
from msfusion.windows import static

DATA = Batch((torch.zeros(4, 6),), torch.zeros(4, dtype=torch.long))


@cache
def model_and_map() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    return model, trace(model, (torch.randn(2, 6),))


def costs(module: nn.Module) -> Costs:
    return costs_of(module, DATA)


@cache
def at(ratio: float) -> Costs:
    model, width_map = model_and_map()
    if ratio == 1.0:
        return costs(model)
    return costs(narrow(model, width_map, static(width_map, 0, 0, ratio, participants=1)))


RATIOS = sorted({units / size for size in (8, 12) for units in range(1, size + 1)})


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.parametrize("limit", ["memory", "flops_per_example", "bytes_per_round"])
def test_it_is_the_largest_of_all_that_fit(limit: str) -> None:
    model, width_map = model_and_map()

    def need(ratio: float) -> int:
        found = at(ratio)
        return (
            found.bytes_down + found.bytes_up
            if limit == "bytes_per_round"
            else getattr(found, "peak_memory" if limit == "memory" else limit)
        )

    for target in (need(ratio) for ratio in RATIOS[::3]):
        for given in (target, target + 1):
            budget = Budget(**{limit: float(given) if limit == "flops_per_example" else given})
            expected = max(ratio for ratio in RATIOS if need(ratio) <= given)
            assert largest_ratio(model, width_map, budget, costs) == expected


def test_no_limit_is_the_whole_model_and_all_limits_count() -> None:
    model, width_map = model_and_map()
    assert largest_ratio(model, width_map, Budget(), costs) == 1.0
    half = at(0.5)
    both = Budget(memory=10**9, flops_per_example=float(half.flops_per_example))
    assert largest_ratio(model, width_map, both, costs) == pytest.approx(0.5, abs=0.1)


def test_too_small_a_budget_is_refused_with_both_figures() -> None:
    model, width_map = model_and_map()
    smallest = at(1 / 12)
    with pytest.raises(ConfigError, match=f"memory is 10 but {smallest.peak_memory:,} are needed"):
        largest_ratio(model, width_map, Budget(memory=10), costs)
