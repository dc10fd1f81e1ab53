"""Figures for people."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from msfusion.experiment.report.table import closing_table, count, coverage_line, percent, quality, size


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1 k"),
        (1234, "1.23 k"),
        (999_900, "1 M"),
        (2.5e9, "2.5 G"),
        (4e15, "4 P"),
    ],
)
def test_large_numbers_have_three_digits(number: float, text: str) -> None:
    assert count(number) == text


def test_bytes_and_shares() -> None:
    assert [size(number) for number in (12, 1500, 2e6)] == ["12 B", "1.5 kB", "2 MB"]
    assert [percent(share) for share in (None, 0.25)] == ["-", "25.0%"]


def test_quality_tells_what_there_is() -> None:
    assert quality({"accuracy": 0.912, "loss": 0.3}) == "accuracy 91.2%, loss 0.3000"
    assert quality({"perplexity": 12.5, "loss": 2.5, "accuracy": 0.5}).startswith("perplexity 12.50, ")
    assert quality({"perplexity": None, "loss": None}) == "perplexity infinite, loss infinite"
    assert quality({}) == "not evaluated"


def test_coverage_is_told_for_a_few_rounds_and_the_last() -> None:
    assert coverage_line([0.5]) == "1: 50.0%"
    assert (
        coverage_line([index / 10 for index in range(1, 8)])
        == "1: 10.0%, 2: 20.0%, 3: 30.0%, 5: 50.0%, 7: 70.0%"
    )


def row(participant: int, ratio: float) -> dict[str, float]:
    return {
        "participant": participant,
        "ratio": ratio,
        "examples": 10 * participant + 10,
        "parameters": 1000 * ratio,
        "share": ratio,
        "flops_per_example": 5000 * ratio,
        "bytes_down": 4000 * ratio,
        "bytes_up": 4000 * ratio,
    }


def test_participants_with_equal_costs_share_a_line() -> None:
    summary = {
        "method": "msfusion",
        "rounds": 3,
        "accuracy": 0.5,
        "loss": 1.0,
        "entry_coverage": 0.987,
        "participants": [row(0, 0.25), row(1, 0.25), row(2, 0.5)],
        "full_model": row(0, 1.0),
    }
    shown = printed(closing_table(summary), 80)
    assert "0-1 " in shown
    assert "10-20" in shown
    assert "full model" in shown
    assert "98.70% of the model's entries" in shown
    assert "…" not in shown


def printed(table: Table, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(table)
    return output.getvalue()
