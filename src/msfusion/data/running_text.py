"""Running text for language modelling: documents, one after the other, cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from numpy import ndarray

from msfusion.batch import Batch, joined
from msfusion.data.inputs import RunningTextEncoding
from msfusion.data.loaded import Loaded
from msfusion.data.preprocessing import Preprocessing
from msfusion.data.spec import DataSpec
from msfusion.data.text import SPLITTERS, Encoder, blocks, encode_texts, masked
from msfusion.errors import ConfigError, DataError


def load_running_text(
    train: Sequence[str],
    test: Sequence[str] | None,
    keys: Shaped[ndarray, " documents"] | None,
    spec: DataSpec,
    column: str = "text",
) -> Loaded:
    """Blocks of `spec.length` tokens from documents in order; without a test set, each one's end is held out.

    With `keys` (one value a document), documents of one value follow one another and no block spans two
    values. `max_train` and `max_test` keep the first blocks. The vocabulary is that of the training documents
    that are kept.
    Raises DataError when the text is too short; ConfigError for masking without a mask token.
    """
    train_texts = list(train)
    if test is None:
        train_texts, test_texts, kept = hold_out(train_texts, spec.test_share or 0.1)
        keys = None if keys is None else keys[kept]
    else:
        test_texts = list(test)
    tokenizer = spec.tokenizer or "spaces"
    train_texts = _enough(train_texts, tokenizer, spec.max_train, spec.length)
    test_texts = _enough(test_texts, tokenizer, spec.max_test, spec.length)
    train_ids, test_ids, encoder = encode_texts(tokenizer, train_texts, test_texts, spec.vocabulary_size)
    train_batch, block_keys = _blocks_by_key(
        train_ids, None if keys is None else keys[: len(train_ids)], spec
    )
    train_batch = train_batch.take(slice(spec.max_train))
    test_batch = blocks(torch.tensor(list(chain.from_iterable(test_ids))), spec.length)
    test_batch = test_batch.take(slice(spec.max_test))
    description = _description(test_batch, tokenizer, encoder, spec)
    encoding = RunningTextEncoding(column, encoder, spec.length)
    if spec.mask_share > 0:
        train_batch, test_batch = _masked(train_batch, test_batch, encoder, spec)
    return Loaded(
        train_batch,
        test_batch,
        "language_modelling",
        encoder.size,
        Path(spec.source).name,
        description,
        keys=None if block_keys is None else block_keys[: spec.max_train],
        masked=spec.mask_share > 0,
        preprocessing=Preprocessing("language_modelling", encoding, encoder.size, masked=spec.mask_share > 0),
        **encoding.known,
    )


def hold_out(texts: Sequence[str], share: float) -> tuple[list[str], list[str], list[int]]:
    """Training texts, test texts (about `share` of all), and which of the texts the training ones come from.

    Of texts of many lines it is the end of each, cut between lines; of single lines, runs of whole ones,
    evenly
    spread: neighbours belong together, so both parts must be stretches.
    """
    if all("\n" not in text.rstrip("\n") for text in texts):
        period = max(2, round(1 / share))
        run = max(1, len(texts) // (20 * period))
        kept = [index for index in range(len(texts)) if index // run % period != period - 1]
        held_out = sorted(set(range(len(texts))) - set(kept))
        return [texts[index] for index in kept], [texts[index] for index in held_out], kept
    cuts = [text.rfind("\n", 0, int(len(text) * (1 - share))) + 1 or len(text) for text in texts]
    beginnings = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    ends = [text[cut:] for text, cut in zip(texts, cuts, strict=True) if text[cut:]]
    return beginnings, ends, list(range(len(texts)))


def _enough(texts: list[str], tokenizer: str, examples: int | None, length: int) -> list[str]:
    """The first texts, as many as it takes for so many examples, so that nothing else need be tokenised."""
    if examples is None or tokenizer not in SPLITTERS:
        return texts
    wanted = examples * length + 1
    for index, text in enumerate(texts):
        wanted -= len(SPLITTERS[tokenizer](text))
        if wanted <= 0:
            return texts[: index + 1]
    return texts


def _blocks_by_key(
    documents: list[list[int]], keys: ndarray | None, spec: DataSpec
) -> tuple[Batch, Shaped[ndarray, " blocks"] | None]:
    """Blocks of all documents in one run, or of the documents of each key (too short ones are left out)."""
    if keys is None:
        return blocks(torch.tensor(list(chain.from_iterable(documents))), spec.length), None
    batches, block_keys = [], []
    for key in np.unique(keys):
        mine = torch.tensor([token for index in np.flatnonzero(keys == key) for token in documents[index]])
        if len(mine) > spec.length:
            batches.append(blocks(mine, spec.length))
            block_keys += [key] * len(batches[-1])
    whole = joined(batches)
    if whole is None:
        raise DataError(f"no value of the partition column has data.length = {spec.length} tokens of text.")
    return whole, np.array(block_keys)


def _masked(train: Batch, test: Batch, encoder: Encoder, spec: DataSpec) -> tuple[Batch, Batch]:
    if encoder.mask is None:
        raise ConfigError(f"data.mask_share needs a mask token, which {spec.tokenizer} does not have.")
    generator = torch.Generator().manual_seed(spec.seed)
    share, mask = spec.mask_share, encoder.mask
    return masked(train, share, mask, generator), masked(test, share, mask, generator)


def _description(test: Batch, tokenizer: str, encoder: Encoder, spec: DataSpec) -> str:
    """What the figures of this data refer to: perplexities compare only under one vocabulary."""
    text = f"{spec.source}: language modelling ({tokenizer}, vocabulary {encoder.size}, length {spec.length})"
    if tokenizer in SPLITTERS:
        text += f", {float((test.targets == 1).double().mean()):.1%} of the test tokens unknown"
    return text
