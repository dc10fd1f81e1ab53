"""Text as token ids: tokenisers, vocabularies, padded examples and blocks of running text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from msfusion.batch import IGNORED, Batch
from msfusion.data.spec import FOLDER, is_pretrained
from msfusion.errors import ConfigError, DataError
from msfusion.folders import load_tokenizer
from msfusion.imports import in_one_line
from msfusion.memory import machine_memory

PADDING, UNKNOWN, MASK = "<pad>", "<unk>", "<mask>"
END_OF_LINE = "\n"
_MARK = "\ufeff"
"""What some editors put before a text, to say that it is UTF-8; no part of it."""
_WORDS = re.compile(r"\w+|[^\w\s]")


def _lines(text: str) -> list[str]:
    """The lines of a text, of which the last may or may not end with a line feed."""
    return text.removesuffix(END_OF_LINE).split(END_OF_LINE)


def words(text: str) -> list[str]:
    """Words and single punctuation marks in lower case; each line ends with a token of its own."""
    return [token for line in _lines(text) for token in (*_WORDS.findall(line.lower()), END_OF_LINE)]


def spaces(text: str) -> list[str]:
    """What stands between spaces, for tokenised text; each line ends with a token of its own."""
    return [token for line in _lines(text) for token in (*line.split(), END_OF_LINE)]


def characters(text: str) -> list[str]:
    """The characters, one by one."""
    return list(text if text.endswith(END_OF_LINE) else text + END_OF_LINE)


SPLITTERS: dict[str, Callable[[str], list[str]]] = {
    "words": words,
    "spaces": spaces,
    "characters": characters,
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by their id. Id 0 is padding, 1 an unknown token, 2 the mask; then by falling frequency."""

    tokens: tuple[str, ...]

    @classmethod
    def of(cls, documents: Iterable[Sequence[str]], size: int) -> Vocabulary:
        """The most frequent tokens of some documents, at most `size` ids; ties in alphabetical order."""
        counts = Counter(chain.from_iterable(documents))
        for special in (PADDING, UNKNOWN, MASK):
            counts.pop(special, None)
        ranked = sorted(counts, key=lambda token: (-counts[token], token))
        return cls((PADDING, UNKNOWN, MASK, *ranked[: size - 3]))

    def encode(self, documents: Iterable[Sequence[str]]) -> list[list[int]]:
        """The ids of each document's tokens."""
        ids = {token: index for index, token in enumerate(self.tokens)}
        return [[ids.get(token, 1) for token in document] for document in documents]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with its number of ids, and which of them are padding, mask (None if it has none) and unknown.

    `tokens` are all tokens by their id where the vocabulary was made here; a tokenizer from a folder keeps its own.
    """

    size: int
    padding: int | None
    mask: int | None
    tokens: tuple[str, ...] = ()
    unknown: int = 1
    name: str | None = None
    pretrained: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of_vocabulary(cls, name: str, tokens: tuple[str, ...]) -> Encoder:
        """Texts are split as the tokenizer of that name does; the tokens have these ids."""
        return cls(len(tokens), padding=0, mask=2, tokens=tokens, name=name)

    @classmethod
    def of_folder(cls, name: str) -> Encoder:
        """The tokenizer of `transformers:FOLDER`. Raises ConfigError where there is none."""
        tokenizer = pretrained_tokenizer(name)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        candidates = (tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.bos_token_id, 0, 1)
        unknown = next(token for token in candidates if token is not None and token != padding)
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))  # ids may have gaps
        return cls(size, padding, tokenizer.mask_token_id, (), unknown, name, tokenizer)

    def encode(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """The ids of each text. A tokenizer of a folder cuts texts to `longest` tokens itself, so that its end stays.

        Raises ConfigError where such a tokenizer cannot encode them.
        """
        texts = [text.removeprefix(_MARK) for text in texts]
        if self.pretrained is None:
            split = SPLITTERS[self.name or ""]
            return Vocabulary(self.tokens).encode(map(split, texts))
        cut = {} if longest is None else {"truncation": True, "max_length": longest}
        try:
            found = self.pretrained(texts, verbose=False, **cut)["input_ids"] if texts else []
        except Exception as error:  # whatever a tokenizer raises for a length that leaves no room for a token
            raise ConfigError(
                f"data.tokenizer = '{self.name}' cannot encode these texts: {in_one_line(error)}"
            ) from error
        return [list(ids) for ids in found]


def encode_texts(
    tokenizer: str, train: Sequence[str], test: Sequence[str], size: int, longest: int | None = None
) -> tuple[list[list[int]], list[list[int]], Encoder]:
    """The ids of training and test texts, and what is known of the tokenizer.

    Where it has no vocabulary of its own, that of the training texts is made: at most `size` tokens.
    Raises ConfigError when a tokenizer's folder cannot be used.
    """
    if is_pretrained(tokenizer):
        encoder = Encoder.of_folder(tokenizer)
        return encoder.encode(train, longest), encoder.encode(test, longest), encoder
    split = SPLITTERS[tokenizer]
    documents = [split(text.removeprefix(_MARK)) for text in train]  # once: this is what takes the time
    vocabulary = Vocabulary.of(documents, size)
    encoder = Encoder.of_vocabulary(tokenizer, vocabulary.tokens)
    return vocabulary.encode(documents), encoder.encode(test), encoder


def padded(documents: Sequence[Sequence[int]], length: int, encoder: Encoder) -> Int[Tensor, "examples time"]:
    """Each document's first `length` ids, filled up with padding. An empty one becomes an unknown token.

    Raises DataError where this machine cannot hold so many; ConfigError for a tokenizer without a padding token.
    """
    if encoder.padding is None:
        raise ConfigError(
            f"data.tokenizer = '{encoder.name}' has neither a padding nor an end token to fill texts up with: set its "
            "pad_token and save it again."
        )
    if len(documents) * length * 8 > machine_memory():
        raise DataError(
            f"{len(documents)} texts of data.length = {length} tokens each are more than this machine's memory: lower "
            "data.length or data.max_train."
        )
    ids = np.full((len(documents), length), encoder.padding, dtype=np.int64)
    for row, document in enumerate(documents):
        # one token at least: a row of nothing but padding would leave attention nothing to attend to
        kept = list(document[:length]) or [encoder.unknown]
        ids[row, : len(kept)] = kept
    return torch.from_numpy(ids)


def blocks(tokens: Int[Tensor, " tokens"], length: int) -> Batch:
    """Running text cut into examples of `length` tokens; the target of each token is the one that follows it.

    What does not fill an example is left out. Raises DataError when there is not enough for one example.
    """
    if len(tokens) < length + 1:
        raise DataError(
            f"{len(tokens)} tokens of text do not make one example of data.length = {length} tokens."
        )
    rows = tokens.unfold(0, length + 1, length)
    return Batch((rows[:, :-1].contiguous(),), rows[:, 1:].contiguous())


def masked(batch: Batch, share: float, mask: int, generator: torch.Generator) -> Batch:
    """Blocks whose tokens are to be predicted where they are masked (about `share` of them), and only there.

    As in BERT (Devlin et al., arXiv 1810.04805, section 3.1), but every chosen token is replaced by the mask,
    and the choice is made once. Each example has at least one.
    """
    assert isinstance(batch.inputs, tuple)
    (tokens,) = batch.inputs
    chosen = torch.rand(tokens.shape, generator=generator) < share
    chosen[torch.arange(len(tokens)), torch.randint(tokens.shape[1], (len(tokens),), generator=generator)] = (
        True
    )
    return Batch((tokens.masked_fill(chosen, mask),), tokens.masked_fill(~chosen, IGNORED))


def pretrained_tokenizer(tokenizer: str) -> Any:
    """The tokenizer of `transformers:FOLDER`. Raises ConfigError where there is none."""
    return load_tokenizer(tokenizer.removeprefix(FOLDER))
