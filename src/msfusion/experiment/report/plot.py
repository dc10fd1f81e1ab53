"""A comparison as one picture: mean over the seeds after each round, with a band of one sd. Names in it are text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msfusion.experiment.comparison import role_of
from msfusion.experiment.kinds import kind_of
from msfusion.experiment.report.comparison import validates
from msfusion.extras import needing
from msfusion.files import write_with
from msfusion.quoting import short


def save_plot(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the curves of `compare` as a PNG: a panel for each width ratio (and variant, of several methods).

    Raises ConfigError without matplotlib, RunDirectoryError where the file cannot be written.
    """
    with figures("A plot") as figure_class:
        figure = plot_of(comparison, figure_class)
        write_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


PANELS_IN_A_ROW = 3


def plot_of(comparison: Mapping[str, Any], figure_class: Any) -> Any:
    """The picture of a comparison, a figure of matplotlib."""
    cells = comparison["cells"]
    by_variant = len({(cell["variant"], cell["method"]) for cell in cells}) > max(
        len({cell["variant"] for cell in cells}), len({cell["method"] for cell in cells})
    )
    curves = _curves_by_panel(cells, by_variant)
    crowded = len(curves) == 1 and len(cells) > 8  # the names would cover the curves
    columns, rows = min(len(curves), PANELS_IN_A_ROW), -(-len(curves) // PANELS_IN_A_ROW)
    figure = figure_class(figsize=(6.5 * columns + 2.5 * crowded, 4.2 * rows), layout="constrained")
    # variants may be other tasks, whose figures are on another scale
    panels = figure.subplots(rows, columns, sharey=not by_variant, squeeze=False).flatten()
    for unused in panels[len(curves) :]:
        unused.remove()
    for (title, here), panel in zip(curves.items(), panels, strict=False):
        for colour, cell in enumerate(here):
            _draw(panel, cell, colour, _label(cell, by_variant))
        panel.set_title(label(title), fontsize=10)
        if crowded:
            figure.legend(fontsize=8, loc="outside right center")
        else:
            panel.legend(fontsize=8)
        first_of_its_scale = by_variant or panel is panels[0]
        if first_of_its_scale:
            kind = "validation" if validates(comparison) else "test"
            _set_scale(
                panel,
                here[0]["curve"]["metric"],
                f"{kind} {{}} (mean ± sd, {len(comparison['seeds'])} seeds)",
            )
        _set_rounds(panel)
    return figure


def _curves_by_panel(
    cells: Sequence[Mapping[str, Any]], by_variant: bool
) -> dict[str, list[Mapping[str, Any]]]:
    """The cells of each panel, by its title: of one width ratio (and variant), and beside them what has no ratio."""
    references = [cell for cell in cells if role_of(cell["method"]) == "ceiling"]
    narrow = [cell for cell in cells if role_of(cell["method"]) != "ceiling"] or references
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for cell in narrow:
        ratio = kind_of(cell["method"]).title or f"width ratio {cell['ratio_label']}"
        panels.setdefault(f"{cell['variant']}, {ratio}" if by_variant else ratio, []).append(cell)
    if len(panels) > 1 and not by_variant and len({cell["variant"] for cell in narrow}) == len(narrow):
        panels = {"": narrow}  # variants with other ratios, a curve each
    for here in panels.values():
        here += [
            cell
            for cell in references
            if cell not in here and (not by_variant or cell["variant"] == here[0]["variant"])
        ]
    return panels


def _set_rounds(panel: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("round")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)


def _set_scale(panel: Any, metric: str, words: str) -> None:
    from matplotlib.ticker import ScalarFormatter

    panel.set_ylabel(words.format(metric))
    if metric == "perplexity":
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(ScalarFormatter())


def _draw(panel: Any, cell: Mapping[str, Any], colour: int, name: str) -> None:
    curve = cell["curve"]
    beyond = "" if cell["within_budget"] else " (exceeds the budget)"
    style = "-" if cell["within_budget"] else "--"
    style += "o" if len(curve["rounds"]) == 1 else ""  # a line of one point is none
    panel.plot(curve["rounds"], curve["mean"], style, color=f"C{colour}", label=label(name) + beyond)
    if None not in curve["sd"]:
        low = [mean - sd for mean, sd in zip(curve["mean"], curve["sd"], strict=True)]
        high = [mean + sd for mean, sd in zip(curve["mean"], curve["sd"], strict=True)]
        panel.fill_between(curve["rounds"], low, high, color=f"C{colour}", alpha=0.2)


def _label(cell: Mapping[str, Any], by_variant: bool) -> str:
    """The method, or the variant where each has one method; the panel's title has the variant otherwise."""
    return str(cell["method"] if by_variant or not cell["variant"] else cell["variant"])


@contextmanager
def figures(what: str) -> Iterator[Any]:
    """The class Figure of matplotlib, for pictures that are made and saved inside the `with` statement.

    Names are taken as text: `$` and `_` begin no formulas, and nobody disappears from a legend.
    Raises ConfigError without matplotlib; `what` needs it.
    """
    with needing("plot", what):
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    with rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield Figure


def label(name: str) -> str:
    """A name for a title or legend: not long, and not one that matplotlib leaves out for its first character."""
    shown = short(name, 60)
    return f" {shown}" if shown.startswith("_") else shown
