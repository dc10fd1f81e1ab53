"""docs/architectures.md, from the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from architectures.catalogue import MUST_BE_REFUSED

Row = Mapping[str, Any]

HEAD = """# Architectures

Which models can be narrowed, and is the sub-model that holds everything the user's own model?
`benchmarks/architectures.py` traces each of these small models, and calls the sub-model beside a model that msfusion
never saw, with the same random numbers, on inputs that neither has seen: outputs in evaluation and in training mode,
gradients of every parameter, parameters and buffers after two steps, other numbers of examples, other lengths. This is
done in float64 where the model runs in it.

- **narrowed**: the share of parameters that lie on a narrowed axis; **kept**: what a sub-model of a quarter of each
  group holds of the parameters.
- **outputs** and **gradients**: the largest difference, relative to the largest value. **draws** says that dropout
  takes its random numbers in another order than the model; then it was compared without dropout.
- **other sizes**: `refused` where a call with another number of examples or another length is refused with a
  TypeError that says so.
- **seconds**: of the processor, to trace.

A model is *mapped*, *refused* in a sentence, *wrong* (it differs without a word) or *crashed* (any other exception).
Some models must be refused: no graph can hold what they do, so what is run would not be what was proved. They have a
table of their own, and count among all.
"""


def page(result: Row) -> str:
    """The whole page."""
    rows, machine = result["rows"], result["machine"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "transformers", "peft") if name in machine
    )
    commit = str(machine.get("commit"))  # with a remark behind it where some rows are of another one
    source = f"commit {commit[:9]}{commit[40:]}, {versions}, `python benchmarks/architectures.py`"
    parts = [HEAD, overview(result["summary"]), f"({source}.)\n"]
    for kind in kinds:
        chosen = [row for row in rows if row["kind"] == kind and row["name"] not in MUST_BE_REFUSED]
        parts += [f"## {kind[0].upper()}{kind[1:]} ({len(chosen)})\n", table(chosen), ""]
    purpose = [row for row in rows if row["name"] in MUST_BE_REFUSED]
    rest = [row for row in rows if row["name"] not in MUST_BE_REFUSED]
    parts += [f"## Refused on purpose ({len(purpose)})\n", on_purpose(purpose), ""]
    parts += ["## What else is not mapped, in its own words\n", refusals(rest), ""]
    parts += ["## Where less than 80 % is narrowed\n", unnarrowed(rows), ""]
    return "\n".join(parts)


def overview(summary: Row) -> str:
    """How many got which verdict."""
    every, wide = summary["architectures"], summary["mapped_with_80_percent_narrowed"]
    possible, mapped = every - summary["must_be_refused"], summary["can_be_mapped_with_80_percent_narrowed"]
    return (
        f"**{every} architectures: {summary['mapped']} mapped, {summary['refused']} refused, {summary['wrong']} wrong, "
        f"{summary['crashed']} crashed. With at least 80 % of their parameters narrowed are mapped {wide} of all "
        f"{every} ({share(wide, every)}), and {mapped} of the {possible} that can be mapped "
        f"({share(mapped, possible)}); {summary['refused_on_purpose']} of the other {summary['must_be_refused']} are "
        "refused, as they must be.**\n"
    )


def share(part: int, whole: int) -> str:
    """A share with one place, rounded down."""
    return f"{1000 * part // max(whole, 1) / 10} %"


def on_purpose(rows: Iterable[Row]) -> str:
    """One line for each architecture that must be refused: why, and with what words it is."""
    lines = [
        "| architecture | what it stands for | why | verdict | its words |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        verdict = row["verdict"] if row["verdict"] == "refused" else f"**{row['verdict']}**"
        words = cell(row["words"])
        lines.append(
            f"| {row['name']} | {cell(row['style'])} | {MUST_BE_REFUSED[row['name']]} | {verdict} | {words} |"
        )
    return "\n".join(lines)


def table(rows: Iterable[Row]) -> str:
    """One line for each architecture."""
    lines = [
        "| architecture | what it stands for | verdict | narrowed | kept at 1/4 | outputs | gradients | "
        "other sizes | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            row["name"], cell(row["style"]), row["verdict"] if row["verdict"] == "mapped" else f"**{row['verdict']}**",
            percent(row.get("reach")), percent(row.get("kept")), outputs(row), error(row.get("gradients")),
            sizes(row.get("other_sizes")), row.get("trace_seconds", ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(str(each) for each in cells)} |")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def error(difference: float | None) -> str:
    """A difference; nothing where nothing was compared."""
    if difference is None:
        return ""
    return "equal" if difference == 0 else f"{difference:.0e}"


def outputs(row: Row) -> str:
    """The larger difference of both modes."""
    found = [row[mode] for mode in ("evaluation", "training") if mode in row]
    return error(max(found) if len(found) == 2 else None) + (", draws" if "draws" in row else "")


def sizes(said: str | None) -> str:
    """Whether other sizes answer alike."""
    if said is None or said == "equal":
        return said or ""
    return "refused: " + ", ".join(
        part.partition(" refused: ")[0] for part in said.split("; ") if " refused: " in part
    )


def refusals(rows: Iterable[Row]) -> str:
    """The words for whatever is not mapped."""
    lines = [
        f"- `{row['name']}` {row['verdict']}: {cell(row['words'])}"
        for row in rows
        if row["verdict"] != "mapped"
    ]
    return "\n".join(lines) or "Nothing."


def unnarrowed(rows: Iterable[Row]) -> str:
    """What is kept whole, and which operators had no rule."""
    lines = []
    for row in rows:
        if row["verdict"] == "mapped" and row["reach"] < 0.8:
            reasons = "; ".join(
                f"{100 * share:.0f} % {cell(why)}" for why, share in row["whole"].items() if share > 0.02
            )
            unknown = (
                f" (operators without a rule: {', '.join(sorted(row['unknown']))})" if row["unknown"] else ""
            )
            lines.append(f"- `{row['name']}` {percent(row['reach'])}: {reasons}{unknown}")
    return "\n".join(lines) or "Nowhere."


def cell(text: str) -> str:
    """Text that cannot break a table or be taken for markup."""
    for mark in "|<>*_`":
        text = text.replace(mark, f"\\{mark}")
    return text
