"""The suite about itself: what its speed rests on."""

from __future__ import annotations

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="the tests run in one process")
def test_tests_that_share_a_trace_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist writes the group behind a test's name; where it does not, it does not group either."""
    assert request.node.nodeid.endswith("@test_suite")
