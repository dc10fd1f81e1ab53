"""What every test gets: one thread per process, the same seed, and a place among the workers.

MSFUSION_CHECK_TYPES=1 has jaxtyping and beartype check every call's types and shapes (`scripts/check --types`). That
takes time, so it is not on by default.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHECKED = os.environ.get("MSFUSION_CHECK_TYPES") == "1"

if CHECKED:
    from typed import check_types_of

    check_types_of("msfusion")

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import environment
from forge import Forge
from hypothesis import settings
from traced_once import trace_once_each

torch.set_num_threads(1)
# What is imported and traced stays until the end: looking through it again and again took a seventh of all tests' time.
gc.set_threshold(50_000, 50, 50)
settings.register_profile(
    "however long it takes", deadline=None
)  # what else runs beside a test does not fail it
settings.load_profile("however long it takes")

QUICK_MODELS = {"mlp", "resnet_short", "lstm", "gqa_slices", "low_rank"}
"""Of the zoo (tests/width), those on which the fast tests run."""

CI_MODELS = QUICK_MODELS | {
    "drawn", "pairs", "scattered", "complex", "by_identity", "BloomForCausalLM", "bounded",
    "spatial_attention", "normalised", "distributions", "added_at_positions", "token_bag", "ordered_topk",
    "picked_by_mask", "local_norm", "rotated", "windows", "unused", "inception", "prototypes_pairwise",
    "super_resolution", "ordered_sort", "ordered_conv1d", "in_place", "unet",
}  # fmt: skip
"""Those on which `scripts/check` runs: together they have most operators of the zoo, for an eighth of its time.
The tests of the others are marked `release`.
"""


SLOW = Path(__file__).with_name("slow.txt")
"""The tests that have taken more than a quarter of a second, written anew by `scripts/check --note-slow`."""

_seconds: dict[str, float] = {}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a trace or a module's fixture run in one process; those of most zoo models are slow."""
    slow = set(SLOW.read_text().split())
    _leave_all_but_one_to_releases(items)
    for item in items:
        if CHECKED and item.get_closest_marker("without_type_checks"):
            item.add_marker(pytest.mark.skip(reason="types are checked at every call"))
        folder, group = item.path.parent.name, item.path.stem
        given = getattr(getattr(item, "callspec", None), "params", {})
        if folder == "width" and (model := given.get("entry", given.get("name"))) is not None:
            group = str(model)
            if group not in QUICK_MODELS:
                item.add_marker(pytest.mark.slow)
            sweeps = (
                "entry" in given or item.path.stem == "test_proof"
            )  # over models that the package can narrow
            if sweeps and group not in CI_MODELS and "refused" not in item.name:
                item.add_marker(pytest.mark.release)
        elif _function(item.nodeid) in slow or item.get_closest_marker("release"):
            item.add_marker(pytest.mark.slow)
        if "forge" in getattr(item, "fixturenames", ()):
            group = "forge"  # which takes ten seconds to be made
        item.add_marker(pytest.mark.xdist_group(folder if folder == "growth" else group))


def _leave_all_but_one_to_releases(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is marked `one_in_ci`, mark all but the first `release`.

    The first is that of the first parameters which are not marked `release` themselves, in any order of the tests.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("one_in_ci") and not item.get_closest_marker("release"):
            cases.setdefault(_function(item.nodeid), []).append(item)
    for each in cases.values():
        for item in sorted(each, key=lambda item: tuple(item.callspec.indices.values()))[1:]:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.release)


LONGEST = ("forge", "growth", "test_documentation", "test_grow_run", "test_train", "test_export")
"""Groups that take long, some because they wait for processes."""


@pytest.hookimpl(specname="pytest_collection_modifyitems", trylast=True)  # after pytest-randomly has shuffled
def _longest_first(items: list[pytest.Item]) -> None:
    """Begin with the groups that take longest, so that no core is idle at the end; then with those of most tests.

    pytest-xdist itself would sort by the number of tests alone (`--no-loadscope-reorder` has it leave the order).
    """
    tests = Counter(map(_group, items))
    items.sort(key=lambda item: (_group(item) not in LONGEST, -tests[_group(item)]))


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    return str(marker.args[0]) if marker else ""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how long a test has taken; of one with parameters the longest case, fixtures included."""
    if os.environ.get("MSFUSION_NOTE_SLOW") == "1" and "PYTEST_XDIST_WORKER" not in os.environ:
        case = _function(report.nodeid)
        _seconds[case] = max(_seconds.get(case, 0.0), report.duration)


def pytest_sessionfinish() -> None:
    """Write the list of slow tests, where that was asked for."""
    if _seconds:
        SLOW.write_text("".join(f"{name}\n" for name, seconds in sorted(_seconds.items()) if seconds > 0.25))


def _function(name: str) -> str:
    """A test's file and function, without its parameters and the group that pytest-xdist writes behind it."""
    return name.partition("[")[0].partition("@")[0]


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Models built in a test have the same initial weights in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _runs_trace_each_model_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        trace_once_each(patch.setattr)
        yield


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    """Starts commands as processes, without the ten seconds that each would import."""
    given = {name: value for name, value in environment().items() if name != "COLUMNS"}
    with Forge(given) as forge:
        yield forge


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and tables as wide as in a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which `datasets` keeps what it reads.

    It leaves files open to the garbage collector, which warns of them: here and not in a later test. Frozen is what
    was there before, so that to collect takes no time.
    """
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    gc.freeze()
    yield tmp_path / "cache"
    gc.collect()
    gc.unfreeze()
