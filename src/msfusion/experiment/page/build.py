"""The page: the sections of some runs as data, and the file of HTML that shows them.

Whatever comes from a run is data in a block of JSON; the page's program puts it into the document as text. Nothing is
fetched: style, program and the library that draws stand in the file, and a content security policy forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from msfusion.experiment.page import closing, learning, parts, people, spending
from msfusion.experiment.page.reading import Cell, Run, cells_of
from msfusion.quoting import plain, sentence

FORMAT = 1
MOST_CELLS = 24
"""Methods (or variants of them) on one page."""

LIBRARY = ("d3.min.js", "plot.umd.min.js")
PROGRAM = ("charts.js", "windows.js", "page.js")
STYLE = "page.css"


def page_data(runs: Sequence[Run], paths: Sequence[Path] = (), *, live: bool = False) -> dict[str, Any]:
    """What the page shows of some runs, as plain values (JSON): finite numbers and printable texts alone.

    `paths` are the directories that were named; `live`: the page asks for newer data by itself.
    """
    cells = cells_of(runs)[:MOST_CELLS]
    names = [path.resolve().name or str(path) for path in paths] or [run.name for run in runs]
    sections: list[dict[str, Any] | None] = [_guarded("Runs", lambda: closing.overview(cells))]
    sections += [_guarded("Comparison", partial(closing.comparison, path)) for path in paths]
    sections.append(_guarded("Learning curves", lambda: learning.learning(cells)))
    sections.append(_guarded("Quality against cost", lambda: spending.spending(cells)))
    data: dict[str, Any] = clean(
        {
            "format": FORMAT,
            "title": f"msfusion: {', '.join(names[:3])}" + (" and more" if len(names) > 3 else ""),
            "live": live,
            "finished": bool(runs) and all(run.summary for run in runs),
            "sections": [section for section in sections if section is not None],
            "runs": [_about_cell(cell) for cell in cells],
        }
    )
    return data


_OF_A_CELL: Mapping[str, Callable[[Cell], dict[str, Any] | None]] = {
    "Class by class": learning.by_class,
    "Who held which units": parts.windows,
    "Coverage": parts.coverage,
    "How far apart": parts.apart,
    "Participants": people.people,
    "Who has which labels": people.labels,
    "Messages": spending.traffic,
    "Growth operators": parts.growth,
    "Costs at the end": closing.costs,
    "Configuration and environment": closing.origin,
}


def _about_cell(cell: Cell) -> dict[str, Any]:
    """What is shown of one method at a time: of its first run."""
    made = [_guarded(title, partial(make, cell)) for title, make in _OF_A_CELL.items()]
    return {"name": cell.name, "sections": [section for section in made if section is not None]}


def _guarded(title: str, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """A section, or in its place that it is missing: the files of a run may hold anything, in any form."""
    try:
        return make()
    except Exception as error:  # whatever a file of strangers leads to, the other sections are shown
        reason = sentence(f"{type(error).__name__}: {error}")
        return {
            "id": "missing",
            "title": title,
            "text": "",
            "problems": [f"This part is missing: the files of the run do not hold what it needs ({reason})."],
        }


def clean(value: Any) -> Any:
    """The same with null for numbers that are not finite, and characters that do not print as escapes."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(key)): clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [clean(each) for each in value]
    return value


def as_json(data: Mapping[str, Any]) -> str:
    """The data as JSON that can stand in a block of HTML: no character of it ends the block, or begins another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # of ASCII characters alone
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page(data: Mapping[str, Any]) -> str:
    """The whole page in one file."""
    style, scripts = asset(STYLE), [asset(name) for name in (*LIBRARY, *PROGRAM)]
    title = html.escape(str(data["title"]))
    policy = html.escape(content_policy(live=bool(data["live"])))
    blocks = "\n".join(f"<script>{script}</script>" for script in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n'
        '<main id="page"><noscript>This page draws its charts with a script of its own, which is switched off.'
        "</noscript></main>\n"
        f'<script type="application/json" id="data">{as_json(data)}</script>\n{blocks}\n</body>\n</html>\n'
    )


@cache
def content_policy(*, live: bool) -> str:
    """Only the style and the scripts of the page, by their digests; a live page may ask its own server for data."""
    scripts = " ".join(_digest(asset(name)) for name in (*LIBRARY, *PROGRAM))
    allowed = {
        "default-src": "'none'",
        "script-src": scripts,
        "style-src": _digest(asset(STYLE)),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        **({"connect-src": "'self'"} if live else {}),
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


@cache
def asset(name: str) -> str:
    """The text of a file that belongs to the page."""
    return (Path(__file__).with_name("assets") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
