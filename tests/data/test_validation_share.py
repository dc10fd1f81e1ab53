"""`data.validation_share`: settings are chosen on training examples, and the test set is not looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from msfusion.batch import Batch
from msfusion.data import DataSpec, FederatedData, load_data
from msfusion.errors import ConfigError, DataError


def rows(batches: list[Batch]) -> list[tuple[float, ...]]:
    inputs = torch.cat([each.inputs[0].flatten(1) for each in batches])
    return sorted(tuple(row) for row in inputs.tolist())


def halves(share: float = 0.25) -> tuple[FederatedData, FederatedData]:
    plain = DataSpec(participants=3, max_train=400)
    return load_data(plain), load_data(
        DataSpec(participants=3, max_train=400, validation_share=share, max_test=1000)
    )


def test_a_share_of_each_label_of_the_training_examples_takes_the_place_of_the_test_set() -> None:
    all_, chosen = halves()
    assert rows([*chosen.participants, chosen.test]) == rows([*all_.participants])
    assert not {*rows([chosen.test])} & {*rows([all_.test])}
    counts = torch.cat([each.targets for each in all_.participants]).bincount(minlength=10)
    expected = [round(0.25 * count) for count in counts.tolist()]
    assert chosen.test.targets.bincount(minlength=10).tolist() == expected


@pytest.mark.slow
@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_no_seed_trains_on_what_another_is_tested_on(tmp_path: Path, task: str) -> None:
    """Of one file a fifth is the test set, under every seed; what is chosen on is drawn from the rest."""
    (tmp_path / "a.csv").write_text("size,label\n" + "".join(f"{row},{row % 3}\n" for row in range(120)))
    spec = {"source": str(tmp_path / "a.csv"), "task": task, "participants": 2, "input_column": ("size",)}
    tested = set(rows([load_data(DataSpec(**spec, normalise=False)).test]))  # type: ignore[arg-type]
    assert len(tested) == 24
    for seed in (1, 2):
        data = load_data(DataSpec(**spec, normalise=False, seed=seed))  # type: ignore[arg-type]
        assert {*rows([data.test])} == tested
        chosen = load_data(DataSpec(**spec, normalise=False, seed=seed, validation_share=0.25))  # type: ignore[arg-type]
        assert not tested & {*rows([chosen.test, *chosen.participants])}


def of_text(share: float, **more: object) -> tuple[FederatedData, FederatedData]:
    spec = {"length": 4, "participants": 2, "task": "language_modelling", **more}
    return load_data(DataSpec(**spec)), load_data(DataSpec(**spec, validation_share=share))  # type: ignore[arg-type]


def blocks(*batches: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.inputs[0].tolist()]


@pytest.mark.usefixtures("datasets_cache")
def test_of_running_text_it_is_the_ends_of_twenty_stretches(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"w{number} w{number + 1}" for number in range(800)))
    plain, chosen = of_text(0.3, source=str(text))
    all_, kept, held_out = blocks(*plain.participants), blocks(*chosen.participants), blocks(chosen.test)
    assert len(held_out) == round(0.3 * len(all_))
    assert [each for each in all_ if each in {*kept}] == kept  # in order, so that participants have stretches
    assert sorted(kept + held_out) == sorted(all_)
    where = [each in {*held_out} for each in all_]
    assert sum(now and not after for now, after in zip(where, [*where[1:], False], strict=True)) == 20
    assert where[-1]
    assert not where[0]


def test_of_text_that_is_shared_out_by_a_column_it_is_the_end_of_each_value(
    write_hub: Callable[..., Path],
) -> None:
    from datasets import Value

    who = [letter for letter in "uvwx" for _ in range(50)]
    text = [f"{letter} {number} and more" for number, letter in enumerate(who)]
    folder = write_hub({"text": Value("string"), "who": Value("string")}, train={"text": text, "who": who})
    by = {"source": str(folder), "partition": "column", "partition_column": "who", "participants": 4}
    plain, chosen = of_text(0.25, **by)
    cuts = [len(each) - round(0.25 * len(each)) for each in plain.participants]
    each_value = list(zip(plain.participants, cuts, strict=True))
    assert [blocks(each) for each in chosen.participants] == [blocks(all_)[:cut] for all_, cut in each_value]
    assert blocks(chosen.test) == [block for all_, cut in each_value for block in blocks(all_)[cut:]]
    few = of_text(0.25, **by, max_test=7)[1]
    assert blocks(few.test) == blocks(chosen.test)[:7]


def test_max_test_bounds_it_too() -> None:
    data = load_data(DataSpec(participants=2, validation_share=0.5, max_test=7))
    assert len(data.test) == 7


def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, *lines: str) -> str:
    """The source for a function with these lines, in a module of this name that can be imported."""
    head = ["import torch", "from msfusion.batch import Batch", "def given():"]
    (tmp_path / f"{name}.py").write_text("\n".join([*head, *(f"    {line}" for line in lines)]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:given"


def in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, targets: str, **more: object) -> FederatedData:
    """Forty examples 0 ... 39 that no partition shuffles, a quarter of them to be tested on."""
    name = f"in_order_{targets.partition('.')[0]}"
    pair = f"return Batch((x,), {targets}), Batch((x,), {targets})"
    source = written(monkeypatch, tmp_path, name, "x = torch.arange(40.0).reshape(40, 1)", pair)
    spec = {"participants": 2, "partition": "contiguous", "validation_share": 0.25, **more}
    return load_data(DataSpec(source, **spec))  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", ["torch.arange(40) // 20", "x.flatten()", "x.reshape(40, 1, 1)"])
def test_examples_in_order_stay_so_and_any_are_tested_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str
) -> None:
    data = in_order(monkeypatch, tmp_path, targets)
    kept = [row for batch in data.participants for row in batch.inputs[0].flatten().tolist()]
    held_out = data.test.inputs[0].flatten().tolist()
    assert kept == sorted(kept)
    assert held_out == sorted(held_out)
    assert sorted(kept + held_out) == [float(number) for number in range(40)]
    assert min(held_out) < 20 <= max(held_out)


def test_max_test_leaves_any_of_them_whatever_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = in_order(monkeypatch, tmp_path, "torch.arange(40) // 20", max_test=6)
    assert data.test.targets.bincount().tolist() != [6]


def test_the_data_says_on_what_it_is_tested() -> None:
    all_, chosen = halves()
    said = "; tested on 0.25 of the training examples, not on the test set"
    assert chosen.description == all_.description + said


def test_of_numbers_to_predict_it_is_any_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = "return Batch((x,), 2 * x), Batch((x,), 2 * x)"
    source = written(monkeypatch, tmp_path, "numbers_here", "x = torch.arange(40.0).reshape(40, 1)", pair)
    spec = DataSpec(source, task="regression", participants=2, validation_share=0.2)
    data = load_data(spec)
    assert rows([*data.participants, data.test]) == [(float(number),) for number in range(40)]
    assert len(data.test) == 8
    assert rows([data.test]) != [(float(number),) for number in range(32, 40)]  # drawn with the seed


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(DataError, match=r"data\.validation_share = .* of 20 training examples leaves none"):
        load_data(DataSpec(participants=1, max_train=20, validation_share=share))


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_share"):
        DataSpec(validation_share=share)


def test_a_source_that_shares_out_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = "each = Batch((torch.ones(4, 2),), torch.arange(4) % 2)"
    source = written(monkeypatch, tmp_path, "shared_out_here", each, "return [each, each], each")
    with pytest.raises(DataError, match="gives each participant its examples"):
        load_data(DataSpec(source, participants=2, validation_share=0.5))
