"""Words of others in sentences of ours: names, values and errors are text, never markup, and not long.

Whatever comes from a configuration, a model, a file or another machine may hold anything: characters that move the
cursor of a terminal, brackets that a table would take for colours, a megabyte of digits. How it is shown is decided
here.
"""

from __future__ import annotations

import json

MOST_OF_A_VALUE = 100
MOST_OF_A_WORD = 400
MOST_OF_A_SENTENCE = 2000


def plain(text: str) -> str:
    r"""The text with each character that does not print as its escape: `\x1b` for that which commands a terminal.

    Line feeds stay.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )


def short(text: object, most: int = MOST_OF_A_VALUE) -> str:
    """The beginning of a text (with escapes as in `plain`), and how long it is where that is not all of it."""
    whole = str(text)
    if len(whole) <= most:
        return plain(whole)
    return f"{plain(whole[:most])}... ({len(whole)} characters)"


def quoted(value: object) -> str:
    """A value as a configuration file has it, not longer than `short` makes it."""
    try:
        return short(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return f"a {type(value).__name__} of very many levels"
    except (TypeError, ValueError):  # what JSON does not have; an integer of more digits than Python writes
        pass
    try:
        return short(value)
    except ValueError:
        return f"a {type(value).__name__} of very many digits"


def sentence(text: str) -> str:
    """A sentence as `plain` makes it, of which no word and not the whole is endless: the middle is left out."""
    words = text.split(" ")
    if max(map(len, words)) > MOST_OF_A_WORD:
        text = " ".join(_without_middle(word, MOST_OF_A_WORD) for word in words)
    return plain(_without_middle(text, MOST_OF_A_SENTENCE))


def _without_middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"
