"""Words of others are text: short, one line of a terminal, never markup."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from commands import QUICK, msfusion, refused
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from torch import nn

from msfusion.cli.console import PlainConsole
from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, MsfusionError
from msfusion.experiment.report.plot import save_plot
from msfusion.federated.training import TrainingSettings
from msfusion.models.spec import ModelSpec
from msfusion.quoting import plain, quoted, sentence, short

ESCAPES = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "bell\x07",
    "\x9b2J",
    "over\rwritten",
    "\u202egnorw",
    "\ud800",
]
MARKUP = ["[red]x[/red]", "[/]", "[link=http://x]y[/link]", ":smile:", "[bold]", "a[0]"]


@pytest.mark.parametrize("text", ESCAPES, ids=ascii)
def test_what_commands_a_terminal_is_shown_as_an_escape(text: str) -> None:
    for shown in (plain(text), short(text), quoted(text), sentence(text), str(MsfusionError(text))):
        assert shown.isprintable()
    for shown in (plain(text), short(text)):
        assert shown.isascii()
        assert shown.encode().decode("unicode_escape") == text


@given(st.text())
def test_text_that_prints_is_left_alone(text: str) -> None:
    printable = "".join(each for each in text if each.isprintable())
    assert plain(printable) == printable
    assert plain(plain(text)) == plain(text)


def printed(what: object, *, terminal: bool) -> str:
    file = io.StringIO()
    PlainConsole(file=file, width=100, force_terminal=terminal, color_system=None).print(what)
    return file.getvalue()


@pytest.mark.parametrize("name", [*MARKUP, *ESCAPES], ids=ascii)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_name_is_text_wherever_a_table_has_it(name: str, terminal: bool) -> None:
    table = Table(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    shown = printed(table, terminal=terminal)
    assert shown.count(plain(name)) == 4
    assert plain(name) in printed(name, terminal=terminal)
    assert "\x1b]" not in shown
    assert "\x07" not in shown


def test_modules_with_such_names_are_inspected(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("[red]first\x1b[31m", nn.Linear(12, 8))
            self.add_module("$second_$", nn.Linear(8, 3))

        def forward(self, numbers: object) -> object:
            first, second = self.children()
            return second(first(numbers).relu())

    Model.__name__ = "[bold]\x1b[31m"
    import torch

    import msfusion.experiment.report.describe as describing
    from msfusion.width.trace import trace

    model = Model()
    width_map = trace(model, (torch.rand(2, 12),))
    monkeypatch.setattr(describing, "describe", lambda *_: describing.description("m", model, width_map))
    shown = msfusion("inspect", "m")
    assert shown.exit_code == 0, shown.output
    assert "\x1b" not in shown.output
    assert "[bold]\\x1b[31m: " in shown.stdout
    assert "[red]first\\x1b[31m" in shown.stdout.replace("\n", "")


@pytest.mark.parametrize(
    "name", ["$x_{", "a $ b $ c", "_hidden", "\\frac{", "^_^", "x" * 5000, "\x1b[1m", "日本"]
)
def test_a_picture_takes_any_name(tmp_path: Path, name: str) -> None:
    cell = {
        "method": "msfusion",
        "variant": name,
        "ratio_label": "0.25",
        "within_budget": True,
        "curve": {"metric": "accuracy", "rounds": [1, 2], "mean": [0.1, 0.2], "sd": [0.0, 0.1]},
    }
    cells = [cell, {**cell, "method": "small"}, {**cell, "method": "fedavg", "variant": f"{name}2"}]
    save_plot({"cells": cells, "seeds": [0]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("x" * 10**6, id="text"),
        pytest.param([1] * 10**5, id="list"),
        pytest.param({"a": "b" * 10**6}, id="table"),
        pytest.param(10**5000, id="digits"),
        pytest.param([10**5000], id="list of digits"),
        pytest.param(float("nan"), id="nan"),
    ],
)
def test_a_value_is_not_repeated_whole(value: object) -> None:
    assert 0 < len(quoted(value)) < 150
    assert len(str(MsfusionError(f"data.source = '{'x' * 10**6}' is missing: choose another."))) < 1000
    assert str(MsfusionError("word " * 10**5 + "remedy.")).endswith("remedy.")


def test_values_without_end_are_quoted() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert "levels" in quoted(deep)


@pytest.mark.parametrize("value", [pytest.param(-(10**5000), id="digits"), -1])
def test_settings_of_the_library_are_refused_in_words(value: int) -> None:
    for make in (
        lambda: TrainingSettings(batch_size=value),
        lambda: DataSpec(length=value),
        lambda: DataSpec(vocabulary_size=value),
        lambda: ModelSpec(seed=value),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "\x1b[31m.toml"],
        ["train", "n" * 5000],
        ["inspect", "[red]\x1b[31m"],
        ["plan", "--set", "data.source=" + "x" * 50_000],
        ["plan", "--set", "model.name=\x1b[31m[red]"],
        ["train", *QUICK, "--out", "o" * 5000],
        ["export", "\x1b]0;t\x07", "--out", "x"],
    ],
    ids=range(7),
)
def test_mistakes_about_such_names_are_short_and_plain(here: Path, arguments: list[str]) -> None:
    result = msfusion(*arguments)
    refused(result, "")
    assert len(result.stderr) < 2500
    assert result.stderr.removesuffix("\n").isprintable()
