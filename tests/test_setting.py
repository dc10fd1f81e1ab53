"""Settings are declared once: a dataclass and the table that is made of it refuse the same values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from msfusion.errors import ConfigError, GrowthError
from msfusion.experiment.config.declared import section_of
from msfusion.setting import check, meaning_of, one_of, setting


@dataclass(frozen=True)
class Example:
    share: float = setting(0.5, "of a whole", ge=0, lt=1)
    steps: int | None = setting(None, "at most", gt=0, le=9)
    shape: Literal["round", "square"] | None = setting("round", "of it")
    odd: int = setting(1, "not even", fits=lambda number: number % 2 == 1, wanted="odd")
    colour: str | None = setting(None, "of it", **one_of(("red", "blue")))
    options: dict[str, int] = setting(dict, "whatever")

    def __post_init__(self) -> None:
        check(self)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"share": 1.0}, "share is 1.0: it must be at least 0 and below 1"),
    ({"share": -0.1}, "share is -0.1: it must be at least 0 and below 1"),
    ({"share": float("nan")}, "share is NaN: it must be at least 0 and below 1"),
    ({"steps": 0}, "steps is 0: it must be above 0 and at most 9"),
    ({"steps": 10}, "steps is 10: it must be above 0 and at most 9"),
    ({"shape": "oval"}, 'shape is "oval": it must be one of round, square'),
    ({"odd": 2}, "odd is 2: it must be odd"),
    ({"colour": "green"}, 'colour is "green": it must be one of red, blue'),
]


@pytest.mark.without_type_checks
@pytest.mark.parametrize(("wrong", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_a_program_and_a_table_refuse_the_same(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Example(**wrong)
    assert str(error.value) == sentence
    with pytest.raises(ValidationError):
        section_of(Example)(**wrong)


@given(st.floats(allow_nan=False), st.none() | st.integers(-20, 20), st.integers())
def test_what_a_dataclass_takes_its_table_takes_too(share: float, steps: int | None, odd: int) -> None:
    given = {"share": share, "steps": steps, "odd": odd}
    try:
        made = Example(**given)
    except ConfigError:
        with pytest.raises(ValidationError):
            section_of(Example)(**given)
    else:
        assert section_of(Example)(**given).made(Example) == made


def test_a_table_has_defaults_and_meanings_of_the_dataclass() -> None:
    section = section_of(Example)
    assert section().made(Example) == Example()
    told = {name: field.description for name, field in section.model_fields.items()}
    assert told == {each.name: meaning_of(each) for each in fields(Example)}


def test_another_error_and_a_prefix() -> None:
    example = object.__new__(Example)
    for each in fields(Example):
        object.__setattr__(example, each.name, {} if each.name == "options" else each.default)
    object.__setattr__(example, "share", 2.0)
    with pytest.raises(GrowthError, match="the share is"):
        check(example, GrowthError, prefix="the ")
