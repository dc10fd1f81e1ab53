"""What a try of a run found, as a table and sentences."""

from __future__ import annotations

from msfusion.experiment.report.table import Column, Row, Table
from msfusion.experiment.report.words import duration, percent
from msfusion.scoring import number_told


def check_table(found: Row) -> Table:
    """The run at its learning rate, a third and three times of it, and the small model."""
    columns = (
        Column("method", "method", align="left"),
        Column("learning rate", "learning_rate", "{:.3g}".format),
        Column("loss", "loss", number_told, missing="not finite"),
        Column("accuracy", "accuracy", percent, optional=True),
        Column("perplexity", "perplexity", "{:.2f}".format, optional=True),
        Column("a round", "seconds", duration, optional=True),
    )
    part = f"{found['examples']:,} training examples, tried on {found['tested_on']:,} others"
    notes = []
    if found["constant_answer"] is not None:
        notes.append(
            f"A model that always gives the same answer has a loss of {number_told(found['constant_answer']['loss'])}."
        )
    if len(found["tries"]) == 3:
        notes.append("The small model is not tried beside it: this run begins as that.")
    return Table(f"{found['rounds']} rounds on {part}", columns, found["tries"], notes=notes)


def check_lines(found: Row) -> list[str]:
    """How long the run will take here, and what to do before it."""
    lines = []
    if found["expected_seconds"] is not None:
        lines.append(f"The whole run will take about {duration(found['expected_seconds'])} on this machine.")
    lines += [f"Advice: {sentence}." for sentence in found["advice"]]
    return lines if found["advice"] else [*lines, "Nothing seems amiss."]
