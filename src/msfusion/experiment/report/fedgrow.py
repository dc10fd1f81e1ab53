"""Growing together as tables: what each participant trains and sends, and how far its model lies from the others."""

from __future__ import annotations

from rich.table import Table

from msfusion.experiment.report.table import Row, count, percent, quality, simple_table, size, span


def grow_table(figures: Row, title: str) -> Table:
    """Who trains and sends what, one line for each kind of participant, and FedAvg of the target."""
    table = simple_table(title)
    table.add_column("who", no_wrap=True)
    headers = ("small model", "examples", "trains", "share", "FLOPs per example", "own FLOPs before")
    for header in (*headers, "down per round", "up per round"):
        table.add_column(header, justify="right")
    kinds: dict[object, list[Row]] = {}
    for row in figures["participants"]:
        kinds.setdefault(row["small_parameters"], []).append(row)
    for small, rows in kinds.items():
        before = [row["private_flops"] for row in rows]
        table.add_row(
            ", ".join(str(row["participant"]) for row in rows),
            "-" if small is None else count(rows[0]["small_parameters"]),
            span([row["examples"] for row in rows]),
            count(rows[0]["parameters"]),
            percent(rows[0]["share"]),
            count(rows[0]["flops_per_example"]),
            span(before, count),
            size(rows[0]["bytes_down"]),
            size(rows[0]["bytes_up"]),
        )
    table.add_section()
    whole = figures["full_model"]
    table.add_row(
        "target by FedAvg",
        "",
        "",
        count(whole["parameters"]),
        "100.0%",
        count(whole["flops_per_example"]),
        "",
        size(whole["bytes_down"]),
        size(whole["bytes_up"]),
    )
    return table


def closing_table(summary: Row) -> Table:
    """The end of a run; the quality is the mean over the participants' models."""
    lies = summary.get("accuracy_sd")
    apart = "" if lies is None else f" (± {lies:.1%} between participants)"
    own = ""
    if "own_accuracy" in summary:
        own = f"; in participants' own proportions of labels {summary['own_accuracy']:.1%}"
        own += f" (± {summary['own_accuracy_sd']:.1%})" if "own_accuracy_sd" in summary else ""
    return grow_table(
        summary, f"{summary['method']} after {summary['rounds']} rounds: {quality(summary)}{apart}{own}"
    )


def plan_tables(plan: Row) -> list[Table]:
    """What a run would ask of each participant."""
    leaves = ", ".join(plan["leaves_participants"]) or "nothing"
    table = grow_table(
        plan, f"{plan['method']}, {plan['rounds']} rounds; what leaves a participant: {leaves}"
    )
    table.caption = (
        f"against FedAvg of the target: {plan['fewer_parameters']:.1%} fewer trained parameters, "
        f"{plan['fewer_bytes']:.1%} fewer bytes a round in the messages of training "
        f"({plan['fewer_bytes_evaluated']:.1%} with those of evaluation)"
    )
    return [table]
