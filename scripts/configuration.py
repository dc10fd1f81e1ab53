"""Write docs/configuration.md, which says what every key of a configuration means, from the code that reads it."""

from __future__ import annotations

from pathlib import Path

from msfusion.experiment.config.described import page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
