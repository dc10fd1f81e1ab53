"""The scripts of examples/ at small size: they run as a stranger would run them, and show what they say."""

from __future__ import annotations

import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizer_folder import save_tokenizer

from msfusion.experiment.config import load_config
from msfusion.experiment.train import train
from msfusion.files import read_tensors

pytestmark = [
    pytest.mark.slow,
    # datasets leaves files of text open until they are collected
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

KINDS = {"praise": ("fine", "lovely", "great"), "blame": ("poor", "dull", "bad")}
OTHERS = ("the", "film", "was", "it", "book")


def script(name: str) -> dict[str, Any]:
    """What a script defines, without running it."""
    return runpy.run_path(str(EXAMPLES / name))


def reviews(folder: Path, count: int = 160) -> str:
    """A table of texts, each with one word that tells its label."""
    draw = random.Random(0)
    rows = ["text,label"]
    for number in range(count):
        label = ("praise", "blame")[number % 2]
        rows.append(" ".join([*draw.choices(OTHERS, k=4), draw.choice(KINDS[label])]) + f",{label}")
    path = folder / "reviews.csv"
    path.write_text("\n".join(rows))
    return str(path)


def test_images_of_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short run trains the small model, and says so; the classes are the names of the folders."""
    pytest.importorskip("datasets", reason="needs datasets")
    accuracy = script("image_folder.py")["main"](rounds=4, count=160)
    assert accuracy["msfusion"] == accuracy["small"] > 0.4  # chance is 0.1
    told = capsys.readouterr().out
    assert "the small model alone" in told
    assert len(list(here.rglob("*.png"))) == 160
    assert told.count("with probability") >= 5
    assert {line.split(": ")[1][0] for line in told.splitlines() if "probability" in line} <= set(
        "0123456789"
    )


@pytest.mark.release
def test_in_a_long_run_the_network_becomes_a_sum(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = script("image_folder.py")["main"](rounds=40, count=160)
    assert "a sum of 2 blocks" in capsys.readouterr().out
    assert min(accuracy.values()) > 0.6


@pytest.mark.release
def test_labelled_text_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    figures = script("own_text.py")["main"](reviews(tmp_path), rounds=10)
    assert figures["always the same label"] == pytest.approx(0.5, abs=0.1)
    assert figures["accuracy"] > 0.8


@pytest.mark.release
def test_running_text_of_ones_own(tmp_path: Path) -> None:
    """Two of seven words are open: a model that has learnt the rest is far below guessing by frequency."""
    pytest.importorskip("transformers", reason="needs transformers")
    draw = random.Random(0)
    lines = [
        f"the {draw.choice(('cat', 'dog'))} sat on the {draw.choice(('mat', 'sofa'))} ." for _ in range(300)
    ]
    (tmp_path / "letters.txt").write_text("\n".join(lines))
    figures = script("own_text.py")["main"](str(tmp_path / "letters.txt"), rounds=8)
    assert 1 < figures["perplexity"] < figures["by frequency alone"] / 1.5


@pytest.mark.release
def test_a_trained_bert_by_slices(tmp_path: Path) -> None:
    """A tiny BERT in a folder; what comes out loads as any BERT, and answers as well as was said."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder, out = tmp_path / "bert", tmp_path / "tuned"
    words = [*OTHERS, *KINDS["praise"], *KINDS["blame"]]
    save_tokenizer(folder, words)
    config = transformers.BertConfig(
        vocab_size=len(words) + 2, hidden_size=48, num_hidden_layers=1, num_attention_heads=6,
        intermediate_size=96, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    texts = reviews(tmp_path, 300)
    accuracy = script("pretrained_bert.py")["main"](str(folder), texts, str(out), rounds=5, rate=1e-2)
    assert len(accuracy) == 5
    assert accuracy[-1] > 0.8
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.hidden_size == 48
    # it began with the folder's weights, and those that no text used stayed as they were
    before = transformers.BertForMaskedLM.from_pretrained(folder).bert.embeddings.position_embeddings.weight
    after = model.bert.embeddings.position_embeddings.weight
    assert not torch.equal(after[:5], before[:5])
    assert (after[40:] - before[40:]).norm() < 0.2 * before[40:].norm()


@pytest.mark.release
def test_hospitals_with_a_slow_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The one with the slow line holds up everybody, or is late, and then its work still arrives."""
    small = ("rounds=9", "training.local_epochs=1", "data.max_train=120", "data.max_test=60", "run.workers=1")
    waited, limited = script("hospitals.py")["main"](small).values()
    (counts, seconds), (counted, shorter) = waited, limited
    assert not counts["late"]
    assert set(counted["late"]) == {5}
    assert 0 < counted["arriving"][5] <= counted["late"][5]
    assert set(counts["absent"]) == set(counted["absent"]) == {3}
    assert shorter < seconds / 2
    told = capsys.readouterr().out
    assert told.count("hospital 0, which holds 100% of the width: always on time") == 2


@pytest.mark.release
def test_split_learning_between_two_terminals(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two real processes end with the model of one, bit for bit; the commands that are told are of these two kinds."""
    pytest.importorskip("grpc", reason="needs grpcio")
    small = ("rounds=1", "data.max_train=64", "data.max_test=32")
    names = script("two_terminals.py")
    summary = names["main"]("run", small)
    assert "participant 0: has taken part in all 1 rounds" in capfd.readouterr().out
    config = load_config(names["CONFIG"], ["participants.count=1", *small])
    assert summary["accuracy"] == train(config, Path("alone"))["accuracy"]
    shared, alone = (read_tensors(Path(each) / "model.safetensors")[0] for each in ("run", "alone"))
    assert shared.keys() == alone.keys()
    assert all(torch.equal(shared[name], alone[name]) for name in shared)
    monkeypatch.setattr(sys, "argv", ["two_terminals.py", "--tell"])
    runpy.run_path(str(EXAMPLES / "two_terminals.py"), run_name="__main__")
    told = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in told[1::2]] == [["msfusion", "serve"], ["msfusion", "join"]]
