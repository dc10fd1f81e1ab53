"""Split learning as tables: what each side costs, what crosses, and what it took to be as good as the baseline."""

from __future__ import annotations

from rich.table import Table

from msfusion.experiment.report.table import (
    Row,
    count,
    percent,
    quality,
    row_name,
    simple_table,
    size,
    span,
    spread_text,
)


def sides_table(figures: Row, title: str) -> Table:
    """Parameters, FLOPs and memory of a participant's side, of the server's, and of the whole model."""
    table = simple_table(title)
    table.add_column("who", no_wrap=True)
    for header in ("examples", "weights", "share", "FLOPs per example", "peak memory"):
        table.add_column(header, justify="right")
    for header in ("down per round", "up per round"):
        table.add_column(header, justify="right")
    people = figures["participants"]
    examples = span([each["examples"] for each in people])
    moved = [span([each[way] for each in people], size, " - ") for way in ("bytes_down", "bytes_up")]
    _add_side(table, f"each of {len(people)}", people[0], examples, moved)
    _add_side(table, "server", figures["server"], "", ["", ""])
    table.add_section()
    _add_side(table, "full model", figures["full_model"], "", ["", ""])
    return table


def _add_side(table: Table, who: str, costs: Row, examples: str, moved: list[str]) -> None:
    table.add_row(
        who,
        examples,
        count(costs["parameters"]),
        percent(costs["share"]),
        count(costs["flops_per_example"]),
        size(costs["peak_memory"]),
        *moved,
    )


def closing_table(summary: Row) -> Table:
    """The end of a run."""
    return sides_table(summary, f"split after {summary['rounds']} rounds: {quality(summary)}")


def plan_tables(plan: Row) -> list[Table]:
    """What a run would ask of both sides, and what crosses for a mini-batch and for an epoch."""
    sides = sides_table(plan, f"split at '{plan['at']}', {plan['rounds']} rounds")
    crossing = simple_table("what crosses, in bytes, at the first weights")
    crossing.add_column("")
    headers = ("activations up", "without codec", "other up", "gradients down", "without codec")
    for header in headers:
        crossing.add_column(header, justify="right")
    keys = ("activations", "plain_activations", "other_up", "gradients", "plain_gradients")
    for name, bytes_ in (
        (f"a mini-batch of {plan['batch']['examples']}", plan["batch"]),
        ("an epoch of everybody", plan["epoch"]),
    ):
        crossing.add_row(name, *(size(bytes_[key]) for key in keys))
    return [sides, crossing]


def traffic_table(comparison: Row) -> Table | None:
    """What every row sent until it was as good as the first one; None where nothing is split."""
    rows = [cell for cell in comparison["cells"] if cell.get("until_baseline")]
    if not rows:
        return None
    accuracy, runs = rows[0]["until_baseline"]["accuracy"], len(comparison["seeds"])
    table = simple_table(f"until as accurate as the seed's baseline less its sd ({accuracy:.1%} in the mean)")
    table.add_column("row", overflow="fold")
    headers = ("rounds", "activations", "gradients", "times less up", "both ways", "everything")
    for header in headers:
        table.add_column(header, justify="right")
    for cell in rows:
        until, less = cell["until_baseline"], cell["times_less"]
        if until["reached"] < runs:
            told = f"in {until['reached']} of {runs} runs" if until["reached"] else "never"
            table.add_row(row_name(cell), told, *["-"] * 5)
            continue
        spent = [size(until[key]["mean"]) for key in ("activation_bytes", "gradient_bytes")]
        ratios = ["-" if less[key] is None else f"{less[key]:.1f}" for key in ("activations", "both", "all")]
        table.add_row(row_name(cell), spread_text(until["rounds"], "{:.1f}"), *spent, *ratios)
    return table
