"""The console: whatever is printed is text. Imports rich, so it is imported where something is to be printed."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from msfusion.quoting import plain


class PlainConsole(Console):
    """Takes no markup and no emoji codes in what it prints, titles and cells of tables included.

    Characters that would command the terminal are shown as escapes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Whoever read the output has left: told as any broken pipe, where rich would end the program."""
        raise BrokenPipeError

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string passes here on its way to the terminal."""
        return super().render_str(plain(text), **options)
