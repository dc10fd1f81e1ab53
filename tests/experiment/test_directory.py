"""Run directories: whole files, checkpoints that survive damage, and refusals in one sentence."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfusion.errors import RunDirectoryError
from msfusion.experiment.directory import RunDirectory, fresh_path, newest_path
from msfusion.experiment.fingerprint import Fingerprint
from msfusion.experiment.lock import locked
from msfusion.files import (
    Streamed,
    append_line,
    check_tensors,
    read_tensors,
    too_many_are_open,
    write_streamed,
    write_tensors,
    write_text,
    written_digest,
)

FINGERPRINT = Fingerprint("of a configuration", {"training": "one"}, {}, "of a model")


def state(value: float = 1.0, size: int = 5) -> dict[str, Tensor]:
    return {"b": torch.full((size,), value), "a": torch.arange(3), "scalar": torch.tensor(2.0)}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", "seed = 0\n", FINGERPRINT)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tiny file system needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_checkpoints_are_read_back_bit_for_bit_and_two_are_kept(run: RunDirectory) -> None:
    for rounds in range(1, 5):
        run.add_metrics({"round": rounds})
        run.save_checkpoint(rounds, state(rounds / 3), "same")
    checkpoint = run.load_checkpoint("same")
    assert checkpoint is not None
    assert checkpoint.rounds == 4
    assert all(torch.equal(tensor, state(4 / 3)[name]) for name, tensor in checkpoint.state.items())
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == [
        "round-000003.safetensors",
        "round-000004.safetensors",
    ]


def test_a_checkpoint_has_the_memories_beside_the_state(run: RunDirectory) -> None:
    run.add_metrics({"round": 1})
    memories = {3: {"a": torch.ones(2), ".round": torch.tensor(0)}, 11: {"a/b.c": torch.zeros(1)}}
    run.save_checkpoint(1, state(), "same", memories)
    assert len(files(run.path / "checkpoints")) == 1
    checkpoint = run.load_checkpoint("same")
    assert checkpoint is not None
    assert list(checkpoint.state) == list(state())  # in its order, in which messages are made
    assert {participant: list(memory) for participant, memory in checkpoint.memories.items()} == {
        3: [".round", "a"],
        11: ["a/b.c"],
    }
    assert torch.equal(checkpoint.memories[3]["a"], torch.ones(2))


@settings(max_examples=25)
@given(cut=st.floats(0, 0.999))
def test_a_checkpoint_that_was_cut_short_falls_back_to_the_one_before(
    tmp_path_factory: pytest.TempPathFactory, cut: float
) -> None:
    run = RunDirectory.create(tmp_path_factory.mktemp("cut") / "run", "", FINGERPRINT)
    for rounds in (1, 2):
        run.add_metrics({"round": rounds})
        run.save_checkpoint(rounds, state(rounds), "same")
    newest = run.path / "checkpoints" / "round-000002.safetensors"
    os.truncate(newest, int(newest.stat().st_size * cut))
    checkpoint = run.load_checkpoint("same")
    assert checkpoint is not None
    assert checkpoint.rounds == 1


@settings(max_examples=60)
@given(place=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_checkpoint_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    run = RunDirectory.create(tmp_path_factory.mktemp("flipped") / "run", "", FINGERPRINT)
    for rounds in (1, 2):
        run.add_metrics({"round": rounds})
        run.save_checkpoint(rounds, state(rounds), "same", {1: {"kept": torch.tensor([0.5])}})
    newest = run.path / "checkpoints" / "round-000002.safetensors"
    content = bytearray(newest.read_bytes())
    content[int(len(content) * place)] ^= 1 << bit
    newest.write_bytes(content)
    checkpoint = run.load_checkpoint("same")
    assert checkpoint is not None
    if checkpoint.rounds == 2:  # white space of the header, or a letter that JSON writes in two ways
        assert torch.equal(checkpoint.state["b"], state(2)["b"])
    else:
        assert checkpoint.rounds == 1
        assert torch.equal(checkpoint.state["b"], state(1)["b"])


def test_a_checkpoint_of_another_run_is_not_used_and_not_written_over(run: RunDirectory) -> None:
    for rounds, whose in ((1, "one"), (2, "other")):
        run.add_metrics({"round": rounds})
        run.save_checkpoint(rounds, state(rounds), whose)
    checkpoint = run.load_checkpoint("one")
    assert checkpoint is not None
    assert checkpoint.rounds == 1
    with pytest.raises(RunDirectoryError, match=r"round-000001.safetensors is a checkpoint of another run"):
        run.load_checkpoint("third")


def test_a_checkpoint_is_used_only_with_the_metrics_that_it_went_with(run: RunDirectory) -> None:
    for rounds in (1, 2):
        run.add_metrics({"round": rounds, "loss": rounds / 7})
        run.save_checkpoint(rounds, state(rounds), "same")
    lines = run.metrics.read_text()
    run.metrics.write_text(lines.replace("0.2857", "0.2957"))
    checkpoint = run.load_checkpoint("same")
    assert checkpoint is not None
    assert checkpoint.rounds == 1
    run.metrics.write_text(lines.replace("0.1428", "0.1429"))
    assert run.load_checkpoint("same") is None


def test_a_damaged_end_is_reported(run: RunDirectory) -> None:
    run.add_metrics({"round": 1})
    run.save_checkpoint(1, state(), FINGERPRINT.digest)
    run.save_model(state())
    run.finish({"accuracy": 0.5})
    run.check_end()
    assert run.read_summary() == {"accuracy": 0.5}
    checkpoint = run.path / "checkpoints" / "round-000001.safetensors"
    for path in (run.metrics, run.model, run.summary, checkpoint):
        before = path.read_bytes()
        path.write_bytes(before.replace(b"1", b"2", 1))
        with pytest.raises(RunDirectoryError, match=r"is damaged \(.*delete its summary.json"):
            run.check_end()
        path.write_bytes(before)
    write_tensors(run.model, state(2.0), {"format": 1})
    with pytest.raises(RunDirectoryError, match="not those with which the run ended"):
        run.check_end()
    run.model.unlink()
    assert not run.finished


def test_a_configuration_that_is_not_the_runs_is_refused(run: RunDirectory) -> None:
    assert RunDirectory.reopen(run.path).read_fingerprint() == FINGERPRINT
    run.config.write_text("")
    with pytest.raises(RunDirectoryError, match=r"config.toml was changed after the run began"):
        RunDirectory.reopen(run.path)
    run.config.write_text("seed = 0\n")
    run.fingerprint.write_text(run.fingerprint.read_text().replace("one", "two"))
    with pytest.raises(RunDirectoryError, match=r"fingerprint.json is damaged"):
        RunDirectory.reopen(run.path)
    run.fingerprint.unlink()
    with pytest.raises(RunDirectoryError, match="older msfusion"):
        RunDirectory.reopen(run.path)


def test_a_checkpoint_is_used_only_with_all_its_lines_of_metrics(run: RunDirectory) -> None:
    for rounds in (1, 2):
        run.add_metrics({"round": rounds})
        run.save_checkpoint(rounds, state(rounds), "same")
    os.truncate(run.metrics, run.metrics.stat().st_size - 4)
    checkpoint = run.load_checkpoint("same")
    assert checkpoint is not None
    assert checkpoint.rounds == 1


def test_metrics_after_the_checkpoint_and_torn_lines_are_dropped(run: RunDirectory) -> None:
    for rounds in (1, 2, 3):
        run.add_metrics({"round": rounds, "loss": rounds / 7})
    with run.metrics.open("a") as file:
        file.write('{"round": 4, "lo')
    assert [line["round"] for line in run.read_metrics()] == [1, 2, 3]
    kept = run.keep_metrics(2)
    assert kept == [{"round": 1, "loss": 1 / 7}, {"round": 2, "loss": 2 / 7}]
    assert run.read_metrics() == kept


@pytest.mark.release
def test_equal_states_give_equal_bytes_in_every_process(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from msfusion.files import write_tensors;"
        "t = torch.ones(3); s = {'b': torch.zeros(2), 'a': t, 'tied': t};"
        "s = s if sys.argv[2] == '1' else dict(reversed(s.items()));"
        "write_tensors(Path(sys.argv[1]), s, {'rounds': 1, 'config': 'x', 'more': 2})"
    )
    for order in "12":
        subprocess.run([sys.executable, "-c", program, tmp_path / order, order], check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    tensors, metadata = read_tensors(tmp_path / "1")
    assert tensors.keys() == {"a", "b", "tied"}
    assert metadata == {"rounds": 1, "config": "x", "more": 2}


def test_a_full_disk_loses_nothing(tiny_disk: Path) -> None:
    run = RunDirectory.create(tiny_disk / "run", "seed = 0\n", FINGERPRINT)
    run.add_metrics({"round": 1})
    run.save_checkpoint(1, state(), "same")
    before = files(run.path)
    with pytest.raises(
        RunDirectoryError, match=r"round-000002.safetensors cannot be written: No space left"
    ) as error:
        run.save_checkpoint(2, state(2.0, size=50_000), "same")
    assert "\n" not in str(error.value)
    with pytest.raises(RunDirectoryError, match="No space left"):
        run.add_metrics({"round": 2, "text": "x" * 100_000})
    with pytest.raises(RunDirectoryError, match="No space left"):
        write_text(run.config, "x" * 100_000)
    assert files(run.path) == before
    assert run.read_metrics() == [{"round": 1}]
    assert run.config.read_text() == "seed = 0\n"
    checkpoint = run.load_checkpoint("same")
    assert checkpoint is not None
    assert checkpoint.rounds == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "file", state(1.0), {})
    before = (tmp_path / "file").read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        write_tensors(tmp_path / "file", state(2.0), {})
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        append_line(tmp_path / "lines", "one")
    assert (tmp_path / "file").read_bytes() == before
    assert files(tmp_path) == {"file", "lines"}
    assert (tmp_path / "lines").read_bytes() == b""


def test_a_directory_that_holds_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RunDirectoryError, match="already holds files; continue that run with --resume"):
        RunDirectory.create(tmp_path, "", FINGERPRINT)
    assert files(tmp_path) == {"mine.txt"}
    with pytest.raises(RunDirectoryError, match="is a file, not a directory"):
        RunDirectory.create(tmp_path / "mine.txt", "", FINGERPRINT)
    with pytest.raises(RunDirectoryError, match=r"has no config.toml"):
        RunDirectory.reopen(tmp_path)


def test_what_a_run_killed_in_its_first_moments_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-1-config.toml").touch()
    with RunDirectory.create(tmp_path, "seed = 0\n", FINGERPRINT).locked():
        assert files(tmp_path) == {".lock", "config.toml", "fingerprint.json"}


@pytest.mark.release
def test_a_second_process_is_kept_out(run: RunDirectory) -> None:
    program = (
        "import sys; from pathlib import Path; from msfusion.experiment.directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).locked(): pass"
    )
    with run.locked():
        refused = subprocess.run([sys.executable, "-c", program, run.path], capture_output=True, text=True)
    assert "is in use by another run" in refused.stderr
    with RunDirectory(run.path).locked():  # and let in afterwards, whoever it is
        pass


def test_nothing_stays_of_a_directory_in_which_nothing_came_to_be(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "a" / "b"),
        pytest.raises(RunDirectoryError, match="in use"),
        locked(tmp_path / "a" / "b"),
    ):
        pass
    assert not any(tmp_path.iterdir())
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "kept").touch()
    assert files(tmp_path) == {"a/.lock", "a/kept"}


def test_fresh_directories_are_counted_up(tmp_path: Path) -> None:
    parent = tmp_path / "runs"
    assert [fresh_path("digits", parent).name for _ in range(3)] == ["digits-1", "digits-2", "digits-3"]
    (parent / "digits-10").mkdir()
    (parent / "digits-big-99").mkdir()
    assert newest_path("digits", parent).name == "digits-10"
    assert fresh_path("digits", parent).name == "digits-11"
    with pytest.raises(RunDirectoryError, match="There is no run"):
        newest_path("other", parent)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (
            "checkpoints/round-000004.safetensors",
            lambda text: text[:-1] + b"?",
            "checkpoints/round-000004.safetensors is damaged: going on after round 3",
        ),
        ("metrics.jsonl", lambda text: text.replace(b": 2", b"= 2"), "damaged in line 2: beginning again"),
        (
            "metrics.jsonl",
            lambda text: text.replace(b": 4", b"= 4"),
            "damaged in line 4: going on after round 3",
        ),
        ("metrics.jsonl", lambda text: text.replace(b"0.5", b"0.6"), "was changed .*: beginning again"),
        ("metrics.jsonl", lambda text: b"", "ends after line 0: beginning again"),
    ],
)
def test_what_damage_costs_is_told_once(
    run: RunDirectory, file: str, change: Callable[[bytes], bytes], told: str
) -> None:
    for rounds in range(1, 5):
        run.add_metrics({"round": rounds, "loss": 0.5})
        run.save_checkpoint(rounds, state(), "same")
    notes: list[str] = []
    run.load_checkpoint("same", notes.append)
    assert notes == []
    (run.path / file).write_bytes(change((run.path / file).read_bytes()))
    run.load_checkpoint("same", notes.append)
    assert len(notes) == 1
    assert re.search(told, notes[0])


def test_whoever_opens_a_file_too_many_open_ones_are_known(tmp_path: Path) -> None:
    """Python to begin with, then safetensors, which has PyTorch open it once more."""
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, {"w": torch.ones(2)}, {})
    written_digest(path)  # nothing is imported from here on
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        free = os.open(path, os.O_RDONLY)
        os.close(free)
        for left in (0, 1):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, hard))
            with pytest.raises(RunDirectoryError, match="Too many open files") as error:
                written_digest(path)
            assert too_many_are_open(error.value)
    assert not too_many_are_open(RunDirectoryError("damaged"))


@pytest.mark.parametrize("held", ["checkpoint", "metrics"])
def test_a_run_waits_for_files_that_cannot_be_opened(held: str, tmp_path: Path) -> None:
    """All that this process may open is open elsewhere, for a moment."""
    directory = RunDirectory(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    directory.save_checkpoint(1, {"w": torch.ones(2)}, "run")  # nothing is imported from here on
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    give_back = threading.Timer(0.5, resource.setrlimit, (resource.RLIMIT_NOFILE, (soft, hard)))
    give_back.start()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    begin = time.monotonic()
    try:
        if held == "metrics":
            directory.add_metrics({"round": 1})
        else:
            directory.save_checkpoint(2, {"w": torch.ones(2)}, "run")
    finally:
        give_back.join()
    assert time.monotonic() - begin >= 0.4
    written = ["metrics.jsonl"] if held == "metrics" else []
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == written


def test_a_run_does_not_wait_for_files_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msfusion.files.OPENING_SECONDS", 0.3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(RunDirectoryError, match="Too many open files"):
            RunDirectory(tmp_path).add_metrics({"round": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_written_tensor_by_tensor_is_the_same_file(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 4), "a": torch.tensor(3), ".x": torch.zeros(2, dtype=torch.float64),
        'é"q': torch.randn(5).bfloat16(), "u": torch.arange(7, dtype=torch.uint8), "e": torch.empty(0, 3),
        "t": torch.tensor([True, False]), "h": torch.randn(3).half(), "c": torch.randn(2, dtype=torch.complex64),
    }  # fmt: skip
    order = list[str]()

    def read(name: str) -> torch.Tensor:
        order.append(name)
        return tensors[name]

    forms = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "whole", tensors, {"rounds": 3, "é": "é"})
    write_streamed(tmp_path / "streamed", Streamed(forms, read), {"rounds": 3, "é": "é"})
    assert order == sorted(tensors)
    written = [tmp_path / name for name in ("whole", "streamed")]
    assert written[0].read_bytes() == written[1].read_bytes()
    assert written[0].stat().st_mode == written[1].stat().st_mode
    found, metadata = check_tensors(tmp_path / "streamed")
    assert (metadata, found.forms) == (read_tensors(tmp_path / "whole")[1], forms)
    damaged = bytearray(written[1].read_bytes())
    damaged[-1] ^= 1
    written[1].write_bytes(damaged)
    with pytest.raises(RunDirectoryError, match="is damaged"):
        check_tensors(written[1])
