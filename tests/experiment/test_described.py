"""What is said of the keys of a configuration: `msfusion init`, and docs/configuration.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from commands import msfusion, refused

from msfusion.experiment.config import Config, load_config
from msfusion.experiment.config.described import commented, page, tables
from msfusion.experiment.config.errors import known_keys

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_what_the_code_says() -> None:
    assert (DOCS / "configuration.md").read_text() == page(), "run python scripts/configuration.py"


def test_every_key_is_there_once() -> None:
    found = [f"{table.name}.{key.name}".lstrip(".") for table in tables() for key in table.keys]
    sections = [table.name for table in tables() if table.name]
    assert sorted({*found, *sections}) == sorted(set(known_keys(Config)))
    said = {f"{table.name}.{key.name}": key for table in tables() for key in table.keys}
    assert said["method.passes"].default == "8"
    assert said["method.passes"].kind == "whole number, at least 1"
    assert said["training.optimizer"].kind == 'one of "sgd", "adam", "adamw"'
    assert said["method.codec"].default is None
    assert said["method.codec"].kind == "text or table"
    assert said["data.options"].kind == "table"


def test_what_is_written_is_the_built_in_job(here: Path) -> None:
    done = msfusion("init")
    assert done.exit_code == 0
    assert "msfusion train job.toml" in done.output
    assert load_config(Path("job.toml")).difference(load_config(None)) is None
    refused(msfusion("init"), "job.toml is there already")


def test_data_and_model_of_ones_own(here: Path) -> None:
    assert msfusion("init", "mine.toml", "--data", 'a "folder"', "--model", "mine:network").exit_code == 0
    config = load_config(Path("mine.toml"))
    assert (config.data.source, config.model.name) == ('a "folder"', "mine:network")
    refused(msfusion("init", "nowhere/mine.toml"), "nowhere/mine.toml")
    assert not Path("nowhere").exists()


def test_a_comment_that_is_made_a_line_is_read() -> None:
    """Each default as it stands there, one table at a time."""
    written = commented(every=True)
    for table in ("data", "training", "evaluation", "run"):
        text = re.search(rf"^(?:# )?\[{table}\].*?(?=^(?:# )?\[|\Z)", written, re.MULTILINE | re.DOTALL)
        assert text is not None
        lines = [line.removeprefix("# ") for line in text[0].splitlines() if " = ..." not in line]
        values = tomllib.loads("\n".join(lines))[table]
        config = load_config(None, [f"{table}.{key}={_said(value)}" for key, value in values.items()])
        assert config.difference(load_config(None)) is None


def _said(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value).replace("'", '"')


@pytest.mark.parametrize("name", ["split", "grow", "network", "comparison"])
def test_tables_that_are_not_needed_are_there_as_comments(name: str) -> None:
    assert f"\n# [{name}]" in commented(every=True)
    assert f"[{name}]" not in commented()


def test_a_short_file_has_the_usual_keys_each_with_a_comment(here: Path) -> None:
    assert msfusion("init").exit_code == 0
    text = Path("job.toml").read_text()
    found = tomllib.loads(text)
    for key in (
        "data.source",
        "model.name",
        "rounds",
        "participants.count",
        "participants.ratio",
        "method.name",
    ):
        table, _, name = key.rpartition(".")
        assert name in (found[table] if table else found)
    assert {"learning_rate", "batch_size", "local_epochs"} <= {*found["training"]}
    assert {"threads", "workers"} <= {*found["run"]}
    head, lines = text.partition("\n\n")[0], [line for line in text.splitlines() if " = " in line]
    assert "docs/configuration.md" in head
    assert len(lines) < 25
    assert all("  # " in line for line in lines)


def test_a_whole_file_has_every_key(here: Path) -> None:
    assert msfusion("init", "--all").exit_code == 0
    text = Path("job.toml").read_text()
    assert load_config(Path("job.toml")).difference(load_config(None)) is None
    for table in tables():
        for key in table.keys:
            assert "." in key.name or re.search(rf"^(# )?{key.name} = ", text, re.MULTILINE), key.name
