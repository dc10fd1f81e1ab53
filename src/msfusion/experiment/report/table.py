"""Figures as tables for people: the end of a run, a plan, a width map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from msfusion.methods.starts import start_line

Row = Mapping[str, Any]


def count(number: int | float) -> str:
    """A large number with three digits and a unit: 1.23 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def size(bytes_: int | float) -> str:
    """A number of bytes with three digits and a unit: 1.23 MB."""
    return count(bytes_).replace(" k", " kB").replace(" M", " MB").replace(" G", " GB").replace(
        " T", " TB"
    ) + (" B" if bytes_ < 999.5 else "")


def duration(seconds: float | None) -> str:
    """A time with three digits: 0.25 s, 12.3 s, 4.5 min, 2.31 h; a dash where there is none."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 172_800.0), ("h", 7200.0), ("min", 120.0)):
        if seconds >= length:
            return f"{seconds / {'d': 86_400, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"


def percent(share: int | float | None) -> str:
    """A share of one in per cent; a dash where it has no meaning."""
    return "-" if share is None else f"{share:.1%}"


def span(values: Sequence[int], told: Callable[[int], str] = str, between: str = "-") -> str:
    """The least and the largest of some values, or the one that all are."""
    least, largest = told(min(values)), told(max(values))
    return least if least == largest else f"{least}{between}{largest}"


def quality(metrics: Row) -> str:
    """How good the model is: `accuracy 91.2 %, loss 0.31`, with perplexity first for language models."""
    parts = []
    if "perplexity" in metrics:
        perplexity = metrics["perplexity"]
        parts.append("perplexity " + ("infinite" if perplexity is None else f"{perplexity:.2f}"))
    if metrics.get("accuracy") is not None:
        parts.append(f"accuracy {metrics['accuracy']:.1%}")
    if "loss" in metrics:
        parts.append("loss " + ("infinite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"))
    for name, value in metrics.get("metrics", {}).items():
        parts.append(f"{name} " + ("not finite" if value is None else f"{value:.4g}"))
    return ", ".join(parts) or "not evaluated"


def closing_table(summary: Row) -> Table:
    """What each participant held, computed and sent in a run, against the full model."""
    table = _costs_table(f"{summary['method']} after {summary['rounds']} rounds: {quality(summary)}")
    _add_costs(table, summary["participants"], summary["full_model"])
    coverage, lines = summary.get("entry_coverage"), [*sum_lines(summary)]
    if coverage is not None:
        lines.append(f"{coverage:.2%} of the model's entries were held by someone in some round")
    if "simulated_seconds" in summary:
        lines.append(f"{duration(summary['simulated_seconds'])} on the simulated clock")
    if "left_out" in summary:
        each = (f"{participant} ({rounds})" for participant, rounds in summary["left_out"].items())
        lines.append(f"left out, with the number of rounds: participant {', '.join(each)}")
    lines += [target_line(target) for target in summary.get("targets", [])]
    table.caption = "\n".join(lines) or None
    return table


def left_out_lines(metrics: Row) -> list[str]:
    """Who was left out of a round and why, from its line of metrics: a sentence each."""
    return [
        f"participant {each['participant']} is left out of round {metrics['round']}: {each['reason']}"
        for each in metrics.get("left_out", ())
    ]


def target_line(target: Row) -> str:
    """What it took to reach an accuracy: `accuracy 80.0% after 7 rounds, 3.2 min simulated, ...`."""
    if target["rounds"] is None:
        return f"accuracy {target['accuracy']:.1%}: not reached"
    seconds = target["simulated_seconds"]
    clock = "" if seconds is None else f", {duration(seconds)} simulated"
    moved = f"{size(target['bytes'])} per participant"
    return f"accuracy {target['accuracy']:.1%} after {target['rounds']} rounds{clock}, {moved}"


def plan_tables(plan: Row) -> list[Table]:
    """What a run would ask of each participant."""
    clock = f", {duration(plan['simulated_seconds'])} simulated" if "simulated_seconds" in plan else ""
    table = _costs_table(f"{plan['method']}, {plan['rounds']} rounds{clock}", memory=True)
    _add_costs(table, plan["participants"], plan["full_model"], memory=True)
    chosen = [start_line(plan["start"]["why"])] if "start" in plan else []
    table.caption = "\n".join([*chosen, *sum_lines(plan)]) or None
    return [table]


def sum_lines(figures: Row) -> list[str]:
    """Of a sum of blocks: what its phases ask of a participant beside the costs of each round, and of its users."""
    if "sum_of_blocks" not in figures or figures["sum_of_blocks"]["blocks"] == 1:
        return []
    blocks, rows, whole = figures["sum_of_blocks"], figures["participants"], figures["trained_model"]
    weights = count(whole["parameters"])
    sent = span([row["finished_blocks"] for row in rows])
    kept = span([row["remembered_bytes"] for row in rows], size, " - ")
    flops = span([row["total_flops"] for row in rows], count, " - ")
    answer = count(whole["inference_flops_per_example"])
    return [
        f"a sum of {blocks['blocks']} blocks in {blocks['phases']} phases: {weights} weights "
        f"in all, {answer} FLOPs to answer one example",
        f"in the whole run each participant is sent {sent} finished blocks besides, remembers {kept}, and computes "
        f"{flops} FLOPs with what that takes",
    ]


def checkpointing_line(modules: Sequence[str]) -> str:
    """What becomes of a model's activation checkpointing."""
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return (
        f"Activation checkpointing in module {modules[0]}{more} is not kept: sub-models keep their activations, "
        "which counts in their memory."
    )


def copies_lines(copies: Mapping[str, Any], rounds: int) -> Iterator[str]:
    """What a start as copies of the small model means for this model and these ratios."""
    equal = min(copies["from_round"], rounds)
    yield f"The model begins as copies of the small one, which stay equal for {equal} of {rounds} rounds."
    for ratio, groups in copies["held"].items():
        name, (held, asked, units) = next(iter(groups.items()))
        more = f" (and so in {len(groups) - 1} more groups)" if len(groups) > 1 else ""
        yield (
            f"At ratio {ratio} a window holds {held} of the {units} units of {name}, not {asked}{more}: "
            "the units of a window must divide those of the group."
        )
    if copies["left_in_operators"]:
        names = copies["left_in_operators"]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"In {names[0]}{more} no parameter can hold the factor of a sum: there all slices differ from the small "
            "model by this factor, but not from each other or from the whole."
        )


def coverage_line(coverage: Sequence[float], shown: Iterable[int] = (1, 2, 3, 5, 8, 12, 20, 50, 100)) -> str:
    """Entry coverage after some rounds and after the last: `after round 1: 53.2 %, ...`."""
    rounds = sorted({number for number in shown if number < len(coverage)} | {len(coverage)})
    return ", ".join(f"{number}: {coverage[number - 1]:.1%}" for number in rounds)


def groups_table(description: Row) -> Table:
    """The width groups of a model in words."""
    table = simple_table(f"{len(description['groups'])} width groups")
    for header, justify in (
        ("group", "left"),
        ("units", "right"),
        ("rows a unit", "right"),
        ("places", "right"),
    ):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    table.add_column("where", overflow="fold")
    for group in description["groups"]:
        table.add_row(
            group["name"],
            str(group["units"]),
            ", ".join(str(thickness) for thickness in group["thickness"]),
            str(len(group["places"])),
            _where(group["places"]),
        )
    return table


def _where(places: Sequence[Row]) -> str:
    """Tensor[axis] of every place, with what all names begin with said once."""
    names = [place["tensor"].split(".") for place in places]
    shared = 0
    while len(names) > 1 and len({(*name[: shared + 1],) for name in names if len(name) > shared + 1}) == 1:
        if any(len(name) <= shared + 1 for name in names):
            break
        shared += 1
    inside = ", ".join(
        f"{'.'.join(name[shared:])}[{place['axis']}]" for name, place in zip(names, places, strict=True)
    )
    return f"{'.'.join(names[0][:shared])}: {inside}" if shared else inside


def comparison_table(comparison: Row) -> Table:
    """Every method and ratio with mean ± standard deviation over the seeds."""
    language = any("perplexity" in cell for cell in comparison["cells"])
    table = simple_table(f"{len(comparison['seeds'])} seeds, mean ± sd")
    table.add_column("method")
    variants = any(cell["variant"] for cell in comparison["cells"])
    if variants:
        table.add_column("variant")
    personal = any("accuracy_sd" in cell for cell in comparison["cells"])
    own = any("own_accuracy" in cell for cell in comparison["cells"])
    columns = ["ratio", "rounds", *(["perplexity"] if language else []), "accuracy"]
    columns += ["between participants"] * personal + ["own labels", "between participants"] * own
    gaps = any(cell.get("gap_closed") for cell in comparison["cells"])
    columns += ["loss", "behind"] + ["gap closed"] * gaps
    for header in [*columns, "holds", "FLOPs/example", "FLOPs in all", "bytes in all", "FLOPs/answer"]:
        table.add_column(header, justify="right")
    for cell in comparison["cells"]:
        over = "" if cell["within_budget"] else " *"
        quality_cells = [spread_text(cell["perplexity"], "{:.2f}")] if language else []
        table.add_row(
            cell["method"] + over,
            *([cell["variant"] or ""] if variants else []),
            cell["ratio_label"],
            str(cell["rounds"]),
            *quality_cells,
            spread_text(cell["accuracy"], "{:.1%}"),
            *([spread_text(cell.get("accuracy_sd"), "{:.1%}")] if personal else []),
            *([spread_text(cell.get(f"own_accuracy{of}"), "{:.1%}") for of in ("", "_sd")] if own else []),
            spread_text(cell["loss"], "{:.3f}"),
            spread_text(cell["behind"], "{:+.2f}" if language else "{:+.1%}"),
            *([_gap_text(cell.get("gap_closed"))] if gaps else []),
            f"{count(cell['parameters'])} ({percent(cell['share'])})",
            count(cell["flops_per_example"]),
            count(cell["total_flops"]),
            size(cell["total_bytes"]),
            "-" if (answer := cell.get("inference_flops_per_example")) is None else count(answer),
        )
    if any(not cell["within_budget"] for cell in comparison["cells"]):
        table.caption = "* exceeds what a participant may hold and compute: a reference, not a rival"
    return table


def _gap_text(closed: Row | None) -> str:
    """The share of the gap between the small model and FedAvg; where that gap is not more than chance, nothing."""
    return "-" if closed is None or closed["share"] is None else f"{closed['share']:.0%}"


def simple_table(title: str) -> Table:
    """A table without lines between its rows and columns."""
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # eight columns fit into 80 characters
    )


def _costs_table(title: str, *, memory: bool = False) -> Table:
    table = simple_table(title)
    table.add_column("who", no_wrap=True)
    headers = ["ratio", "examples", "weights held", "share", "training FLOPs per example"]
    for header in [*headers, *(["peak memory"] if memory else []), "down per round", "up per round"]:
        table.add_column(header, justify="right", overflow="fold")
    return table


def _add_costs(table: Table, participants: Sequence[Row], full: Row, *, memory: bool = False) -> None:
    """One line for each run of participants with equal costs, and one for the full model."""
    runs: list[list[Row]] = []
    for row in participants:
        if runs and _costs(runs[-1][0]) == _costs(row):
            runs[-1].append(row)
        else:
            runs.append([row])
    for rows in runs:
        first, last = rows[0], rows[-1]
        label = (
            f"{first['participant']}" if len(rows) == 1 else f"{first['participant']}-{last['participant']}"
        )
        _add_cost_row(table, label, _ratios(first), rows, first, memory)
    table.add_section()
    _add_cost_row(table, "full model", "1", participants, full, memory)


def _ratios(row: Row) -> str:
    """A participant's ratio, or the range of those that it can have."""
    smallest = min(figures["ratio"] for figures in row.get("by_ratio", [row]))
    return f"{smallest:g}-{row['ratio']:g}" if smallest < row["ratio"] else f"{smallest:g}"


def _add_cost_row(
    table: Table, label: str, ratio: str, rows: Sequence[Row], costs: Row, memory: bool
) -> None:
    table.add_row(
        label,
        ratio,
        span([row["examples"] for row in rows]),
        count(costs["parameters"]),
        percent(costs["share"]),
        count(costs["flops_per_example"]),
        *([size(costs["peak_memory"])] if memory else []),
        size(costs["bytes_down"]),
        size(costs["bytes_up"]),
    )


def _costs(row: Row) -> tuple[Any, ...]:
    keys = ("ratio", "parameters", "flops_per_example", "peak_memory", "bytes_down", "bytes_up")
    return tuple(row.get(key) for key in keys)


def spread_text(value: Row | None, form: str) -> str:
    """Mean ± sd; the mean alone for one seed."""
    if value is None or value["mean"] is None:
        return "-"
    mean = form.format(value["mean"])
    return mean if value["sd"] is None else f"{mean} ± {form.replace('+', '').format(value['sd'])}"


def row_name(cell: Row) -> str:
    """A row of a comparison in words: its method, and its variant where it has one."""
    return f"{cell['method']}, {cell['variant']}" if cell["variant"] else str(cell["method"])
