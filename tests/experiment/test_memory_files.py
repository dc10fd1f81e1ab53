"""What participants keep, beside the checkpoints: written once, and found again bit for bit or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from quick import QUICK_SETTINGS
from torch import Tensor
from watching import Stopping

from msfusion.errors import RunDirectoryError
from msfusion.experiment import memory_files
from msfusion.experiment.config import load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.fingerprint import Fingerprint
from msfusion.experiment.memory_files import check_with_memories
from msfusion.experiment.train import train
from msfusion.federated.memory import Memories
from msfusion.files import read_tensors, write_tensors

LARGE = 2**18
"""So many float32 numbers are the fewest bytes for which there is a file."""
FINGERPRINT = Fingerprint("of a configuration", {"training": "one"}, {}, "of a model")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", "seed = 0\n", FINGERPRINT)


def large(value: float) -> Tensor:
    return torch.full((LARGE,), float(value))


def save(run: RunDirectory, rounds: int, memories: Memories) -> None:
    """The checkpoint of a round, with a state that is its number."""
    run.add_metrics({"round": rounds})
    run.save_checkpoint(rounds, {"state": torch.tensor(rounds)}, "same", memories)


def there(run: RunDirectory) -> list[str]:
    return sorted(path.stem for path in (run.path / "checkpoints").iterdir())


def read(run: RunDirectory) -> tuple[int, Mapping[int, Mapping[str, Tensor]], list[str]]:
    """After how many rounds a new process would go on, with what memories, and what it would be told."""
    told: list[str] = []
    checkpoint = RunDirectory(run.path).load_checkpoint("same", told.append)
    return (0, {}, told) if checkpoint is None else (checkpoint.rounds, checkpoint.memories, told)


def test_what_stays_is_written_once_and_what_changes_is_in_a_new_file(run: RunDirectory) -> None:
    first = {3: {"logits": large(1)}, 5: {"logits": large(2), "few": torch.ones(2)}}
    save(run, 1, first)
    save(run, 2, first)
    assert there(run) == ["memory-000001", "round-000001", "round-000002"]
    assert (run.path / "checkpoints" / "round-000002.safetensors").stat().st_size < 2000
    second = {**first, 3: {"logits": large(7)}}
    save(run, 3, second)
    assert there(run) == ["memory-000001", "memory-000003", "round-000002", "round-000003"]
    rounds, memories, told = read(run)
    assert (rounds, told) == (3, [])
    assert {who: sorted(memory) for who, memory in memories.items()} == {3: ["logits"], 5: ["few", "logits"]}
    for who, memory in second.items():
        assert all(torch.equal(memories[who][name], tensor) for name, tensor in memory.items())


def test_a_file_goes_with_the_last_checkpoint_that_needs_it(run: RunDirectory) -> None:
    for rounds in range(1, 4):
        save(run, rounds, {0: {"logits": large(rounds)}})
    assert there(run) == ["memory-000002", "memory-000003", "round-000002", "round-000003"]
    for rounds in (4, 5):
        save(run, rounds, {})
    assert there(run) == ["round-000004", "round-000005"]


def test_one_byte_too_few_for_a_file_is_in_the_checkpoint(run: RunDirectory) -> None:
    save(run, 1, {0: {"a": torch.zeros(4 * LARGE - 1, dtype=torch.uint8)}})
    assert there(run) == ["round-000001"]
    assert read(run)[1][0]["a"].shape == (4 * LARGE - 1,)


def test_a_tensor_that_was_written_into_is_another(run: RunDirectory) -> None:
    memory = {0: {"logits": large(1)}}
    save(run, 1, memory)
    memory[0]["logits"].mul_(3)
    save(run, 2, memory)
    assert there(run) == ["memory-000001", "memory-000002", "round-000001", "round-000002"]
    assert read(run)[1][0]["logits"][0] == 3


def test_a_new_process_need_not_write_it_again(run: RunDirectory) -> None:
    save(run, 1, {0: {"logits": large(1)}})
    again = RunDirectory(run.path)
    checkpoint = again.load_checkpoint("same")
    assert checkpoint is not None
    written = (run.path / "checkpoints" / "memory-000001.safetensors").stat().st_mtime_ns
    save(again, 2, checkpoint.memories)
    assert there(run) == ["memory-000001", "round-000001", "round-000002"]
    assert (run.path / "checkpoints" / "memory-000001.safetensors").stat().st_mtime_ns == written
    assert read(run)[0] == 2


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "removed", "of another round"])
def test_where_one_is_damaged_the_checkpoint_before_it_goes_on(run: RunDirectory, damage: str) -> None:
    save(run, 1, {0: {"logits": large(1)}})
    save(run, 2, {0: {"logits": large(2)}})
    older, newer = (run.path / "checkpoints" / f"memory-00000{number}.safetensors" for number in (1, 2))
    if damage == "cut":
        os.truncate(newer, newer.stat().st_size // 2)
    elif damage == "emptied":
        os.truncate(newer, 0)
    elif damage == "flipped":
        content = bytearray(newer.read_bytes())
        content[len(content) // 2] ^= 1
        newer.write_bytes(content)
    elif damage == "removed":
        newer.unlink()
    else:
        shutil.copyfile(older, newer)
    rounds, memories, told = read(run)
    assert rounds == 1
    assert memories[0]["logits"][0] == 1
    assert told == [f"{newer.with_name('round-000002.safetensors')} is damaged: going on after round 1"]
    with pytest.raises(RunDirectoryError):
        check_with_memories(newer.with_name("round-000002.safetensors"))


def test_where_one_that_all_need_is_gone_the_run_begins_again(run: RunDirectory) -> None:
    memory = {0: {"logits": large(1)}}
    save(run, 1, memory)
    save(run, 2, memory)
    (run.path / "checkpoints" / "memory-000001.safetensors").unlink()
    rounds, _, told = read(run)
    assert rounds == 0
    assert len(told) == 2


def test_a_run_that_begins_again_keeps_its_own_files(run: RunDirectory) -> None:
    """Those of the rounds that it had done before lie in its way: they are whole, and of later rounds."""
    for rounds in (1, 2, 3):
        save(run, rounds, {0: {"logits": large(rounds)}})
    run.keep_metrics(0)
    again, memory = RunDirectory(run.path), {0: {"logits": large(7)}}
    for rounds in (1, 2):
        save(again, rounds, memory)
        rounds_read, memories, told = read(again)
        assert (rounds_read, told) == (rounds, [])
        assert memories[0]["logits"][0] == 7
    assert there(again) == ["memory-000001", "round-000001", "round-000002"]


def test_what_somebody_removed_is_written_again(run: RunDirectory) -> None:
    memory = {0: {"logits": large(1)}}
    save(run, 1, memory)
    (run.path / "checkpoints" / "memory-000001.safetensors").unlink()
    save(run, 2, memory)
    assert there(run) == ["memory-000002", "round-000001", "round-000002"]
    assert read(run)[0] == 2


@pytest.mark.parametrize(
    "references",
    [
        None,
        [1],
        {"../other.safetensors": {"sha256": "0", "names": []}},
        {"": {"sha256": "0", "names": []}},
        {"memory-000001.safetensors": ["sha256", "names"]},
        {"memory-000001.safetensors": {"names": []}},
        {"memory-000001.safetensors": {"sha256": 3, "names": []}},
        {"memory-000001.safetensors": {"sha256": "0", "names": [["logits"]]}},
    ],
)
def test_a_checkpoint_that_names_no_such_files_is_damaged(run: RunDirectory, references: object) -> None:
    save(run, 1, {0: {"logits": large(1)}})
    path = run.path / "checkpoints" / "round-000001.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, "memories": references})
    assert read(run) == (0, {}, [f"{path} is damaged: beginning again"])
    with pytest.raises(RunDirectoryError, match="does not say which files"):
        check_with_memories(path)
    save(run, 2, {})
    assert there(run) == ["memory-000001", "round-000001", "round-000002"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("rounds", "1"), ("rounds", 2), ("run", None), ("metrics", 0), ("order", 3), ("order", [["state"]])],
)
def test_a_checkpoint_that_says_something_else_of_itself_is_damaged(
    run: RunDirectory, key: str, value: object
) -> None:
    save(run, 1, {})
    path = run.path / "checkpoints" / "round-000001.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, key: value})
    assert read(run) == (0, {}, [f"{path} is damaged: beginning again"])


@pytest.mark.parametrize(("stay", "file"), [(4, "memory-000001"), (3, "memory-000002")])
def test_a_file_that_holds_older_things_for_the_most_part_is_written_anew(
    run: RunDirectory, stay: int, file: str
) -> None:
    """By hand: what ten participants remember is more than three times as much as what three do."""
    memories = {who: {"logits": large(who)} for who in range(10)}
    save(run, 1, memories)
    memories = {who: memory for who, memory in memories.items() if who < stay}
    save(run, 2, memories)
    save(run, 3, memories)
    assert there(run) == [file, "round-000002", "round-000003"]
    rounds, found, _ = read(run)
    assert rounds == 3
    assert [float(found[who]["logits"][0]) for who in range(stay)] == [*range(stay)]


def test_what_a_killed_process_left_goes_when_the_run_ends(run: RunDirectory) -> None:
    for rounds in (1, 2, 3):
        save(run, rounds, {0: {"logits": large(rounds)}})
    folder = run.path / "checkpoints"
    shutil.copyfile(folder / "round-000002.safetensors", folder / "round-000001.safetensors")
    shutil.copyfile(folder / "memory-000002.safetensors", folder / "memory-000001.safetensors")
    run.save_model({"state": torch.tensor(3)})
    run.finish({})
    assert there(run) == ["memory-000002", "memory-000003", "round-000002", "round-000003"]


def test_one_tensor_at_a_time_it_is_the_same(run: RunDirectory) -> None:
    save(run, 1, {0: {"logits": large(1)}, 2: {"few": torch.arange(3)}})
    save(run, 2, {0: {"logits": large(1)}, 2: {"few": torch.arange(4)}})
    streamed, metadata = check_with_memories(run.path / "checkpoints" / "round-000002.safetensors")
    assert metadata["rounds"] == 2
    assert sorted(streamed.forms) == [".memory.0.logits", ".memory.2.few", "state"]
    assert streamed.forms[".memory.0.logits"] == (torch.float32, (LARGE,))
    assert torch.equal(streamed.read(".memory.0.logits"), large(1))
    assert torch.equal(streamed.read(".memory.2.few"), torch.arange(4))


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, pytest.param(3, marks=pytest.mark.release)])
def test_a_run_of_blocks_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Stopped before, and just after, the second block has its turn; whatever is kept is in files."""
    settings = ("method.start=blocks", "method.passes=1", "participants.ratio=0.5", "rounds=5")
    config = load_config(None, [*QUICK_SETTINGS, *settings])
    train(config, tmp_path / "whole")
    monkeypatch.setattr(memory_files, "ENOUGH", 1)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", watcher=Stopping(after))
    train(config.changed({"run.workers": 2}), tmp_path / "stopped", resume=True)
    ends = [tmp_path / each / "model.safetensors" for each in ("whole", "stopped")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    (kept,) = (tmp_path / "stopped" / "checkpoints").glob("memory-*")
    digest = RunDirectory(tmp_path / "whole").read_fingerprint().digest
    held = [RunDirectory(each.parent).load_checkpoint(digest) for each in ends]
    assert held[0] is not None
    assert held[1] is not None
    for who, memory in held[0].memories.items():
        assert memory.keys() == held[1].memories[who].keys()
        assert all(torch.equal(held[1].memories[who][name], tensor) for name, tensor in memory.items())
    kept.write_bytes(b"")
    with pytest.raises(RunDirectoryError, match=r"the finished run in .* is damaged"):
        train(config, tmp_path / "stopped", resume=True)
