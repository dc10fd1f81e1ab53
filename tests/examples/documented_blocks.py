"""The code of the documentation, read from its pages: each block with the page and the line where it begins."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "toml", "sh", "text")
"""What a block may be. `text` is what is read and not run: a formula, a picture, what a command prints."""

_FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")
_FILE = re.compile(r"# ([\w./-]+\.(?:py|toml))\s*\n")


@dataclass(frozen=True)
class Block:
    """A block of code. `line` is that of its first line of code, counted from 1."""

    page: str
    line: int
    language: str
    text: str
    printed: str = ""
    """What the last command of it prints, where the page shows that in a block of text right after it."""

    @property
    def place(self) -> str:
        """Page and line, as an editor opens them."""
        return f"{self.page}:{self.line}"

    @property
    def first(self) -> str:
        """Its first line without a comment, by which tables of tests name it: its number changes more often."""
        first = self.text.split("\n", 1)[0]
        return re.sub(r"\s+#.*", "", first).strip()

    @property
    def file(self) -> str | None:
        """The file whose content it is, where its first line says so (`# mine.py`)."""
        found = _FILE.match(self.text)
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page. Raises ValueError, with the line, for one of no known language or without a fence."""
    name = page.relative_to(ROOT).as_posix()
    lines = page.read_text().splitlines()
    found: list[Block] = []
    number = after = 0  # `after`: the line behind the last block
    while number < len(lines):
        line = lines[number]
        fence = _FENCE.fullmatch(line)
        number += 1
        if fence is None:
            if line.startswith("    ") and not lines[number - 2].strip():
                raise ValueError(f"{name}:{number}: code that is indented says not what it is: fence it")
            continue
        indent, ticks, language = fence.groups()
        begin = number
        while lines[number].strip() != ticks:
            number += 1
        if language not in LANGUAGES:
            raise ValueError(
                f"{name}:{begin}: a block of '{language}' should be one of {', '.join(LANGUAGES)}"
            )
        text = "\n".join(each.removeprefix(indent) for each in lines[begin:number]) + "\n"
        if language == "text" and found and found[-1].language == "sh" and after == begin - 2:
            found[-1] = replace(found[-1], printed=text)
        found.append(Block(name, begin + 1, language, text))
        number += 1
        after = number
    return found
