"""The page as a file: at the end of a run, of a comparison, or whenever it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msfusion.data.spec import is_pretrained
from msfusion.experiment.config import config_of_run
from msfusion.experiment.kinds import prepare
from msfusion.experiment.page.about import about
from msfusion.experiment.page.build import page, page_data
from msfusion.experiment.page.reading import Run, item, read_runs
from msfusion.files import write_text
from msfusion.imports import is_reference
from msfusion.models.build import BUILT_IN

REPORT = "report.html"
_BUILT_IN_DATA = ("digits", "python-docs")


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of the runs in some directories, by default to `report.html` in the first, and return its path.

    Raises RunDirectoryError where there is no run, or the page cannot be written.
    """
    runs = read_runs(paths)
    for run in runs:
        add_windows(run)
    where = paths[0] / REPORT if out is None else out
    write_text(where, page(page_data(runs, paths)))
    return where


def leave_report(path: Path) -> None:
    """Write the page of a run that has just ended beside its other files. Whatever fails leaves the run as it is."""
    try:
        write_text(path / REPORT, page(page_data(read_runs([path]), [path])))
    except Exception as error:  # a mistake in a page is no reason for a run of a week to end with a traceback
        logging.getLogger("msfusion").warning(
            "msfusion: the page of the run could not be written (%s).", type(error).__name__
        )


def add_windows(run: Run) -> None:
    """Find out again what a run of an older version has not noted: who held which units, what the data is.

    It takes preparing the run once more. Nothing of a user's own is called for that, and nothing downloaded: who sends
    a run directory would else decide what runs here.
    """
    if run.about or not run.config_text:
        return
    reason = _not_again(run.table)
    if reason is None:
        try:
            noted = about(prepare(config_of_run(run.path / "config.toml")))
        except Exception as error:  # data that is elsewhere, a file of strangers
            reason = f"it cannot be prepared again ({type(error).__name__})"
        else:
            noted.pop("environment")  # that of this machine
            if item(run.table, "data", "source") not in _BUILT_IN_DATA:
                noted.pop("labels", None)  # of a file here, which is nobody's business
            run.about = noted
            return
    run.problems.append(
        f"who held which units was not noted when it began, and is not found out again: {reason}"
    )


def _not_again(table: dict[str, Any]) -> str | None:
    """Why a run is not prepared again to find out what it has not noted; None where it is."""
    named = next((text for text in _texts(table) if is_reference(text)), None)
    if named is not None:
        return f"it is made by {named}, which a report does not call"
    if "extends" in table:
        return "its configuration is not a resolved one"
    source, tokenizer = item(table, "data", "source"), item(table, "data", "tokenizer")
    if not isinstance(source, str) or not (source in _BUILT_IN_DATA or Path(source).exists()):
        return "its data is not on this machine"
    if item(table, "model", "name") not in BUILT_IN or (tokenizer and is_pretrained(str(tokenizer))):
        return "its model or tokenizer is not a built-in one"
    return None


def _texts(value: object) -> Iterator[str]:
    """All texts in a configuration, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield str(key)
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
