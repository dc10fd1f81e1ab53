"""Data that is on every machine: handwritten digits and Python's own documentation."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from msfusion.errors import DataError

_DIGITS = Path(__file__).with_name("digits.safetensors")


def read_digits() -> tuple[Float[Tensor, "examples 1 8 8"], Int[Tensor, " examples"]]:
    """1,797 handwritten digits: pixels 0 ... 1 and labels, the same and in the same order as scikit-learn has them.

    By E. Alpaydin and C. Kaynak, CC BY 4.0 (`digits.LICENSE`). Raises DataError where the installation lacks the file.
    """
    try:
        tensors = load_file(_DIGITS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{_DIGITS} is missing or damaged: install msfusion again.") from error
    return tensors["pixels"][:, None] / 16.0, tensors["labels"].long()


def stratified(labels: Int[Tensor, " examples"], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test set: `share` of each label (rounded) at random into the test set."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in np.unique(labels.numpy()).tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = round(share * len(members))
        test.append(members[:held_out])
        train.append(members[held_out:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def read_python_docs() -> dict[str, str]:
    """The language reference that `help()` shows, about 0.4 MB of English by topic, in alphabetical order.

    Paragraphs that a topic repeats from an earlier one are left out (a fifth of the text): held-out text must
    not stand in the training text. It differs a little between versions of Python. Raises DataError where the
    installation lacks it.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise DataError(
            "this installation of Python has no pydoc_data.topics: name a text of your own."
        ) from error
    seen: set[str] = set()
    texts = {}
    for topic in sorted(topics):
        paragraphs = []
        for paragraph in topics[topic].split("\n\n"):
            if paragraph.strip() and paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                paragraphs.append(paragraph)
        if paragraphs:
            texts[topic] = "\n\n".join(paragraphs).strip("\n") + "\n"
    return texts
