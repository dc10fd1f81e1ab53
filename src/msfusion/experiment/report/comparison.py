"""A comparison as tables: every row's figures over the seeds, and what it took to be as good as was asked for."""

from __future__ import annotations

from functools import partial

from msfusion.experiment.report.table import Column, Row, Table
from msfusion.experiment.report.words import count, duration, mean_and_sd, percent, size
from msfusion.scoring import loss_told, number_told

_PERCENT = mean_and_sd("{:.1%}".format)
_ROUNDS = mean_and_sd("{:.1f}".format)
_loss = partial(loss_told, decimals=3)


def comparison_tables(comparison: Row) -> list[Table]:
    """All that a comparison has to say: targets and traffic where there are any."""
    tables = (comparison_table(comparison), targets_table(comparison), traffic_table(comparison))
    return [table for table in tables if table.rows]


def comparison_table(comparison: Row) -> Table:
    """Every method and ratio with mean ± standard deviation over the seeds."""
    cells = comparison["cells"]
    over = "* exceeds what a participant may hold and compute: a reference, not a rival"
    notes = [] if all(cell["within_budget"] for cell in cells) else [over]
    seeds, on = len(comparison["seeds"]), ", on validation data" if validates(comparison) else ""
    return Table(
        ("one seed" if seeds == 1 else f"{seeds} seeds, mean ± sd") + on, _columns(cells), cells, notes=notes
    )


def validates(comparison: Row) -> bool:
    """Whether its runs are tested on a share of the training examples."""
    data = comparison.get("config", {}).get("data", {})
    return data.get("validation_share") is not None


def _columns(cells: list[Row]) -> list[Column]:
    """What is left out where nothing is known of it: a method's own figures have columns by their names."""
    by_loss = not any("perplexity" in cell or "accuracy" in cell for cell in cells)
    own = dict.fromkeys(name for cell in cells for name in cell.get("metrics", {}))
    return [
        Column("method", lambda cell: cell["method"] + ("" if cell["within_budget"] else " *"), align="left"),
        Column("variant", "variant", align="left", missing="", optional=True),
        Column("ratio", "ratio_label"),
        Column("rounds", "rounds"),
        Column("perplexity", "perplexity", mean_and_sd("{:.2f}".format), optional=True),
        Column("accuracy", "accuracy", _PERCENT, optional=by_loss),
        Column("between participants", "accuracy_sd", _PERCENT, optional=True),
        Column("own labels", "own_accuracy", _PERCENT, optional=True),
        Column("between participants", "own_accuracy_sd", _PERCENT, optional=True),
        Column("loss", "loss", _loss_and_sd),
        *(_own_column(name) for name in own),
        Column("behind", lambda cell: cell.get("behind") and _behind(cell)),
        Column("gap closed", "gap_closed", _gap, optional=True),
        Column("holds", lambda cell: f"{count(cell['parameters'])} ({percent(cell['share'])})"),
        Column("FLOPs/example", "flops_per_example", count),
        Column("FLOPs in all", "total_flops", count),
        Column("bytes in all", "total_bytes", size),
        Column("FLOPs/answer", "inference_flops_per_example", count),
    ]


def _behind(cell: Row) -> str:
    """In what the row is compared by: in a comparison of several tasks, each in its own."""
    for figure, form in (("perplexity", ".2f"), ("accuracy", ".1%")):
        if figure in cell:
            return mean_and_sd(f"{{:+{form}}}".format, f"{{:{form}}}".format)(cell["behind"])
    return _signed_loss(cell["behind"])


def _loss_and_sd(spread: Row) -> str:
    """As many decimals in the standard deviation as in the mean: 4.164 ± 0.004."""
    usual = spread["mean"] is not None and _loss(spread["mean"]) == f"{spread['mean']:.3f}"
    return mean_and_sd(_loss, "{:.3f}".format if usual else _loss)(spread)


def _signed_loss(spread: Row) -> str:
    return mean_and_sd(lambda loss: _loss(loss) if loss < 0 else f"+{_loss(loss)}", _loss)(spread)


def _own_column(name: str) -> Column:
    return Column(name, lambda cell: cell.get("metrics", {}).get(name), mean_and_sd(number_told))


def _gap(closed: Row) -> str:
    """The share of the gap between the small model and FedAvg; where that gap is not more than chance, nothing."""
    return "-" if closed["share"] is None else f"{closed['share']:.0%}"


def targets_table(comparison: Row) -> Table:
    """What every method needed until it first reached each target accuracy; without rows where none was set."""
    rows = [
        {"name": _name(cell), "ratio": cell["ratio_label"], "runs": len(comparison["seeds"]), **target}
        for cell in comparison["cells"]
        for target in cell.get("targets", ())
    ]
    columns = [
        Column("method", "name", align="left"),
        Column("ratio", "ratio"),
        Column("accuracy", "accuracy", percent),
        Column("rounds", lambda row: _rounds(row, "reached in", "not reached")),
        Column("simulated time", "simulated_seconds", mean_and_sd(duration)),
        Column("bytes", "bytes", mean_and_sd(size)),
    ]
    return Table("until the accuracy was first reached, mean ± sd; bytes per participant", columns, rows)


def traffic_table(comparison: Row) -> Table:
    """What every row sent until it was as good as the first one; without rows where nothing is split."""
    rows = [
        {
            "name": _name(cell),
            "runs": len(comparison["seeds"]),
            **cell["until_baseline"],
            **cell["times_less"],
        }
        for cell in comparison["cells"]
        if cell.get("until_baseline")
    ]
    wanted = percent(rows[0]["accuracy"]) if rows else "-"
    columns = [
        Column("row", "name", align="left"),
        Column("rounds", lambda row: _rounds(row, "in", "never")),
        Column("activations", lambda row: row["activation_bytes"]["mean"], size),
        Column("gradients", lambda row: row["gradient_bytes"]["mean"], size),
        Column("times less up", "activations", "{:.1f}".format),
        Column("both ways", "both", "{:.1f}".format),
        Column("everything", "all", "{:.1f}".format),
    ]
    return Table(
        f"until as accurate as the seed's baseline less its sd ({wanted} in the mean)", columns, rows
    )


def _rounds(row: Row, some: str, none: str) -> str:
    """How many rounds it took; or in how many of the runs it came so far, if not in all."""
    reached, runs = row["reached"], row["runs"]
    if reached < runs:
        return f"{some} {reached} of {runs} runs" if reached else none
    return _ROUNDS(row["rounds"])


def _name(cell: Row) -> str:
    """A row of a comparison in words: its method, and its variant where it has one."""
    return f"{cell['method']}, {cell['variant']}" if cell["variant"] else str(cell["method"])
