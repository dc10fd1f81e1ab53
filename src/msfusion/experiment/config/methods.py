"""The [method] table of a method that is not of the house: its own settings beside what all methods have."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, get_origin

from pydantic import BeforeValidator, ConfigDict, PydanticUserError, create_model

from msfusion.errors import ConfigError
from msfusion.experiment.config.declared import keys_of
from msfusion.experiment.config.sections import MethodSection
from msfusion.federated.problem import METHODS, Settings
from msfusion.imports import in_one_line, is_reference
from msfusion.methods import HOUSE

if TYPE_CHECKING:
    from msfusion.experiment.config import Config


def schema_for(table: Mapping[str, Any], usual: type[Config]) -> type[Config]:
    """The configuration's schema, with the settings of the method that the table names in its table [method].

    Raises ConfigError where `method.name = "module:Class"` cannot be imported or is no method.
    """
    section = table.get("method")
    name = section.get("name") if isinstance(section, Mapping) else None
    if not isinstance(name, str) or name in HOUSE or not (is_reference(name) or name in METHODS):
        return usual
    return _schema(METHODS[name], name, usual)


def settings_of(settings: type[Settings]) -> tuple[str, ...]:
    """What can be chosen of a method: the fields of its dataclass, none where it is not one."""
    return tuple(_keys_of(settings))


class _OwnSection(MethodSection):
    """Defaults are checked as well: they are the user's."""

    model_config = ConfigDict(validate_default=True)


def _from_toml(kind: Any) -> Any:
    """The type, which takes a list for a tuple: TOML has no tuples."""
    if get_origin(kind) is tuple:
        return Annotated[
            kind, BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
        ]
    return kind


@cache
def _schema(settings: type[Settings], name: str, usual: type[Config]) -> type[Config]:
    try:
        keys = _keys_of(settings)
        shadowed = [key for key in keys if key in MethodSection.model_fields or key == "model_config"]
        if shadowed:
            raise ConfigError(
                f"method.name = '{name}': the field {shadowed[0]!r} of {settings.__name__} is a key of [method] "
                "already: call it otherwise"
            )
        keys = {key: (_from_toml(kind), default) for key, (kind, default) in keys.items()}
        section = create_model(
            f"{settings.__name__}Section", __base__=_OwnSection, **{**keys, "name": (str, name)}
        )
        return create_model(usual.__name__, __base__=usual, method=(section, ...))
    except (PydanticUserError, NameError) as error:
        raise ConfigError(
            f"method.name = '{name}': the fields of {settings.__name__} cannot be keys of [method] "
            f"({in_one_line(error)}): give them types that TOML has"
        ) from error


def _keys_of(settings: type[Any]) -> dict[str, Any]:
    fields = hasattr(settings, "__dataclass_fields__")
    return keys_of(settings, without=("name",)) if fields else {}
