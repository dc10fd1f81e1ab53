"""The documentation as a site: it is built, every link leads somewhere, and no page asks another machine for more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages. A link that leads nowhere, or a page that nothing leads to, would end the build."""
    pytest.importorskip("material", reason="needs mkdocs-material")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_the_reference_is_made_from_docstrings(site: Path) -> None:
    text = (site / "reference.html").read_text()
    for name in (
        "msfusion.federation.Federation",
        "msfusion.predictor.load_predictor",
        "msfusion.width.trace.trace",
    ):
        assert f'id="{name}"' in text
    assert "ready to predict" in text


def test_pages_of_methods_show_the_code(site: Path) -> None:
    """The function itself stands where the page links to its file in the repository."""
    text = (site / "copies.html").read_text()
    assert "KinAccumulator._change in src/msfusion/averaging/kin.py" in text
    assert "largest" in text.split("KinAccumulator._change in")[1].split("</pre>")[0]
    assert not any("Code: " in page.read_text() for page in site.glob("*.html"))


def test_no_page_asks_another_machine_for_anything(site: Path) -> None:
    asked = re.compile(
        r"""<(?:script|img|iframe|link rel="(?:stylesheet|preconnect|icon)")[^>]*(?:src|href)="(https?:)?//"""
    )
    for page in site.glob("*.html"):
        assert asked.search(page.read_text()) is None, page.name
    for style in site.rglob("*.css"):
        assert re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()) is None, style.name
