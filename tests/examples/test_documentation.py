"""Every block of code in the README and in docs/ does what a reader would have it do.

Blocks of one page are run in their order, in one folder of its own and with names in common; what the page takes for
granted (a folder of images, a model) is made beforehand (documented_readers.py). Python is run; a configuration is
read by the real loader and planned; commands are carried out with settings that make them quick, or, where
documented_commands.READ_ONLY says so and why, read by the program that they are for.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from documented_blocks import PAGES, ROOT, Block, blocks_of
from documented_commands import QUICK, READ_ONLY, carry_out, commands_in
from documented_readers import CHECKS, READERS, Key, Names, in_the_repository, unregistered

import msfusion
from msfusion.experiment.config import load_config
from msfusion.experiment.kinds import prepare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(  # of what `datasets` leaves open
        "ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]

BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.language != "text"]

RELEASE: dict[str | Key, str] = {
    (
        "docs/blocks.md",
        "msfusion compare src/msfusion/default.toml --methods msfusion,small --seeds 3 --out runs/blocks \\",
    ): "tests/experiment/test_compare.py compares in short",
    ("docs/bring-your-own.md", "[model]"): "tests/experiment/test_tasks.py has a regression",
    ("docs/choosing.md", "[participants]"): "tests/test_budgets.py finds ratios in short",
    ("docs/choosing.md", "msfusion compare rates.toml --out runs/rates"): "tests/experiment/test_compare.py",
    ("docs/extending.md", "cd examples/extend"): "tests/examples/test_extend.py runs it",
    ("docs/extending.md", CHECKS): "tests/examples/test_extend.py checks each of these parts",
    "docs/fine-tuning.md": "tests/models/test_own_tokens.py begins with trained weights",
    "docs/growth.md": "tests/growth grows smaller models, tests/experiment/test_grow_run.py plans a smaller job",
    ("docs/index.md", "pip install torch==2.13.0 -e '.[cli]'"): "README.md and docs/predict.md say the same",
    (
        "docs/privacy.md",
        "msfusion train --out runs/sum --set rounds=3 --set run.workers=1 --set method.name=small "
        "--set method.secure=true",
    ): "tests/experiment/test_audit.py attacks sums in short",
    ("docs/windows.md", "[participants]"): "tests/test_budgets.py finds ratios in short",
}
"""Blocks (page, first line), or pages, that `scripts/check --all` alone runs, and which test does the same in short."""

EXEMPT: dict[Key, str] = {}
"""Blocks (page, first line) that are not run, and why."""

SMALLER: dict[str, list[tuple[str, str]]] = {
    "docs/bring-your-own.md": [('"resnet"', '"convnet"')],
    "docs/extending.md": [("federation.rounds(20)", "federation.rounds(3)")],
    "docs/growth.md": [
        (
            '{"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}',
            '{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}',
        ),
        ("steps=100", "steps=2"),
        ("rounds=20", "rounds=1"),
        ("features = 24, layers = 2", "features = 8, layers = 1"),
        ("features = 32, layers = 2", "features = 12, layers = 1"),
        ("features = 40, layers = 3", "features = 12, layers = 1"),
    ],
    "docs/tour.md": [('"resnet"', '"convnet"')],
}
"""What is written otherwise before a page is run, so that it takes a second: sizes and numbers of rounds alone."""

CONTEXT = {
    "docs/growth.md": "examples/fedgrow.toml",
    "docs/split.md": "examples/split_digits.toml",
}
"""The configuration that a page is about, where it is not the built-in one."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "docs/growth.md": (*QUICK, "data.length=12", "model.options={features=16, heads=2, layers=1}"),
    "docs/many-machines.md": (*QUICK, "participants.count=3"),
    "docs/privacy.md": (*QUICK, "participants.count=3"),
    "docs/troubleshooting.md": tuple(each for each in QUICK if "local_epochs" not in each),
}
"""By page: settings for its configurations and commands, in place of those of QUICK that do not go with it."""


class Reading:
    """A reader of one page: where it stands, what it has, and which blocks are behind it."""

    def __init__(self, page: str, folder: Path) -> None:
        self.page, self.folder, self.cwd = page, folder, folder
        self.names: Names = {"__name__": "reader"}
        self.begun = False
        self.done: set[Block] = set()
        self.failed: Block | None = None

    def up_to(self, block: Block) -> None:
        """Run the page's blocks as far as this one; what has been run is not run again."""
        if self.failed is not None and self.failed != block:
            pytest.fail(f"{self.failed.place} comes before, and fails")
        if not self.begun:
            in_the_repository(self.folder)
            self.names |= READERS.get(self.page, nothing)(self.folder)
            for each in (each for each in BLOCKS if each.page == self.page and each.file is not None):
                with (self.folder / each.file).open("a") as file:
                    file.write(smaller(each))
            self.begun = True
        for each in (each for each in BLOCKS if each.page == self.page and each.line <= block.line):
            later = left_to_releases(each) and not left_to_releases(block)
            if each not in self.done and not later and key(each) not in EXEMPT:
                self.failed = each
                self.run(each)
                self.failed = None
                self.done.add(each)

    def run(self, block: Block) -> None:
        """Run a block; whatever it registers nobody else knows."""
        with unregistered():
            self.names |= READERS.get(key(block), nothing)(self.folder)
            self.run_as_written(block)
            if (then := AFTER.get(key(block))) is not None:
                then(self)

    def run_as_written(self, block: Block) -> None:
        text = smaller(block)
        {"python": self.run_python, "toml": self.run_toml, "sh": self.run_commands}[block.language](
            block, text
        )

    def run_python(self, block: Block, text: str) -> None:
        code = compile("\n" * (block.line - 1) + text, str(ROOT / block.page), "exec", dont_inherit=True)
        exec(code, self.names)

    def run_toml(self, block: Block, text: str) -> None:
        """A part of a configuration, which begins with a table, stands in the page's own or in the built-in one."""
        path = self.folder / (block.file or f"block-{block.line}.toml")
        if block.file is None:
            whole = CONTEXT.get(self.page, "src/msfusion/default.toml")
            path.write_text(f'extends = "{whole}"\n{text}' if text.startswith("[") else text)
        prepare(load_config(path, SETTINGS.get(self.page, QUICK))).plan()

    def run_commands(self, block: Block, text: str) -> None:
        commands = [*commands_in(text)]
        for number, words in enumerate(commands, 1):
            if words[0] == "cd":
                self.cwd = self.folder / words[1]
                os.chdir(self.cwd)
            else:
                printed = block.printed if number == len(commands) else ""
                carry_out(words, SETTINGS.get(self.page, QUICK), printed)


def key(block: Block) -> Key:
    return block.page, block.first


def left_to_releases(block: Block) -> bool:
    return key(block) in RELEASE or block.page in RELEASE


def smaller(block: Block) -> str:
    text = block.text
    for old, new in SMALLER.get(block.page, ()):
        text = text.replace(old, new)
    return text


def nothing(folder: Path) -> Names:
    return {}


def the_group_is_where_the_page_says(reading: Reading) -> None:
    group = reading.names["width_map"].groups[0]
    places = [(place.tensor, place.axis) for place in group.places]
    assert f"# {group.name} {group.units} {places}" in (ROOT / reading.page).read_text()


def what_was_encoded_comes_back(reading: Reading) -> None:
    names = reading.names
    assert names["same_shape"].shape == names["activations"].shape
    assert torch.equal(names["same_shape"], names["buffer"])


def the_tracker_is_told_each_round(reading: Reading) -> None:
    made = msfusion.Federation(
        reading.names["model"], [reading.names["dataset_of_a"]], callbacks=[reading.names["Tracker"]()]
    )
    told: list[tuple[int, dict[str, float]]] = reading.names["wandb"].lines
    made.fit(2)
    assert [step for step, _ in told] == [1, 2]
    assert all("training_loss" in figures for _, figures in told)
    assert reading.names["wandb"].finished == 1


def a_client_answers(reading: Reading) -> None:
    """With a slice of what the server's strategy has sent."""
    from flower_grid import FakeGrid, Node
    from flwr.app import ArrayRecord, ConfigRecord

    names = reading.names
    grid = FakeGrid({node: Node(names["fit"]) for node in (11, 12, 13)})
    first = ArrayRecord(names["Net"]().state_dict())
    message, *_ = names["strategy"].configure_train(1, first, ConfigRecord(), grid)
    answer = names["fit"](message, None)
    assert answer.content["metrics"]["train_loss"] > 0


AFTER: dict[Key, Callable[[Reading], None]] = {
    ("docs/codecs.md", "from msfusion import codecs"): what_was_encoded_comes_back,
    ("docs/extending.md", "class Tracker(msfusion.Callback):"): the_tracker_is_told_each_round,
    (
        "docs/flower.md",
        "from msfusion.engines.flower.strategy import SubModels, reply, sub_model",
    ): a_client_answers,
    ("docs/width-map.md", "import torch, msfusion"): the_group_is_where_the_page_says,
}
"""What is true after a block has run, where more is said of it than that it runs."""


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reading]:
    return {page: Reading(page, tmp_path_factory.mktemp("page")) for page in {each.page for each in BLOCKS}}


@pytest.fixture(scope="module", autouse=True)
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders called `photos` there are many."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@contextmanager
def standing_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current directory, from which modules are imported that no other page knows."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command line adds the current directory to it
    before = {*sys.modules}
    try:
        yield
    finally:
        for name in {*sys.modules} - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def cases() -> list[Any]:
    return [
        pytest.param(block, id=block.place, marks=pytest.mark.release if left_to_releases(block) else ())
        for block in BLOCKS
        if key(block) not in EXEMPT
    ]


@pytest.mark.parametrize("block", cases())
def test_a_block_does_what_it_says(
    block: Block, readings: dict[str, Reading], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = readings[block.page]
    with standing_in(reading.cwd, monkeypatch):
        reading.up_to(block)


def test_what_is_said_of_blocks_is_said_of_some() -> None:
    """A block that is gone, or begins otherwise by now, takes what is said of it here along."""
    there = Counter(map(key, BLOCKS))
    about = {*RELEASE, *EXEMPT, *AFTER, *READERS}
    assert all(there[each] == 1 for each in about if isinstance(each, tuple))
    pages = {block.page: (ROOT / block.page).read_text() for block in BLOCKS}
    assert {*(each for each in about if isinstance(each, str)), *SMALLER, *SETTINGS, *CONTEXT} <= {*pages}
    assert all(old in pages[page] for page, changes in SMALLER.items() for old, _ in changes)
    said = [words for block in BLOCKS if block.language == "sh" for words in commands_in(block.text)]
    programs = {word.removeprefix(".venv/bin/") for words in said for word in words[:2]}
    assert {*READ_ONLY} <= programs


def test_code_that_a_page_shows_is_there() -> None:
    """What the site makes of `Code:` lines, without building it; and every page of a method has some."""
    site = runpy.run_path(str(ROOT / "scripts" / "site.py"))
    shown = {page.name: site["CODE"].findall(page.read_text()) for page in PAGES}
    for file, name in (each for found in shown.values() for each in found):
        assert name.rpartition(".")[2] in site["source"](ROOT / file, name)
    assert all(shown[f"{page}.md"] for page in ("windows", "blocks", "copies", "split", "growth"))
    for name in ("no_such_function", "Server.no_such_method"):
        with pytest.raises(LookupError, match="no_such"):
            site["source"](ROOT / "src/msfusion/methods/split/sides.py", name)
