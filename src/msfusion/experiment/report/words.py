"""Figures in words: numbers with three digits and a unit, shares, times, means over seeds, how good a model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msfusion.scoring import loss_told, number_told


def count(number: int | float) -> str:
    """A large number with three digits and a unit: 1.23 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def size(bytes_: int | float) -> str:
    """A number of bytes with three digits and a unit: 1.23 MB."""
    text = count(bytes_)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def duration(seconds: float | None) -> str:
    """A time with three digits: 0.25 s, 12.3 s, 4.5 min, 2.31 h; a dash where there is none."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 172_800.0), ("h", 7200.0), ("min", 120.0)):
        if seconds >= length:
            return f"{seconds / {'d': 86_400, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"


def percent(share: int | float | None) -> str:
    """A share of one in per cent; a dash where it has no meaning."""
    return "-" if share is None else f"{share:.1%}"


def span(values: Sequence[int | float], told: Callable[[Any], str] = str, between: str = "-") -> str:
    """The least and the largest of some values, or the one that all are."""
    least, largest = told(min(values)), told(max(values))
    return least if least == largest else f"{least}{between}{largest}"


def mean_and_sd(
    told: Callable[[float], str], sd_told: Callable[[float], str] | None = None
) -> Callable[[Mapping[str, Any]], str]:
    """A function that tells a spread over seeds as `mean ± sd`: the mean alone for one seed, a dash for none.

    `told` makes a number a text, as in `mean_and_sd("{:.1%}".format)`; `sd_told` does so with the standard deviation,
    where the mean has a sign.
    """

    def text(spread: Mapping[str, Any]) -> str:
        if spread["mean"] is None:
            return "-"
        return told(spread["mean"]) + (
            "" if spread["sd"] is None else f" ± {(sd_told or told)(spread['sd'])}"
        )

    return text


def quality(metrics: Mapping[str, Any]) -> str:
    """How good the model is: `accuracy 91.2%, loss 0.3100`, with perplexity first for language models."""
    parts = []
    if "perplexity" in metrics:
        perplexity = metrics["perplexity"]
        parts.append("perplexity " + ("infinite" if perplexity is None else f"{perplexity:.2f}"))
    if metrics.get("accuracy") is not None:
        parts.append(f"accuracy {metrics['accuracy']:.1%}")
    if "loss" in metrics:
        parts.append("loss " + ("infinite" if metrics["loss"] is None else loss_told(metrics["loss"])))
    for name, value in metrics.get("metrics", {}).items():
        parts.append(f"{name} " + ("not finite" if value is None else number_told(value)))
    return ", ".join(parts) or "not evaluated"


def left_out_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Who was left out of a round and why, from its line of metrics: a sentence each."""
    return [
        f"participant {each['participant']} is left out of round {metrics['round']}: {each['reason']}"
        for each in metrics.get("left_out", ())
    ]
