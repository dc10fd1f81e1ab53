"""A picture of the windows: who holds which units, round after round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool
from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.experiment.report.plot import figures, label
from msfusion.experiment.setup import Setup
from msfusion.files import write_with
from msfusion.width.groups import Group, WidthMap, held

_SHADES = " ░▒▓█"


def shown_groups(width_map: WidthMap, most: int = 2) -> tuple[Group, ...]:
    """A large group and one that meets it: whether their windows move apart decides what is ever trained."""
    groups = sorted(width_map.groups, key=lambda group: -group.units)
    for group in groups:
        for other in groups:
            if other is not group and frozenset((group.name, other.name)) in width_map.meetings:
                return (group, other)[:most]
    return tuple(groups[:most])


def holdings(
    setup: Setup, group: Group, round_index: int, everybody: bool = False
) -> Bool[Tensor, "participants units"]:
    """Which units of a group each participant holds in a round; who is absent or late holds none.

    `everybody`: what each would hold if it were there.
    """
    people = range(setup.config.participants.count)
    rows = torch.zeros(len(people), group.units, dtype=torch.bool)
    for participant in people if everybody else setup.calendar.round(round_index).on_time:
        rows[participant] = held(setup.window(round_index, participant), group)
    return rows


def shown_rounds(setup: Setup, most: int = 4) -> list[int]:
    """The first rounds; of a sum of blocks, whose windows stay for a whole phase, the first of each phase."""
    if setup.forecast is None:
        return [*range(min(most, setup.config.rounds))]
    phases = setup.forecast.method.phases
    return [
        index
        for index in range(phases.rounds)
        if phases.place(index)[0] == 0 and phases.phase(index) < phases.blocks
    ][:most]


def terminal_picture(setup: Setup, rounds: Sequence[int], width: int = 80, most: int = 20) -> Stack:
    """Rows are participants (the first few), columns are units (several to a column where there are many)."""
    pictures: list[Text | Table] = []
    columns = max(8, (width - 6) // len(rounds) - 3)
    for group in shown_groups(setup.width_map):
        table = Table(
            box=None, padding=(0, 1), title=f"{group.name}: {group.units} units", title_justify="left"
        )
        table.add_column("", justify="right")
        for index in rounds:
            table.add_column(_round_title(setup, index))
        shares = [_binned(_shown(setup, group, index), columns) for index in rounds]
        for participant in range(min(most, shares[0].shape[0])):
            table.add_row(str(participant), *(_blocks(share[participant]) for share in shares))
        pictures.append(table)
    if setup.config.participants.count > most:
        pictures.append(Text(f"(and {setup.config.participants.count - most} more participants)"))
    return Stack(*pictures)


def save_picture(setup: Setup, rounds: Sequence[int], path: Path) -> None:
    """The same as an image file, in the format that its name ends with.

    Raises ConfigError without matplotlib or for an unknown format, RunDirectoryError if it cannot be written.
    """
    with figures("A picture file") as figure_class:
        groups = shown_groups(setup.width_map)
        figure = figure_class(figsize=(3 * len(rounds), 2.2 * max(1, len(groups))), layout="constrained")
        axes = figure.subplots(max(1, len(groups)), len(rounds), squeeze=False)
        for group, row in zip(groups, axes, strict=False):
            for index, axis in zip(rounds, row, strict=True):
                axis.imshow(
                    _shown(setup, group, index).numpy(),
                    aspect="auto",
                    cmap="Blues",
                    interpolation="nearest",
                )
                axis.set_title(f"{label(group.name)}, {_round_title(setup, index)}", fontsize=8)
                axis.set_xlabel("unit", fontsize=7)
                axis.set_ylabel("participant", fontsize=7)
                axis.tick_params(labelsize=6)
        form = path.suffix.removeprefix(".") or "png"
        if form not in figure.canvas.get_supported_filetypes():
            raise ConfigError(f"--out {path}: pictures cannot be written as .{form}; use .png, .pdf or .svg.")
        write_with(path, lambda temporary: figure.savefig(temporary, format=form, dpi=150))


def _shown(setup: Setup, group: Group, round_index: int) -> Bool[Tensor, "participants units"]:
    """Of a sum of blocks a picture is of a whole phase, in whose first round not everybody may be there."""
    return holdings(setup, group, round_index, everybody=setup.forecast is not None)


def _round_title(setup: Setup, round_index: int) -> str:
    """`round 3, overlap 60%`; rounds count from 1. Where windows do not meet, the gaps in parts of a window.

    Of a sum of blocks, all rounds of the phase.
    """
    if setup.forecast is not None:
        phases = setup.forecast.method.phases
        if phases.blocks == 1:
            return "all rounds"
        last = round_index + phases.place(round_index)[1]
        return f"rounds {round_index + 1}-{last}" if last > round_index + 1 else f"round {last}"
    overlap = setup.method.overlap(round_index)
    if overlap is None:
        return f"round {round_index + 1}"
    return f"round {round_index + 1}, " + (
        f"overlap {overlap:.0%}" if overlap >= 0 else f"gaps {-overlap:.0%}"
    )


def _binned(rows: Bool[Tensor, "participants units"], columns: int) -> Tensor:
    """The share of held units in each stretch of units, all of one length, at most `columns` of them."""
    stretch = math.ceil(rows.shape[1] / columns)
    return torch.stack([part.float().mean(1) for part in torch.split(rows, stretch, dim=1)], dim=1)


def _blocks(shares: Tensor) -> Text:
    """One character for each share; anything held at all is visible."""
    steps = (shares * (len(_SHADES) - 1)).ceil().long().tolist()
    return Text("".join(_SHADES[step] if step else "·" for step in steps), style="cyan")
