"""A run of the usual kind as tables: what it asks of each participant, who is there when, what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from msfusion.experiment.report.table import Column, Row, Table
from msfusion.experiment.report.words import count, duration, percent, quality, size, span
from msfusion.methods.starts import start_line
from msfusion.scoring import loss_told

_HELD = (
    Column("who", "who", align="left", whole=True),
    Column("ratio", "ratios", partial(span, told="{:g}".format)),
    Column("examples", "examples", span),
    Column("weights held", "parameters", count),
    Column("share", "share", percent),
    Column("training FLOPs per example", "flops_per_example", count),
)
_PEAK = Column("peak memory", "peak_memory", size)
_SENT = (Column("down per round", "bytes_down", size), Column("up per round", "bytes_up", size))

_ATTENDANCE = (
    Column("who", "participant", align="left"),
    Column("on time", "rounds_on_time"),
    Column("late", "rounds_late"),
    Column("absent", "rounds_absent"),
    Column("download", "download_megabits", "{:.3g} Mbit/s".format, optional=True),
    Column("upload", "upload_megabits", "{:.3g} Mbit/s".format, optional=True),
    Column("latency", "latency_seconds", "{:.3g} s".format, optional=True),
    Column("speed", "gigaflops", "{:.3g} GFLOP/s".format, optional=True),
    Column("time of a round", "simulated_seconds", duration, optional=True),
)


def plan_tables(plan: Row) -> list[Table]:
    """What a run would ask of each participant, and how often each will be there."""
    clock = f", {duration(plan['simulated_seconds'])} simulated" if "simulated_seconds" in plan else ""
    title = f"{plan['method']}, {plan['rounds']} rounds{clock}"
    notes = [
        *([start_line(plan["start"]["why"])] if "start" in plan else []),
        *sum_lines(plan),
        *privacy_lines(plan),
    ]
    costs = Table(title, (*_HELD, _PEAK, *_SENT), *_cost_rows(plan), notes)
    return [costs, *phase_tables(plan), *attendance_tables(plan)]


def closing_table(summary: Row) -> Table:
    """What each participant held, computed and sent in a run, against the full model."""
    title = f"{summary['method']} after {summary['rounds']} rounds: {quality(summary)}"
    return Table(title, (*_HELD, *_SENT), *_cost_rows(summary), [*_closing_lines(summary)])


def _cost_rows(figures: Row) -> tuple[list[Row], list[Row]]:
    """A row for each run of participants with equal costs; and, apart, that of the full model."""
    people = figures["participants"]
    costs = ("ratio", "parameters", "flops_per_example", "peak_memory", "bytes_down", "bytes_up")
    alike = groupby(people, lambda row: [row.get(key) for key in costs])
    rows: list[Row] = [
        {
            **row,
            "who": span([row["participant"], *(each["participant"] for each in others)]),
            "ratios": [each["ratio"] for each in row.get("by_ratio", [row])],
            "examples": [each["examples"] for each in (row, *others)],
        }
        for row, *others in (together for _, together in alike)
    ]
    examples = [each["examples"] for each in people]
    return rows, [{**figures["full_model"], "who": "full model", "ratios": [1], "examples": examples}]


_MOST_PHASES = 8

_bytes = partial(span, told=size, between=" - ")
_PHASES = (
    Column("rounds", "rounds", span, align="left", whole=True),
    Column("block", "block", align="left"),
    Column("finished blocks sent", "finished_blocks", span),
    Column("down in the first of them", "first_bytes_down", _bytes),
    Column("down in each other", "bytes_down", _bytes),
    Column("up in each", "bytes_up", _bytes),
)


def phase_tables(plan: Row) -> list[Table]:
    """Of a sum of blocks which block is trained in which rounds, and what one participant is sent; none for others.

    The first pass over the blocks stands phase by phase, and what follows is much alike.
    """
    blocks = plan.get("sum_of_blocks", {"blocks": 1})
    if blocks["blocks"] == 1:
        return []
    phases = blocks["by_phase"]
    shown = phases[: min(blocks["blocks"], _MOST_PHASES)]
    rest = phases[len(shown) :]
    rows = [*shown, *([_together(rest)] if len(rest) > 1 else rest)]
    notes = ["Everybody trains the same block. Who can hold several trains those after it as well."]
    return [Table(f"{len(phases)} phases; what each participant is sent", _PHASES, rows, notes=notes)]


def _together(phases: Sequence[Row]) -> Row:
    """Phases as one row, which says how little and how much it is."""
    spans = {
        key: [value for phase in phases for value in phase[key] or ()] or None
        for key in ("finished_blocks", "first_bytes_down", "bytes_down", "bytes_up")
    }
    rounds = [phases[0]["rounds"][0], phases[-1]["rounds"][-1]]
    return {"rounds": rounds, "block": "each in turn", **spans}


def attendance_tables(plan: Row) -> list[Table]:
    """How often each participant will be there, and how long it takes; none where all are, without a clock."""
    rounds = plan["rounds"]
    rows = [{**row, **row.get("machine", {})} for row in plan["attendance"]]
    if "simulated_seconds" not in plan and all(row["rounds_on_time"] == rounds for row in rows):
        return []
    return [Table(f"who takes part, in {rounds} rounds", _ATTENDANCE, rows)]


def _closing_lines(summary: Row) -> Iterator[str]:
    yield from sum_lines(summary)
    yield from privacy_lines(summary)
    if summary.get("entry_coverage") is not None:
        yield f"{summary['entry_coverage']:.2%} of the model's entries were held by someone in some round"
    if "simulated_seconds" in summary:
        yield f"{duration(summary['simulated_seconds'])} on the simulated clock"
    if "left_out" in summary:
        each = (f"{participant} ({rounds})" for participant, rounds in summary["left_out"].items())
        yield f"left out, with the number of rounds: participant {', '.join(each)}"
    yield from map(target_line, summary.get("targets", []))


_RESULTS = (
    Column("who", "participant", align="left"),
    Column("examples", "examples"),
    Column("rounds", "rounds"),
    Column("left out", "left_out", optional=True),
    Column("last loss in training", "loss", loss_told),
    Column("time", "seconds", duration),
    Column("sent to it", "bytes_down", size),
    Column("sent by it", "bytes_up", size),
)


def results_table(summary: Row) -> Table:
    """What came of each participant: in how many rounds its work counts, its loss, its time, and its bytes."""
    left_out = summary.get("left_out", {})
    rows = [
        {**row, "examples": people.get("examples"), "left_out": left_out.get(str(row["participant"]))}
        for row, people in zip(summary["results"], summary["participants"], strict=True)
    ]
    return Table(f"each participant's part in {summary['rounds']} rounds", _RESULTS, rows)


def target_line(target: Row) -> str:
    """What it took to reach an accuracy: `accuracy 80.0% after 7 rounds, 3.2 min simulated, ...`."""
    if target["rounds"] is None:
        return f"accuracy {target['accuracy']:.1%}: not reached"
    seconds = target["simulated_seconds"]
    clock = "" if seconds is None else f", {duration(seconds)} simulated"
    moved = f"{size(target['bytes'])} per participant"
    return f"accuracy {target['accuracy']:.1%} after {target['rounds']} rounds{clock}, {moved}"


def sum_lines(figures: Row) -> Iterator[str]:
    """Of a sum of blocks: what its phases ask of a participant beside the costs of each round, and of its users."""
    if "sum_of_blocks" not in figures or figures["sum_of_blocks"]["blocks"] == 1:
        return
    blocks, rows, whole = figures["sum_of_blocks"], figures["participants"], figures["trained_model"]
    weights = count(whole["parameters"])
    sent = span([row["finished_blocks"] for row in rows])
    most = max(row.get("most_bytes_in_a_round", 0) for row in rows)  # which older runs do not tell
    kept = span([row["remembered_bytes"] for row in rows], size, " - ")
    flops = span([row["total_flops"] for row in rows], count, " - ")
    answer = count(whole["inference_flops_per_example"])
    whole_sum = f"a sum of {blocks['blocks']} blocks in {blocks['phases']} phases: {weights} weights in all"
    yield f"{whole_sum}, {answer} FLOPs to answer one example"
    run = f"in the whole run each participant is sent {sent} finished blocks besides, remembers {kept}"
    yield f"{run}, and computes {flops} FLOPs with what that takes"
    if most:
        yield f"with those blocks the most that one of them exchanges in a round is {size(most)}"


def privacy_lines(figures: Row) -> Iterator[str]:
    """What differential privacy is spent, or will be; nothing without noise."""
    if "privacy" not in figures:
        return
    spent = figures["privacy"]
    yield (
        f"differential privacy of each participant: epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g} against "
        f"whoever sees the models, {spent['epsilon_of_server']:.3g} against the server"
    )


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
    if names := copies["left_in_operators"]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"In {names[0]}{more} no parameter can hold the factor of a sum: there all slices differ from the small "
            "model by this factor, but not from each other or from the whole."
        )


def coverage_line(coverage: Sequence[float], shown: Iterable[int] = (1, 2, 3, 5, 8, 12, 20, 50, 100)) -> str:
    """Entry coverage after some rounds and after the last: `after round 1: 53.2 %, ...`."""
    rounds = sorted({number for number in shown if number < len(coverage)} | {len(coverage)})
    return ", ".join(f"{number}: {coverage[number - 1]:.1%}" for number in rounds)
