"""What MkDocs is told besides mkdocs.yml: what becomes of links from a page to files of the repository.

A page is read on the site as well as in the repository. There a link to `../examples/fedgrow.toml` leads to the file;
the site has no such file, so the name alone stands. A line `Code: [name](../src/msfusion/FILE.py#name)` leads to
the file there; on the site it becomes the source of that function, as it is when the site is built. A link to a file
or a function that is gone ends the build.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")
CODE = re.compile(r"^Code: \[[^\]]*\]\(\.\./([^)#]+\.py)#([\w.]+)\)$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with code in it, and with links out of the documentation as text.

    Raises FileNotFoundError and LookupError for what is not there.
    """

    def named(found: re.Match[str]) -> str:
        text, target, _anchor = found.groups()
        if not (ROOT / target).exists():
            raise FileNotFoundError(
                f"{page.file.src_path} links to ../{target}, which is not in the repository"
            )
        return text if target in text else f"{text} (`{target}`)"

    def shown(found: re.Match[str]) -> str:
        file, name = found.groups()
        return f'```python title="{name} in {file}"\n{source(ROOT / file, name)}```'

    return _LINK.sub(named, CODE.sub(shown, markdown))


def source(file: Path, name: str) -> str:
    """The lines of a function, or of a method (`Class.method`), with its decorators, as if it stood by itself.

    Raises FileNotFoundError where there is no such file, and LookupError where it has no such function.
    """
    text = file.read_text(encoding="utf-8")
    inside: list[ast.stmt] = ast.parse(text).body
    found: ast.stmt | None = None
    for part in name.split("."):
        found = next((each for each in inside if getattr(each, "name", None) == part), None)
        if not isinstance(found, ast.FunctionDef | ast.ClassDef):
            raise LookupError(f"{file.name} has no {name}")
        inside = found.body
    assert isinstance(found, ast.FunctionDef | ast.ClassDef)
    first = min([found.lineno, *(each.lineno for each in found.decorator_list)])
    lines = text.splitlines()[first - 1 : found.end_lineno]
    return textwrap.dedent("\n".join(lines)) + "\n"
