"""A model of Hugging Face's transformers on your own text. Nothing is downloaded: its weights begin at random.

    python examples/own_text.py letters.txt    # running text: a small GPT-2 learns to go on with it
    python examples/own_text.py reviews.csv    # columns text and label: a small BERT learns to tell the labels
    python examples/own_text.py                # the documentation that comes with Python, as running text

A folder of such files in the Hub's layout does as well. It needs `pip install -e '.[data,transformers]'`, and a minute
or two.
"""

from __future__ import annotations

import math
import sys

import torch

import msfusion
from msfusion.data import load_data, unigram_perplexity
from msfusion.models import ModelSpec, build_model

PARTICIPANTS, RATIO = 4, 0.5

GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4}
BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
"""Fields of GPT2Config and BertConfig. What the data says (vocabulary, length, classes) is filled in."""


def main(source: str = "python-docs", rounds: int = 20, max_train: int | None = 2000) -> dict[str, float]:
    """Returns how good the trained model is on held-out text, and how good one is that has learnt nothing."""
    text = msfusion.DataSpec(source, participants=PARTICIPANTS, length=32, max_train=max_train, max_test=500)
    data = load_data(text)
    print(data.description)
    goes_on = data.task == "language_modelling"
    model = build_model(
        ModelSpec("transformers:gpt2", GPT2) if goes_on else ModelSpec("transformers:bert", BERT), data
    )

    federation = msfusion.Federation(
        model,
        data,
        method=msfusion.MSfusion(ratio=RATIO),
        training=msfusion.Training("adamw", learning_rate=0.003, batch_size=16),
    )
    for done in federation.rounds(rounds):
        print(f"round {done.number}: loss {done.evaluation.loss:.3f} on held-out text")
    print(*federation.remarks)

    end = federation.evaluate()
    if goes_on:
        # of how many tokens a guess would have to be, were all of them equally likely
        figures = {"perplexity": math.exp(end.loss), "by frequency alone": unigram_perplexity(data)}
    else:
        labels = data.test.targets
        most = float((labels == labels.mode()[0]).double().mean())
        figures = {"accuracy": end.accuracy, "always the same label": most}
    print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    return figures


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:2])
