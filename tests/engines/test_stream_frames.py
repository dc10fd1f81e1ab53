"""Messages: what is packed comes back, and everything else is refused with one kind of error."""

from __future__ import annotations

import typing
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msfusion.engines.grpc.packing import MOST_ENTRIES, pack, unpack
from msfusion.engines.stream.frames import (
    Again,
    Answer,
    Begin,
    Down,
    Finish,
    Goodbye,
    Hello,
    Layers,
    Over,
    Step,
    Thanks,
    Up,
    Welcome,
)
from msfusion.errors import StreamError

ALL: tuple[Any, ...] = (*typing.get_args(Up), *typing.get_args(Down))
COUNT = st.integers(0, 2**63 - 1)
PIECES = st.lists(st.binary(max_size=30), max_size=4)
SCALAR = st.none() | st.booleans() | COUNT | st.floats(allow_nan=False) | st.text(max_size=20)
FIELDS: dict[Any, Any] = {
    Hello: (COUNT, COUNT, st.binary(), COUNT, st.binary(), st.dictionaries(st.text(max_size=9), SCALAR)),
    Begin: (),
    Again: (COUNT, COUNT),
    Step: (COUNT, COUNT, PIECES, st.binary()),
    Finish: (COUNT, st.binary()),
    Goodbye: (),
    Welcome: (st.booleans(),),
    Layers: (COUNT, st.binary(), COUNT, st.binary()),
    Answer: (COUNT, COUNT, PIECES, st.floats(allow_nan=False, allow_infinity=False)),
    Thanks: (COUNT,),
    Over: (COUNT,),
}
FRAMES = st.one_of(st.tuples(st.just(kind), st.tuples(*fields)) for kind, fields in FIELDS.items())


@given(FRAMES)
def test_what_is_packed_comes_back(made: Any) -> None:
    kind, fields = made
    frame = kind(*fields)
    assert unpack(pack(frame), *ALL) == frame


@given(st.binary(max_size=300))
def test_bytes_from_anywhere_are_refused(data: bytes) -> None:
    with pytest.raises(StreamError):
        unpack(data, *ALL)


@given(FRAMES, st.data())
def test_damage_is_refused_or_another_message(made: Any, data: st.DataObject) -> None:
    kind, fields = made
    packed = bytearray(pack(kind(*fields)))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] = data.draw(st.integers(0, 255))
    kept = data.draw(st.integers(0, len(packed)))
    for damaged in (bytes(packed), bytes(packed[:kept]), bytes(packed) + b"\0"):
        try:
            unpack(damaged, *ALL)
        except StreamError as error:
            assert "\n" not in str(error)  # noqa: PT017


def step(**changes: Any) -> bytes:
    table = {"kind": "Step", "round": 0, "step": 0, "pieces": [b"x"], "targets": b"y", **changes}
    packed: bytes = msgpack.packb({name: value for name, value in table.items() if value != "left out"})
    return packed


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "damaged"),
        (step()[:-1], "damaged"),
        (step() * 2, "damaged"),
        (b"\x91" * 100_000 + b"\x00", "damaged"),  # a list in a list in a list
        (b"\xdd\xff\xff\xff\xff", "damaged"),  # a list of 2^32 - 1
        (b"\xdf\xff\xff\xff\xff", "damaged"),  # a table of 2^32 - 1
        (b"\xc6\xff\xff\xff\xff", "damaged"),  # bytes of 4 GiB
        (b"\xd6\xff\x00\x00\x00\x00", "damaged"),  # a time
        (b"\x81\xa4kind\xa2\xff\xfe", "damaged"),  # text that is not UTF-8
        (b"\x81\x01\x02", "damaged"),  # a key that is a number
        (msgpack.packb([1, 2]), "an unknown one did"),
        (msgpack.packb({"kind": ["Step"]}), "an unknown one did"),
        (msgpack.packb({"kind": "Quit"}), "an unknown one did"),
        (pack(Begin()), "Step should have come, but Begin did"),
        (step(round="left out"), "'round'"),
        (step(round=-1), "'round'"),
        (step(round=True), "'round'"),
        (step(round=1.0), "'round'"),
        (step(round=2**63), "'round'"),
        (step(pieces=b"x"), "'pieces'"),
        (step(pieces=["x"]), "'pieces'"),
        (step(pieces=[b""] * (MOST_ENTRIES + 1)), "damaged"),
        (step(targets=None), "'targets'"),
        (step(more=1), "should not have"),
    ],
)
def test_what_is_not_a_step_is_told(data: bytes, expected: str) -> None:
    with pytest.raises(StreamError, match=expected):
        unpack(data, Step)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1, None])
def test_a_loss_is_a_number(loss: Any) -> None:
    with pytest.raises(StreamError, match="'loss'"):
        unpack(msgpack.packb({"kind": "Answer", "round": 0, "step": 0, "pieces": [], "loss": loss}), Answer)


@pytest.mark.parametrize("agreement", [{"x": [1]}, {"x": {"y": 1}}, {"x": b"1"}, [1], "x"])
def test_an_agreement_is_flat(agreement: Any) -> None:
    hello = {"format": 1, "participant": 0, "session": b"", "examples": 1, "attempt": b""}
    with pytest.raises(StreamError, match="'agreement'"):
        unpack(msgpack.packb({"kind": "Hello", **hello, "agreement": agreement}), Hello)
