"""An audit as tables: what each update gave away, beside what anybody could have guessed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msfusion.experiment.report.table import Column, Row, Table
from msfusion.experiment.report.words import percent

_WHO = (Column("who", "participant", align="left", whole=True), Column("examples", "examples"))

_DISTANCE = "{:.3f}".format
_LABELS = (
    *_WHO,
    Column("distance from the true shares", "distance", _DISTANCE),
    Column("of uniform shares", "distance_of_uniform", _DISTANCE),
    Column("classes named rightly", "precision", percent),
    Column("classes found", "recall", percent),
    Column("naming all is right", "guessing", percent),
)
_TOKENS = (
    *_WHO,
    Column("tokens", "tokens"),
    Column("named", "tokens_named"),
    Column("named rightly", "precision", percent),
    Column("found", "recall", percent),
    Column("naming all is right", "guessing", percent),
)
_TABLES = {
    "labels": ("which labels a participant has, from {}", _LABELS),
    "tokens": ("which tokens its texts have, from {}", _TOKENS),
}


def audit_tables(audited: Row) -> list[Table]:
    """A table for each attack that applies."""
    tables = []
    for name, found in audited["attacks"].items():
        if found["applies"]:
            title, columns = _TABLES[name]
            mean: list[dict[str, Any]] = [{"participant": "mean", "examples": None, **found["mean"]}]
            if "sum" in found:
                mean.append({**found["sum"], "participant": f"sum of {len(found['sum']['participants'])}"})
            told = title.format(" and ".join(found["looked_at"]))
            titled = f"{audited['method']}, round {audited['round']}: {told}"
            tables.append(Table(titled, columns, found["participants"], mean))
    return tables


def audit_lines(audited: Row) -> Iterator[str]:
    """Why the other attacks do not apply, and what is to be kept in mind."""
    if audited["secure"]:
        yield (
            "With method.secure no single update can be read: rows of participants are attacks on what they sent under "
            "masks, so what is found there is chance. The sum of all can be read."
        )
    for name, found in audited["attacks"].items():
        if not found["applies"]:
            yield f"The attack on {name} does not apply: {found['why']}."
    yield (
        "The server knows this much at least: these are two simple attacks, and who knows more finds more "
        "(docs/privacy.md)."
    )
