"""Growing together as tables: what each participant trains and sends, and how far its model lies from the others."""

from __future__ import annotations

from functools import partial

from msfusion.experiment.report.table import Column, Row, Table
from msfusion.experiment.report.words import count, percent, quality, size, span

_COLUMNS = (
    Column("who", "who", align="left", whole=True),
    Column("small model", "small_parameters", count, missing="", optional=True),
    Column("examples", "examples", span, missing=""),
    Column("trains", "parameters", count),
    Column("share", "share", percent),
    Column("FLOPs per example", "flops_per_example", count),
    Column("own FLOPs before", "private_flops", partial(span, told=count), missing=""),
    Column("down per round", "bytes_down", size),
    Column("up per round", "bytes_up", size),
)


def closing_table(summary: Row) -> Table:
    """The end of a run; the quality is the mean over the participants' models."""
    lies = summary.get("accuracy_sd")
    apart = "" if lies is None else f" (± {lies:.1%} between participants)"
    own = ""
    if "own_accuracy" in summary:
        own = f"; in participants' own proportions of labels {summary['own_accuracy']:.1%}"
        own += f" (± {summary['own_accuracy_sd']:.1%})" if "own_accuracy_sd" in summary else ""
    title = f"{summary['method']} after {summary['rounds']} rounds: {quality(summary)}{apart}{own}"
    return Table(title, _COLUMNS, *_rows(summary))


def plan_tables(plan: Row) -> list[Table]:
    """What a run would ask of each participant."""
    leaves = ", ".join(plan["leaves_participants"]) or "nothing"
    title = f"{plan['method']}, {plan['rounds']} rounds; what leaves a participant: {leaves}"
    beside = (
        f"against FedAvg of the target: {plan['fewer_parameters']:.1%} fewer trained parameters, "
        f"{plan['fewer_bytes']:.1%} fewer bytes a round in the messages of training "
        f"({plan['fewer_bytes_evaluated']:.1%} with those of evaluation)"
    )
    return [Table(title, _COLUMNS, *_rows(plan), [beside])]


def _rows(figures: Row) -> tuple[list[Row], list[Row]]:
    """Who trains and sends what, a row for each kind of participant; and, apart, FedAvg of the target."""
    kinds: dict[object, list[Row]] = {}
    for row in figures["participants"]:
        kinds.setdefault(row["small_parameters"], []).append(row)
    rows: list[Row] = [
        {
            **alike[0],
            "who": ", ".join(str(row["participant"]) for row in alike),
            "examples": [row["examples"] for row in alike],
            "private_flops": [row["private_flops"] for row in alike],
        }
        for alike in kinds.values()
    ]
    return rows, [{**figures["full_model"], "who": "target by FedAvg"}]
