"""Tokenisers, vocabularies and blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.data.running_text import hold_out
from msfusion.data.text import Encoder, Vocabulary, blocks, characters, encode_texts, padded, spaces, words
from msfusion.errors import ConfigError, DataError


def test_tokenisers_by_example() -> None:
    assert words("Don't stop,\n here") == ["don", "'", "t", "stop", ",", "\n", "here", "\n"]
    assert spaces(" = <unk> @-@ A = \n") == ["=", "<unk>", "@-@", "A", "=", "\n"]
    assert characters("ab") == characters("ab\n") == ["a", "b", "\n"]
    assert words("") == spaces("\n") == characters("") == ["\n"]


def test_a_vocabulary_is_ordered_by_frequency_then_alphabet() -> None:
    vocabulary = Vocabulary.of([["b", "a", "c", "c"], ["<unk>", "<unk>", "<unk>"]], size=6)
    assert vocabulary.tokens == ("<pad>", "<unk>", "<mask>", "c", "a", "b")
    assert vocabulary.encode([["a", "zebra", "<unk>"]]) == [[4, 1, 1]]
    assert Vocabulary.of([["b", "a", "c", "c"]], size=4).tokens[3:] == ("c",)


def test_the_vocabulary_is_that_of_the_training_texts() -> None:
    train, test, encoder = encode_texts("spaces", ["a b a"], ["a new b"], 100)
    assert encoder.size == 6
    assert (train, test) == ([[3, 5, 3, 4]], [[3, 1, 5, 4]])  # "\n" sorts before "b", as frequent


@given(length=st.integers(1, 9), tokens=st.integers(0, 60))
@settings(max_examples=40)
def test_blocks_are_the_text_and_its_next_tokens(length: int, tokens: int) -> None:
    text = torch.arange(tokens)
    if tokens < length + 1:
        with pytest.raises(DataError, match="do not make one example"):
            blocks(text, length)
        return
    batch = blocks(text, length)
    (inputs,) = batch.inputs
    assert torch.equal(inputs.flatten(), text[: inputs.numel()])
    assert torch.equal(batch.targets.flatten(), text[1 : inputs.numel() + 1])
    assert tokens - inputs.numel() <= length


def test_texts_are_filled_up_and_cut_and_never_empty() -> None:
    ids = padded([[5, 6], [5, 6, 7, 8], []], 3, Encoder(9, padding=0, mask=None))
    assert ids.tolist() == [[5, 6, 0], [5, 6, 7], [1, 0, 0]]


@given(
    texts=st.lists(st.text(alphabet="ab\n", max_size=30), min_size=2, max_size=40),
    share=st.sampled_from([0.1, 0.2, 0.5]),
)
@settings(max_examples=60)
def test_held_out_text_is_in_one_part_only_and_nothing_is_lost(texts: list[str], share: float) -> None:
    train, test, kept = hold_out(texts, share)
    assert len(train) == len(kept)
    assert len("".join(train)) + len("".join(test)) == len("".join(texts))
    for beginning, index in zip(train, kept, strict=True):
        assert texts[index].startswith(beginning)


def test_single_lines_are_held_out_whole_in_runs() -> None:
    train, test, kept = hold_out([f"{i}\n" for i in range(1000)], 0.1)
    assert len(test) == 100
    assert [int(text) for text in train] == kept
    assert test[:5] == ["45\n", "46\n", "47\n", "48\n", "49\n"]


def test_a_folder_without_tokenizer_is_refused(tmp_path: object) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        encode_texts(f"transformers:{tmp_path}", ["a"], ["b"], 10)


@pytest.mark.parametrize("tokenizer", ["words", "spaces", "characters"])
def test_a_mark_before_a_text_is_no_part_of_it(tokenizer: str) -> None:
    plain, marked = (encode_texts(tokenizer, [f"{mark}a b a"], [f"{mark}b"], 100) for mark in ("", "\ufeff"))
    assert plain == marked
