"""The tables of a run or a plan, by the family of its method."""

from __future__ import annotations

from rich.table import Table

from msfusion.experiment.report import table as report
from msfusion.experiment.report.fedgrow import grow_closing_table, grow_plan_table
from msfusion.experiment.report.split import split_closing_table, split_plan_tables
from msfusion.experiment.report.table import Row


def closing_table(summary: Row) -> Table:
    """The end of a run."""
    if summary["method"] == "split":
        return split_closing_table(summary)
    return grow_closing_table(summary) if summary["method"] == "fedgrow" else report.closing_table(summary)


def plan_tables(plan: Row) -> list[Table]:
    """What a run would ask of everybody."""
    if plan["method"] == "split":
        return split_plan_tables(plan)
    return [grow_plan_table(plan) if plan["method"] == "fedgrow" else report.plan_table(plan)]
