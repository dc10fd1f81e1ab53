"""Tensor to bytes and back, exactly as many bytes as needed: what travels in split learning.

    from msfusion import codecs

    message = codecs.by_name("compact").encode(activations)
    activations = codecs.decode(message)

Messages describe themselves; nothing in them is ever executed, and bytes that are no message raise CodecError
before anything is allocated for what they declare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from msfusion.codecs.codec import Codec, decode_payload
from msfusion.codecs.dead_zone import DeadZone
from msfusion.codecs.header import MAX_ELEMENTS, Buffer, Header, read_header, room_for
from msfusion.codecs.identity import Identity
from msfusion.codecs.mask_encoded import MaskEncoded
from msfusion.codecs.plain import PlainCodec
from msfusion.codecs.quantized import Quantized
from msfusion.codecs.random_top_k import RandomTopK
from msfusion.codecs.scaled import Scaled
from msfusion.codecs.surviving import Surviving
from msfusion.codecs.top_k import TopK
from msfusion.errors import CodecError, ConfigError

__all__ = [
    "CODECS",
    "MAX_ELEMENTS",
    "PROFILES",
    "Codec",
    "CodecError",
    "DeadZone",
    "Header",
    "Identity",
    "MaskEncoded",
    "PlainCodec",
    "Quantized",
    "RandomTopK",
    "Scaled",
    "Surviving",
    "TopK",
    "by_name",
    "by_table",
    "decode",
    "read_header",
    "register",
    "room_for",
]

CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (MaskEncoded, TopK, RandomTopK, Quantized, DeadZone, Identity, Scaled)
}
"""Every codec by its name."""

PROFILES: dict[str, Codec] = {
    "paper": MaskEncoded(ratio=0.99, bits=2, rounding="nearest"),
    "compact": MaskEncoded(ratio=0.99, bits=2, rounding="nearest", entropy="zstd"),
    "accurate": MaskEncoded(ratio=0.995, bits=3, values="float16", entropy="zstd"),
    "dense": DeadZone(step=0.85, dead_zone=0.6),
}
"""Codecs with settings worth a name.

The paper's; the same at half the bytes; half the error for few more; and where no ReLU has made it sparse and positive,
as in a transformer, the error of the paper's at a fifth fewer bytes than `compact`.
"""

FORMER_NAMES: Mapping[str, str] = {"compact": "small"}
"""What profiles were called before, by their names: `small` is also a method."""

FIRST_OF_OTHERS = 128
"""The numbers from here to 255 are for codecs that are not of this house."""

_BY_NUMBER = {codec.number: codec for codec in CODECS.values()}

Made = TypeVar("Made", bound=type[Codec])


def register(codec: Made) -> Made:
    """A decorator: from now on a codec can be named, and its messages are decoded, wherever its module is imported.

    Raises ConfigError where its name or number is taken, or the number is one of this house's.
    """
    known, same = CODECS.get(codec.name), _BY_NUMBER.get(codec.number)
    if not FIRST_OF_OTHERS <= codec.number <= 255:
        raise ConfigError(
            f"the codec '{codec.name}' has number {codec.number}: choose one from {FIRST_OF_OTHERS} to 255."
        )
    for taken in (known, same):
        if taken is not None and taken.__qualname__ != codec.__qualname__:
            raise ConfigError(
                f"the codec '{codec.name}' with number {codec.number} meets '{taken.name}' with number {taken.number}: "
                "choose others."
            )
    CODECS[codec.name] = _BY_NUMBER[codec.number] = codec
    return codec


def by_name(name: str, **settings: Any) -> Codec:
    """The codec of a profile ("paper", "compact", "accurate", "dense"), or one of `CODECS` with settings of its own.

    Raises ConfigError for an unknown name, and for settings that the codec does not have or that are out of range.
    """
    if name in PROFILES and not settings:
        return PROFILES[name]
    if name in PROFILES:
        behind = PROFILES[name].name
        raise ConfigError(f"codec '{name}' is a profile and takes no settings; set those of '{behind}'.")
    for now, before in FORMER_NAMES.items():
        if name == before and name not in CODECS:
            raise ConfigError(f"the codec profile '{before}' is called '{now}' now, with the same settings.")
    if name not in CODECS:
        raise ConfigError(f"there is no codec '{name}'; there are {', '.join([*PROFILES, *CODECS])}.")
    known = [field.name for field in fields(CODECS[name])]  # type: ignore[arg-type]  # each is a dataclass
    for setting in settings:
        if setting not in known:
            raise ConfigError(
                f"codec '{name}' has no setting '{setting}'; it has {', '.join(known) or 'none'}."
            )
    if "inner" in settings and not isinstance(settings["inner"], Codec):
        settings["inner"] = by_table(settings["inner"])
    return CODECS[name](**settings)


def by_table(given: Any) -> Codec:
    """The codec of a name, or of a table as in a config: { codec = "top_k", ratio = 0.99 }.

    Raises ConfigError as `by_name` does, and for anything else.
    """
    table = dict(given) if isinstance(given, Mapping) else {"codec": given}
    name = table.pop("codec", None)
    if not isinstance(name, str):
        raise ConfigError(
            "it should be a name, or a table that has one, as in { codec = 'top_k', ratio = 0.99 }."
        )
    return by_name(name, **table)


def decode(
    data: Buffer,
    *,
    out: Float[Tensor, "..."] | None = None,
    max_elements: int = MAX_ELEMENTS,
    device: torch.device | str = "cpu",
    reference: bool = False,
) -> Float[Tensor, "..."]:
    """The tensor of a message of any codec, of its dtype and shape, contiguous.

    `out`: a contiguous buffer of just that dtype and shape to decode into, which is faster; after an error its
    contents are undefined. `max_elements`: the most that a message may declare; a few times their size is
    allocated. `device` is where a new tensor goes. `reference` takes the readable path; the result is the same.
    Raises CodecError for everything that is not a whole and sound message, and for one that does not fit `out`.
    """
    header, payload = read_header(data, max_elements=max_elements)
    codec = _BY_NUMBER.get(header.codec)
    if codec is None:
        raise CodecError(f"a message of codec number {header.codec}, which this msfusion does not know.")
    return decode_payload(codec, header, payload, out=out, device=device, reference=reference)
