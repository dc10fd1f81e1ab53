"""The suite about itself: what its speed rests on."""

from __future__ import annotations

import os

import jaxtyping
import pytest
import torch
from beartype import roar

from msfusion.averaging.exact_sums import _two_sum_
from msfusion.seeds import chance


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="the tests run in one process")
def test_tests_that_share_a_trace_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist writes the group behind a test's name; where it does not, it does not group either."""
    assert request.node.nodeid.endswith("@test_suite")


@pytest.mark.skipif(os.environ.get("MSFUSION_CHECK_TYPES") != "1", reason="types are not checked")
def test_types_and_shapes_are_checked_at_every_call() -> None:
    """Of a function that says something of shapes, and of one that does not."""
    with pytest.raises(jaxtyping.TypeCheckError):
        _two_sum_(torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(roar.BeartypeCallHintParamViolation):
        chance(0.5)
