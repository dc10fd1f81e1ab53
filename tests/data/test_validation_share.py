"""`data.validation_share`: settings are chosen on training examples, and the test set is not looked at."""

from __future__ import annotations

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


def test_of_running_text_it_is_the_end(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"w{number} w{number + 1}" for number in range(200)))
    spec = {"source": str(text), "length": 4, "participants": 2, "task": "language_modelling"}
    plain, chosen = load_data(DataSpec(**spec)), load_data(DataSpec(**spec, validation_share=0.3))  # type: ignore[arg-type]
    before = torch.cat([each.inputs[0] for each in plain.participants])
    after = torch.cat([*(each.inputs[0] for each in chosen.participants), chosen.test.inputs[0]])
    assert torch.equal(before, after)
    assert len(chosen.test) == round(0.3 * len(before))


def test_max_test_bounds_it_too() -> None:
    data = load_data(DataSpec(participants=2, validation_share=0.5, max_test=7))
    assert len(data.test) == 7


def test_of_numbers_to_predict_it_is_any_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numbers_here.py").write_text(
        "import torch\nfrom msfusion.batch import Batch\n"
        "def pair():\n"
        "    x = torch.arange(40.0).reshape(40, 1)\n"
        "    return Batch((x,), 2 * x), Batch((x,), 2 * x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = DataSpec("numbers_here:pair", task="regression", participants=2, validation_share=0.2)
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
    (tmp_path / "shared_out_here.py").write_text(
        "import torch\nfrom msfusion.batch import Batch\n"
        "def shared():\n"
        "    each = Batch((torch.ones(4, 2),), torch.arange(4) % 2)\n"
        "    return [each, each], each\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="gives each participant its examples"):
        load_data(DataSpec("shared_out_here:shared", participants=2, validation_share=0.5))
