"""Where a package is missing, one sentence names its extra, and the command that installs it."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
from commands import msfusion, refused

import msfusion as package
from msfusion import extras
from msfusion.errors import ConfigError, GrowthError

ROOT = Path(__file__).resolve().parents[1]


def test_extras_are_those_of_the_package() -> None:
    """Each extra's modules come from packages that pyproject.toml lists for it, and all of these are known."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in extras.MODULES.items():
        packages = [re.split(r"[<>=\[]", each)[0] for each in listed[extra]]
        homes = {package: {path.parts[0] for path in files(package) or ()} for package in packages}
        assert set(modules) <= set().union(*homes.values()), extra
        others = [package for package, parts in homes.items() if not parts & set(modules)]
        assert others == (["msgpack"] if extra == "flower" else [])  # which stands under stream
    assert extras.extra_of("grpc.aio") == "stream"
    assert extras.extra_of("msfusion.engines") is extras.extra_of("torch") is extras.extra_of(None) is None


class Noted:
    """A distribution with what pip has noted of where it came from."""

    def __init__(self, noted: str | None) -> None:
        self._noted = noted

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._noted


def noted(folder: Path, **about: Any) -> str:
    return json.dumps({"url": folder.as_uri(), "dir_info": about})


@pytest.mark.parametrize(
    ("found", "command"),
    [
        (noted(ROOT, editable=True), f"pip install -e '{ROOT}[data]'"),
        (noted(ROOT), "pip install 'msfusion[data]'"),
        (noted(Path("/elsewhere"), editable=True), "pip install 'msfusion[data]'"),
        (
            json.dumps({"url": "file:///dist/msfusion.whl", "archive_info": {}}),
            "pip install 'msfusion[data]'",
        ),
        (None, "pip install 'msfusion[data]'"),
        ("[]", "pip install 'msfusion[data]'"),
        ("no JSON", "pip install 'msfusion[data]'"),
    ],
)
def test_a_clone_installs_from_its_folder(
    found: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "distribution", lambda _: Noted(found))
    assert extras.install("data") == command


def test_a_folder_with_a_blank_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my clone"
    monkeypatch.setattr(extras, "distribution", lambda _: Noted(noted(folder, editable=True)))
    monkeypatch.setattr(extras, "__file__", str(folder / "src" / "msfusion" / "extras.py"))
    assert extras.install("cli") == f"pip install -e '{folder}[cli]'"


def test_what_needs_a_missing_package_is_told() -> None:
    told = r"^growing needs no_such_package: pip install .*\[plot\]'"
    with pytest.raises(GrowthError, match=told), extras.needing("plot", "growing", GrowthError):
        import no_such_package.part  # type: ignore[import-not-found]  # noqa: F401


@pytest.mark.parametrize("module", extras.MODULES["stream"])
def test_a_server_and_a_participant_say_what_they_lack(
    module: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither begins to wait for the other, and nothing is written."""
    (here / "job.toml").write_text("rounds = 1\n")
    monkeypatch.setitem(sys.modules, module, None)
    common = ("job.toml", "--plain-text", "--address", "127.0.0.1:7000")
    for arguments in (("serve", *common, "--out", "run"), ("join", *common, "--participant", "0")):
        refused(msfusion(*arguments), f"needs {module}: pip install")
    assert [each.name for each in here.iterdir()] == ["job.toml"]


def test_a_package_that_is_found_to_be_missing_late(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import in the middle of a command ends in a sentence too, and leaves nothing."""
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    told = msfusion("certificates", "--out", "keys", "--host", "example.org", "--participants", "2")
    refused(told, "needs cryptography: pip install")
    assert not list(here.iterdir())


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", package.__version__)
    assert f"## {package.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_an_extra_is_looked_for_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require("cli", "this test")
    monkeypatch.setitem(extras.MODULES, "plot", ("no_such",))
    with pytest.raises(ConfigError, match=r"^this test needs no_such: pip install .*\[plot\]'"):
        extras.require("plot", "this test")
