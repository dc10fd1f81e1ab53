"""Tables of a configuration that come from dataclasses, where each setting is declared (`msfusion.setting`)."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from msfusion.setting import allowed_of, meaning_of

Made = TypeVar("Made")

_AS_DECLARED: Mapping[str, Any] = MappingProxyType({})


class Section(BaseModel):
    """A table of the configuration: no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def made(self, specification: type[Made], *, prefix: str = "", **others: Any) -> Made:
        """The dataclass with what this table says of its fields, and others. Raises its error for impossible values."""
        names = [each.name for each in dataclasses.fields(specification)]  # type: ignore[arg-type]  # a dataclass
        own = {name: f"{prefix}{name}" for name in names if f"{prefix}{name}" in type(self).model_fields}
        return specification(**{**{name: getattr(self, key) for name, key in own.items()}, **others})


def section_of(
    specification: type[Any], *, without: Iterable[str] = (), read_as: Mapping[str, Any] = _AS_DECLARED
) -> type[Section]:
    """The section whose keys, types, defaults and ranges are the fields of a dataclass, but for those set elsewhere."""
    fields = keys_of(specification, without=without, read_as=read_as)
    return create_model(f"{specification.__name__}Section", __base__=Section, **fields)


def keys_of(
    specification: type[Any],
    *,
    without: Iterable[str] = (),
    read_as: Mapping[str, Any] = _AS_DECLARED,
    prefix: str = "",
) -> dict[str, Any]:
    """The fields of a dataclass as pydantic takes them: by name a type and a default.

    `read_as` has the types of fields that a file spells in another way than a program.
    """
    types = {**typing.get_type_hints(specification), **read_as}
    return {
        f"{prefix}{each.name}": (_fitting(types[each.name], each), _as_key(each))
        for each in dataclasses.fields(specification)
        if each.init and each.name not in without
    }


def key_of(specification: type[Any], name: str, **otherwise: Any) -> Any:
    """One field of a dataclass as a key of a section, with its default, range and meaning unless they are given."""
    (found,) = [each for each in dataclasses.fields(specification) if each.name == name]
    return _as_key(found, **otherwise)


def _as_key(declared: dataclasses.Field[Any], **otherwise: Any) -> Any:
    said: dict[str, Any] = {"description": meaning_of(declared), **allowed_of(declared).limits}
    if declared.default_factory is not dataclasses.MISSING:
        said["default_factory"] = declared.default_factory
    elif declared.default is not dataclasses.MISSING:
        said["default"] = declared.default
    if "default" in otherwise:
        said.pop("default_factory", None)
    return Field(**{**said, **otherwise})


def _fitting(kind: Any, declared: dataclasses.Field[Any]) -> Any:
    """The type, whose values are checked where limits do not say which may be."""
    allowed = allowed_of(declared)
    if allowed.fits is None:
        return kind

    def checked(value: Any) -> Any:
        wanted = allowed.refusal(value)
        if wanted is not None:
            raise ValueError(f"should be {wanted}")
        return value

    return Annotated[kind, AfterValidator(checked)]
