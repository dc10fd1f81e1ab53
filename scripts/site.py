"""What MkDocs is told besides mkdocs.yml: links from a page to files of the repository become their names.

A page is read on the site as well as in the repository. There a link to `../examples/fedgrow.toml` leads to the file;
the site has no such file, so the name alone stands, and a link to a file that is gone ends the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with links out of the documentation as text. Raises FileNotFoundError for what is not there."""

    def named(found: re.Match[str]) -> str:
        text, target, _anchor = found.groups()
        if not (ROOT / target).exists():
            raise FileNotFoundError(
                f"{page.file.src_path} links to ../{target}, which is not in the repository"
            )
        return text if target in text else f"{text} (`{target}`)"

    return _LINK.sub(named, markdown)
