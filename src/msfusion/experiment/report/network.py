"""Figures of unequal, absent and distant participants as tables: who is there when, and time to accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table

from msfusion.experiment.report.table import Row, duration, row_name, simple_table, size, spread_text


def attendance_table(plan: Row) -> Table | None:
    """How often each participant will be there, and how long it takes; None where all are, without a clock."""
    rows, rounds = plan["attendance"], plan["rounds"]
    clock = "simulated_seconds" in plan
    if not clock and all(row["rounds_on_time"] == rounds for row in rows):
        return None
    table = simple_table(f"who takes part, in {rounds} rounds")
    table.add_column("who")
    machine = ["download", "upload", "latency", "speed", "time of a round"] if clock else []
    for header in ("on time", "late", "absent", *machine):
        table.add_column(header, justify="right")
    for row in rows:
        cells = [str(row[f"rounds_{name}"]) for name in ("on_time", "late", "absent")]
        if clock:
            cells += [f"{row['machine'][name]:.3g} {unit}" for name, unit in _MACHINE.items()]
            cells.append(duration(row["simulated_seconds"]))
        table.add_row(str(row["participant"]), *cells)
    return table


_MACHINE = {
    "download_megabits": "Mbit/s",
    "upload_megabits": "Mbit/s",
    "latency_seconds": "s",
    "gigaflops": "GFLOP/s",
}


def targets_table(comparison: Row) -> Table | None:
    """What every method needed until it first reached each target accuracy; None where none was set."""
    if not any(cell.get("targets") for cell in comparison["cells"]):
        return None
    table = simple_table("until the accuracy was first reached, mean ± sd; bytes per participant")
    table.add_column("method", overflow="fold")
    for header in ("ratio", "accuracy", "rounds", "simulated time", "bytes"):
        table.add_column(header, justify="right")
    runs = len(comparison["seeds"])
    for cell in comparison["cells"]:
        for target in cell["targets"]:
            row = [row_name(cell), cell["ratio_label"], f"{target['accuracy']:.1%}"]
            if target["reached"] < runs:
                told = (
                    f"reached in {target['reached']} of {runs} runs" if target["reached"] else "not reached"
                )
                table.add_row(*row, told, "-", "-")
                continue
            spent = [spread_text(target["rounds"], "{:.1f}")]
            spent += [_spread_by(target[key], told) for key, told in _TOLD.items()]
            table.add_row(*row, *spent)
    return table


_TOLD: Mapping[str, Callable[[float], str]] = {"simulated_seconds": duration, "bytes": size}


def _spread_by(value: Row, told: Callable[[float], str]) -> str:
    """Mean ± sd in the words of `told`; a dash where there is no mean."""
    if value["mean"] is None:
        return "-"
    return told(value["mean"]) + ("" if value["sd"] is None else f" ± {told(value['sd'])}")
