"""The container file says what the repository says; building it takes an engine for containers, and a network."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES = (ROOT / "Containerfile").read_text().splitlines()


def said(instruction: str) -> list[str]:
    """What stands behind an instruction, wherever it occurs."""
    return [line.removeprefix(f"{instruction} ") for line in LINES if line.startswith(f"{instruction} ")]


def test_what_is_copied_is_there_and_is_not_ignored() -> None:
    copied = [name for line in said("COPY") for name in line.split()[:-1]]
    assert set(copied) == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src"}
    assert all((ROOT / name).exists() for name in copied)
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(kept) == sorted(copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {project["readme"], *project["license-files"]}
    assert all(name in copied or name.startswith("src/") for name in needed)


def test_versions_and_extras_are_those_of_the_package() -> None:
    arguments = dict(line.split("=", 1) for line in said("ARG"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(arguments["EXTRAS"].split(",")) <= set(project["optional-dependencies"])
    assert f"torch=={arguments['TORCH']}\n" in (ROOT / "constraints.txt").read_text()
    (base,) = said("FROM")
    tested = re.search(r"\(Python (3\.\d+)\)", (ROOT / "constraints.txt").read_text())
    assert tested is not None
    assert base == f"python:{tested[1]}-slim"


def test_it_is_a_command_of_nobody_who_is_root() -> None:
    assert said("ENTRYPOINT") == ['["msfusion"]']
    assert said("USER") == ["msfusion"]
    assert LINES.index("USER msfusion") < LINES.index('ENTRYPOINT ["msfusion"]')
