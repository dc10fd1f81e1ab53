"""Figures for people."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from msfusion.cli.console import PlainConsole
from msfusion.experiment.report.comparison import comparison_table
from msfusion.experiment.report.table import Column, Table
from msfusion.experiment.report.usual import closing_table, coverage_line, results_table
from msfusion.experiment.report.words import count, mean_and_sd, percent, quality, size
from msfusion.experiment.train import participant_results


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
    assert [size(number) for number in (12, 1500, 2e6, 4e15)] == ["12 B", "1.5 kB", "2 MB", "4 PB"]
    assert [percent(share) for share in (None, 0.25)] == ["-", "25.0%"]


def test_the_mean_of_several_seeds_has_its_standard_deviation() -> None:
    told = mean_and_sd("{:+.1%}".format, "{:.1%}".format)
    assert told({"mean": 0.5, "sd": 0.02}) == "+50.0% ± 2.0%"
    assert told({"mean": 0.5, "sd": None}) == "+50.0%"
    assert told({"mean": None, "sd": None}) == "-"


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


def test_each_participants_results_are_counted_and_shown() -> None:
    def line(participants: list[int], losses: list[float]) -> dict[str, object]:
        times = [1.5] * len(losses)
        each = {"loss": losses, "seconds": times, "bytes_down": [1000, 500], "bytes_up": [10, 20]}
        return {"participants": participants, "each": each}

    older = {"participants": [0, 1, 2]}  # of a version that did not tell it
    results = participant_results([older, line([0, 2], [0.5, 0.25]), line([2, 1], [0.2, 0.75])], 3)
    assert [row["rounds"] for row in results] == [1, 1, 2]
    assert [row["loss"] for row in results] == [0.5, 0.75, 0.2]
    assert [row["seconds"] for row in results] == [1.5, 1.5, 3.0]
    assert [row["bytes_down"] for row in results] == [1000, 500, 1500]
    people = [row(0, 0.25), row(1, 0.25), row(2, 0.5)]
    table = results_table({"rounds": 3, "results": results, "participants": people, "left_out": {"1": 2}})
    headings, cells = table.texts()
    assert headings[:4] == ["who", "examples", "rounds", "left out"]
    assert cells[1] == ["1", "20", "1", "2", "0.7500", "1.5 s", "500 B", "20 B"]


def printed(table: Table, width: int) -> str:
    output = io.StringIO()
    PlainConsole(file=output, width=width).print(table)
    return output.getvalue()


WHO = Column("who", "who", align="left")
BYTES = Column("bytes", "bytes", size)
SPEED = Column("speed", lambda row: row.get("speed"), "{:.1f} GFLOP/s".format, optional=True)


def test_a_table_is_handed_on_as_texts() -> None:
    rows = [{"who": 0, "bytes": 1500, "speed": 2.0}, {"who": 1, "bytes": None}]
    table = Table("sent", [WHO, BYTES, SPEED], rows, below=[{"who": "all", "bytes": 0, "speed": 0.0}])
    headings, cells = table.texts()
    assert headings == ["who", "bytes", "speed"]
    assert cells == [["0", "1.5 kB", "2.0 GFLOP/s"], ["1", "-", "-"], ["all", "0 B", "0.0 GFLOP/s"]]


def test_a_column_without_a_value_is_left_out_if_it_is_optional() -> None:
    rows = [{"who": "a", "bytes": None}, {"who": "b", "speed": None}]
    assert Table("", [WHO, BYTES, SPEED], rows).texts() == (["who", "bytes"], [["a", "-"], ["b", "-"]])
    assert Table("", [WHO, BYTES, SPEED], rows, below=[{"speed": 1.0}]).texts()[0] == [
        "who",
        "bytes",
        "speed",
    ]


def test_a_table_is_printed_with_numbers_to_the_right_and_what_is_apart_below() -> None:
    rows = [{"who": "a", "bytes": 2}, {"who": "b", "bytes": 1500}]
    table = Table("sent", [WHO, BYTES], rows, below=[{"who": "all", "bytes": 1502}], notes=["In one round."])
    assert [line.rstrip() for line in printed(table, 80).splitlines()] == [
        "sent",
        "",
        " who   bytes",
        " ───────────",
        " a       2 B",
        " b    1.5 kB",
        "",
        " all  1.5 kB",
        "",
        "In one round.",
    ]


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", ":smile:"])
def test_a_name_in_a_table_is_text(name: str) -> None:
    table = Table(name, [WHO, Column(name, "bytes")], [{"who": name, "bytes": name}], notes=[name])
    assert printed(table, 80).count(name) == 5


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_that_is_too_wide_loses_nothing(width: int) -> None:
    names = [f"{letter * 9}{number:02}" for number, letter in enumerate("abcdefghijklmno")]
    row = {name: name.upper() for name in names}
    shown = printed(Table("", [Column(name, name) for name in names], [row, row]), width)
    words = [word for line in shown.splitlines() for word in line.split()]
    assert max(map(len, shown.splitlines())) <= width
    for name in names[1:]:
        assert words.count(name) == 1
        assert words.count(name.upper()) == 2


def test_a_word_that_is_too_long_is_folded() -> None:
    shown = printed(Table("", [WHO, BYTES], [{"who": "x" * 100, "bytes": 1}]), 40)
    assert shown.count("x") == 100


def test_what_is_whole_stays_on_a_line_unless_it_is_long() -> None:
    columns = [replace(WHO, whole=True), Column("said", "said", align="left")]
    short, long = "full model", ", ".join(map(str, range(100)))
    for width in (30, 60):
        assert short in printed(Table("", columns, [{"who": short, "said": "word " * 50}]), width)
        shown = printed(Table("", columns, [{"who": long, "said": "word"}]), width)
        assert sorted(int(each) for each in shown.replace(",", " ").split() if each.isdigit()) == [
            *range(100)
        ]


def test_figures_of_a_method_s_own_are_columns_of_a_comparison() -> None:
    spread = {"mean": 0.5, "sd": None}
    cell = {
        "method": "mine",
        "variant": None,
        "ratio_label": "1",
        "rounds": 1,
        "accuracy": spread,
        "loss": spread,
        "within_budget": True,
        "parameters": 1,
        "share": 1.0,
    }
    cells = [{**cell, "metrics": {"drift": {"mean": 0.25, "sd": 0.01}}}, cell]
    headings, rows = comparison_table({"seeds": [0], "cells": cells}).texts()
    assert [row[headings.index("drift")] for row in rows] == ["0.25 ± 0.01", "-"]


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("variant", [None, "a longer warm-up"])
def test_headings_of_a_comparison_are_folded_between_words_alone(seeds: int, variant: str | None) -> None:
    spread = {"mean": 0.5, "sd": None if seeds == 1 else 0.01}
    names = ("accuracy", "accuracy_sd", "loss", "behind")
    cell = {
        "variant": variant,
        "ratio_label": "1/4",
        "rounds": 160,
        "within_budget": True,
        "parameters": 1.23e6,
        "share": 0.0625,
        "flops_per_example": 1.2e7,
        "total_flops": 3.4e12,
        "total_bytes": 5.6e8,
        "inference_flops_per_example": 4.5e6,
        "gap_closed": {"share": 0.43},
        "metrics": {"balanced_accuracy": spread},
        **dict.fromkeys(names, spread),
    }
    cells = [{"method": method, **cell} for method in ("msfusion", "small", "fedavg")]
    table = comparison_table({"seeds": [*range(seeds)], "cells": cells})
    words = {word for heading in table.texts()[0] for word in heading.split()}
    for width in range(60, 241, 12):
        shown = printed(table, width)
        assert max(map(len, shown.splitlines())) <= width
        assert words <= set(shown.split()), width
        assert shown.count("(continued) (continued)") == 0
        assert all(figure in shown.split() for figure in ("1.23", "50.0%", "160", "msfusion"))
