"""The table of architectures is only worth what its comparison sees: each kind of difference must be found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msfusion.errors import UntraceableModelError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that compares, from the folder of benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from architectures import comparison

    return comparison


class Net(nn.Module):
    """Two layers with a BatchNorm and, if need be, dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def row_of(comparison: ModuleType, dropout: float = 0.0) -> dict[str, Any]:
    from architectures.entry import Architecture

    inputs = lambda examples, _: (torch.randn(examples, 6),)  # noqa: E731
    return comparison.measure(Architecture("net", "hand-written", "a test", lambda: Net(dropout), inputs))


def test_a_plain_network_is_mapped_and_equal(comparison: ModuleType) -> None:
    row = row_of(comparison, dropout=0.5)
    assert row["verdict"] == "mapped", row["words"]
    assert row["precision"] == "float64"
    assert row["reach"] > 0.9
    assert 0.2 < row["kept"] < 0.4
    assert row["other_sizes"] == "equal"
    assert max(row[what] for what in ("evaluation", "training", "gradients", "state", "shuffled")) < 1e-9
    assert "draws" not in row


def _spoil(comparison: ModuleType, monkeypatch: pytest.MonkeyPatch, spoil: Any) -> dict[str, Any]:
    """The row where each sub-model is spoilt in one way."""
    right = comparison.narrow

    def wrong(*args: Any) -> nn.Module:
        sub = right(*args)
        spoil(sub)
        return sub

    monkeypatch.setattr(comparison, "narrow", wrong)
    return row_of(comparison)


def _weight(sub: nn.Module) -> None:
    with torch.no_grad():
        sub.get_parameter("last.bias")[0] += 1e-3


def _gradient(sub: nn.Module) -> None:
    sub.get_parameter("first.weight").register_hook(lambda gradient: 0.9 * gradient)


def _buffer(sub: nn.Module) -> None:
    sub.register_forward_hook(lambda *_: sub.get_buffer("norm.num_batches_tracked").add_(1) and None)


def _frozen(sub: nn.Module) -> None:
    sub.get_parameter("last.bias").requires_grad_(False)


def _sizes(sub: nn.Module) -> None:
    sub.register_forward_hook(lambda module, args, out: out if len(args[0]) == 2 else out * 2)


def _mode(sub: nn.Module) -> None:
    sub.register_forward_hook(lambda module, args, out: out * 2 if module.training else out)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_weight, "evaluation"),
        (_gradient, "gradients of first.weight"),
        (_buffer, "num_batches_tracked"),
        (_frozen, "requires_grad"),
        (_sizes, "examples"),
        (_mode, "training"),
    ],
)
def test_each_kind_of_difference_is_wrong(
    comparison: ModuleType, monkeypatch: pytest.MonkeyPatch, spoil: Any, word: str
) -> None:
    row = _spoil(comparison, monkeypatch, spoil)
    assert row["verdict"] == "wrong"
    assert word in row["words"]


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (UntraceableModelError("no"), "refused"),
        (RuntimeError("no"), "crashed"),
        (TypeError("no"), "crashed"),
    ],
)
def test_what_trace_raises(
    comparison: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Exception, verdict: str
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(comparison, "trace", fails)
    row = row_of(comparison)
    assert (row["verdict"], row["words"]) == (
        verdict,
        "no" if verdict == "refused" else f"{type(error).__name__}: no",
    )


@pytest.mark.parametrize(("kind", "verdict"), [(TypeError, "mapped"), (IndexError, "crashed")])
def test_a_call_of_another_size_may_be_refused_but_not_crash(
    comparison: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], verdict: str
) -> None:
    def raises(module: nn.Module, args: Any) -> None:
        if len(args[0]) != 2:
            raise kind("batch must be 2")

    row = _spoil(comparison, monkeypatch, lambda sub: sub.register_forward_pre_hook(raises))
    assert row["verdict"] == verdict
    assert row["words"] or "1 examples refused" in row["other_sizes"]


def test_the_page_states_both_shares_and_what_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import importlib.util

    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    from architectures_page import page

    names = {
        "cnn": "mapped",
        "vgg": "mapped",
        "lstm": "refused",
        "annealing": "refused",
        "layer-drop": "mapped",
    }
    rows = [
        {"name": name, "kind": "hand-written", "style": "a | b", "verdict": verdict, "words": f"why {name}"}
        | (
            {"reach": 0.5 if name == "vgg" else 0.9, "whole": {}, "unknown": {}}
            if verdict == "mapped"
            else {}
        )
        for name, verdict in names.items()
    ]
    summary = benchmark.summary(rows)
    assert (
        summary["mapped_with_80_percent_narrowed"],
        summary["can_be_mapped_with_80_percent_narrowed"],
    ) == (2, 1)
    assert (summary["must_be_refused"], summary["refused_on_purpose"]) == (2, 1)
    text = page({"rows": rows, "machine": {}, "summary": summary})
    assert "2 of all 5 (40.0 %)" in text
    assert "1 of the 3 that can be mapped (33.3 %)" in text
    purpose = text.partition("## Refused on purpose (2)")[2].partition("\n## ")[0]
    assert "why annealing" in purpose
    assert "**mapped**" in purpose
    assert "why lstm" in text.partition("## What else is not mapped")[2]


def test_the_catalogue_is_as_large_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from architectures import features, images, images_other, odd, sequences, tables, training, tuning
    from architectures import transformers_senses as senses
    from architectures import transformers_text as text
    from architectures.catalogue import CATALOGUE, MUST_BE_REFUSED

    assert MUST_BE_REFUSED.keys() <= CATALOGUE.keys()
    lists = (text.TEXT, senses.SENSES, images.IMAGES, images_other.OTHER_IMAGES, sequences.SEQUENCES, tables.TABLES,
             features.FEATURES, tuning.TUNING, odd.ODD, training.TRAINING)  # fmt: skip
    assert sum(map(len, lists)) == len(CATALOGUE)  # no name twice
    kinds = Counter(each.kind for each in CATALOGUE.values())
    assert kinds["transformers"] >= 60
    assert kinds["hand-written"] >= 40
    assert kinds["tuning, wrappers and odd training"] >= 20
