"""A pre-trained BERT, fine-tuned by participants who hold slices of it.

    python examples/pretrained_bert.py FOLDER reviews.csv --out tuned

FOLDER is what `save_pretrained` of a model and of its tokenizer wrote, or a copy of the files of a model on the Hub:
config.json, model.safetensors, and those of the tokenizer. The CSV file has columns text and label. Nothing is
downloaded, and no code of the folder is run. It needs `pip install -e '.[data,transformers]'`.

Each participant holds a part of every layer's width, another one in each round, and trains that on its own texts. What
comes out is a BERT as any other, and is saved as one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import msfusion
from msfusion.data import load_data
from msfusion.models import ModelSpec, build_model

PARTICIPANTS, RATIO = 4, 0.67


def main(folder: str, texts: str, out: str, rounds: int = 10, rate: float = 5e-5) -> list[float]:
    """Returns the accuracy on held-out texts after each round."""
    # text is numbered by the folder's tokenizer, as the weights have learnt it
    data = load_data(
        msfusion.DataSpec(texts, participants=PARTICIPANTS, tokenizer=f"transformers:{folder}", length=64)
    )
    # the encoder's weights are the folder's; the head for these labels begins at random
    torch.manual_seed(0)
    model = build_model(ModelSpec(f"transformers:{folder}", weights="pretrained"), data)
    whole = sum(each.numel() for each in model.parameters())

    federation = msfusion.Federation(
        model,
        data,
        # slices of the given weights; by default a short run would train a narrow model that has only a part of them
        method=msfusion.MSfusion(ratio=RATIO, start="fresh"),
        training=msfusion.Training("adamw", learning_rate=rate, batch_size=16),
    )
    accuracy = []
    for done in federation.rounds(rounds):
        accuracy.append(done.evaluation.accuracy)
        held = done.participants[0].bytes_down // 4
        print(f"round {done.number}: accuracy {accuracy[-1]:.1%}; each held {held:,} of {whole:,} numbers")

    federation.model().save_pretrained(out)
    print(
        f"{Path(out) / 'config.json'}: AutoModelForSequenceClassification.from_pretrained({out!r}) loads it"
    )
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune a pre-trained BERT by slices.")
    parser.add_argument("folder", help="the model and its tokenizer")
    parser.add_argument("texts", help="a CSV file with columns text and label")
    parser.add_argument("--out", default="tuned", help="where the result goes")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    main(given.folder, given.texts, given.out, given.rounds)
