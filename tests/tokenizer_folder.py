"""A small tokenizer in a folder, as transformers writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WORDS = ("the", "statement")


def save_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    """One that knows these words; `<unk>` is token 0 and `<pad>` token 1."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(("<unk>", "<pad>", *words))}
    plain = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(folder)
