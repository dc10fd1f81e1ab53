"""What the doctor finds: packages that are absent or of other versions, folders that cannot be written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import msfusion

from msfusion.experiment import doctor
from msfusion.extras import install

NEEDED = [
    "torch>=2.9",
    "typer>=0.20; extra == 'cli'",
    "grpcio>=1.70; extra == 'stream'",
    "x>=1,<2; extra == 'flower'",
]
THERE = {"torch": "2.13.0+cpu", "typer": "0.20.1"}


def found(monkeypatch: pytest.MonkeyPatch, there: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The findings on a machine with these packages."""
    monkeypatch.setattr(doctor, "requires", lambda _: NEEDED)
    monkeypatch.setattr(doctor, "_version", there.get)
    return {each["what"].partition(":")[0]: each for each in doctor.examine()}


def test_extras_that_are_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    told = found(monkeypatch, THERE)
    assert (told["cli"]["state"], told["cli"]["found"]) == ("fine", "typer 0.20.1")
    assert (told["stream"]["state"], told["stream"]["found"]) == ("missing", "without grpcio")
    assert told["stream"]["remedy"] == install("stream")
    assert told["needed always"]["state"] == "fine"
    assert told["plot"]["state"] == "amiss"  # the installation does not know it


@pytest.mark.parametrize(("version", "state"), [("2.0", "amiss"), ("1.9rc1", "fine"), ("0.9", "amiss")])
def test_other_versions(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    assert found(monkeypatch, {**THERE, "x": version})["flower"]["state"] == state


def test_what_is_always_needed_is_never_merely_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, {})["needed always"]["state"] == "amiss"


def test_little_room_is_amiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    told = found(monkeypatch, THERE)
    assert (told["here"]["state"], told["here"]["remedy"]) == ("amiss", "make room")


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    told = found(monkeypatch, THERE)
    assert told["here"]["found"].endswith("cannot be written (Permission denied)")


def test_the_command_says_by_its_code_whether_anything_is_amiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor,
        "requires",
        lambda _: ["torch>=2.9", *(f"torch>=2.9; extra == '{each}'" for each in doctor.EXTRAS)],
    )
    monkeypatch.setattr(doctor, "_version", THERE.get)
    result = msfusion("doctor", "--json")
    states = {each["state"] for each in json.loads(result.stdout)}
    assert result.exit_code == int("amiss" in states)
    monkeypatch.setattr(doctor, "_version", {}.get)
    assert msfusion("doctor").exit_code == 1
