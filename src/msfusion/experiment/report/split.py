"""Split learning as tables: what each side costs, and what crosses."""

from __future__ import annotations

from functools import partial

from msfusion.experiment.report.table import Column, Row, Table
from msfusion.experiment.report.words import count, percent, quality, size, span

_SIDES = (
    Column("who", "who", align="left", whole=True),
    Column("examples", "examples", span, missing=""),
    Column("weights", "parameters", count),
    Column("share", "share", percent),
    Column("FLOPs per example", "flops_per_example", count),
    Column("peak memory", "peak_memory", size),
    Column("down per round", "down", partial(span, told=size, between=" - "), missing=""),
    Column("up per round", "up", partial(span, told=size, between=" - "), missing=""),
)
_CROSSING = (
    Column("", "what", align="left"),
    Column("activations up", "activations", size),
    Column("without codec", "plain_activations", size),
    Column("other up", "other_up", size),
    Column("gradients down", "gradients", size),
    Column("without codec", "plain_gradients", size),
)


def closing_table(summary: Row) -> Table:
    """The end of a run."""
    return _sides_table(summary, f"split after {summary['rounds']} rounds: {quality(summary)}")


def plan_tables(plan: Row) -> list[Table]:
    """What a run would ask of both sides, and what crosses for a mini-batch and for an epoch."""
    crossing = [
        {"what": f"a mini-batch of {plan['batch']['examples']}", **plan["batch"]},
        {"what": "an epoch of everybody", **plan["epoch"]},
    ]
    return [
        _sides_table(plan, f"split at '{plan['at']}', {plan['rounds']} rounds"),
        Table("what crosses, in bytes, at the first weights", _CROSSING, crossing),
    ]


def _sides_table(figures: Row, title: str) -> Table:
    """Parameters, FLOPs and memory of a participant's side, of the server's, and of the whole model."""
    people = figures["participants"]
    each = {
        **people[0],
        "who": f"each of {len(people)}",
        "examples": [one["examples"] for one in people],
        "down": [one["bytes_down"] for one in people],
        "up": [one["bytes_up"] for one in people],
    }
    server, whole = figures["server"], figures["full_model"]
    return Table(title, _SIDES, [each, {"who": "server", **server}], below=[{"who": "full model", **whole}])
