"""Hostile messages for every codec: sound ones that are mutated, and random bytes; from a seed, so that it repeats.

Each must decode to a finite tensor of the shape that its header says, or raise CodecError. Anything else is printed
with the bytes that caused it, and the exit code is 1. Also watched: the slowest message and the peak of memory.

    python benchmarks/fuzz_codecs.py --payloads 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from msfusion import codecs
from msfusion.errors import CodecError
from msfusion.experiment.environment import environment

MAX_ELEMENTS = 2**16
SHAPES: list[tuple[int, ...]] = [(), (1,), (0, 3), (7,), (4, 4), (2, 3, 5, 7), (1, 64, 8, 8)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTERESTING = [
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]

FAMILIES: dict[str, list[codecs.Codec]] = {
    "mask_encoded": [
        *(codecs.by_name(profile) for profile in ("paper", "compact", "accurate")),
        codecs.MaskEncoded(ratio=0.5, bits=5, values="bfloat16", rounding="floor"),
        codecs.MaskEncoded(ratio=0.9, bits=8, values="float16", entropy="zstd"),
    ],
    "top_k": [codecs.TopK(ratio=0.9), codecs.TopK(ratio=0.5, values="float16", entropy="zstd")],
    "random_top_k": [codecs.RandomTopK(ratio=0.9), codecs.RandomTopK(ratio=0.5, alpha=0.5, entropy="zstd")],
    "quantized": [codecs.Quantized(bits=bits) for bits in (1, 2, 3, 8)],
    "dead_zone": [codecs.DeadZone(), codecs.DeadZone(step=2.0, dead_zone=1.0)],
    "identity": [codecs.Identity()],
    "scaled": [
        codecs.Scaled(),
        codecs.Scaled(codecs.DeadZone()),
        codecs.Scaled(codecs.Quantized(bits=3)),
        codecs.Scaled(codecs.TopK(ratio=0.5)),
    ],
}


def sound_messages(family: list[codecs.Codec]) -> list[bytes]:
    """One message for each codec, shape and dtype, of signed and unsigned tensors in turns."""
    torch.manual_seed(0)
    messages = []
    for codec in family:
        for shape in SHAPES:
            for dtype in DTYPES:
                tensor = torch.randn(shape).to(dtype)
                messages.append(codec.encode(tensor if len(messages) % 2 else tensor.relu()))
    return messages


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 2, 127, 128, 254, 255))


def lie(data: bytearray, rng: random.Random) -> None:
    """A number of 1 to 8 bytes, somewhere in the header or shortly behind it, becomes an interesting one."""
    length = rng.choice((1, 2, 4, 4, 8))
    start = rng.randrange(4, max(5, min(len(data), 60)))
    number = struct.pack("<Q", rng.choice(INTERESTING))[:length]
    data[start : start + length] = number


def shorten(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def lengthen(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice((1, 1, 2, 8, 100)))


def cut_out(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 9)]


def scramble(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.randrange(1, 33))
    data[start : start + length] = rng.randbytes(length)


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [
    flip_bits,
    flip_bits,
    set_byte,
    lie,
    lie,
    shorten,
    lengthen,
    cut_out,
    scramble,
]


def hostile_message(messages: list[bytes], rng: random.Random) -> bytes:
    """A mutated message, the head of one before the tail of another, or random bytes."""
    kind = rng.random()
    if kind < 0.02:
        return rng.randbytes(rng.randrange(200))
    if kind < 0.04:
        return messages[0][:6] + rng.randbytes(rng.randrange(100))
    message = rng.choice(messages)
    if kind < 0.1:
        other = rng.choice(messages)
        return message[: rng.randrange(len(message))] + other[rng.randrange(len(other)) :]
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if data:
            rng.choice(MUTATIONS)(data, rng)
    return bytes(data)


def outcome(data: bytes) -> str:
    """`decoded`, `refused`, or what is wrong."""
    try:
        tensor = codecs.decode(data, max_elements=MAX_ELEMENTS)
    except CodecError:
        return "refused"
    except Exception as error:  # this is what is searched for
        return f"{type(error).__name__}: {error}"
    header, _ = codecs.read_header(data, max_elements=MAX_ELEMENTS)
    if tuple(tensor.shape) != header.shape or tensor.dtype != header.dtype:
        return "decoded to another shape or dtype"
    if header.codec != codecs.Identity.number and not torch.isfinite(tensor).all():
        return "decoded to values that are not finite"
    return "decoded"


def derivative(family: list[codecs.Codec], data: bytes, decoded: bool) -> str | None:
    """What is wrong with the derivative of a message, where this family has one and a codec of it wrote the message."""
    for codec in family:
        if not isinstance(codec, codecs.Surviving):
            continue
        try:
            places = codec.survivors(data, max_elements=MAX_ELEMENTS)
            gradient = torch.ones(codecs.read_header(data)[0].shape)
            if codec.pull_back(data, gradient).shape != places.shape or not decoded:
                return "a derivative of what does not decode"
        except CodecError:
            continue
        except Exception as error:  # this is what is searched for
            return f"{type(error).__name__} in the derivative: {error}"
    return None


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(family: list[codecs.Codec], payloads: int, seed: int) -> dict[str, Any]:
    """Counts of outcomes; the bytes of the first few that are wrong."""
    messages, rng = sound_messages(family), random.Random(seed)
    counts: Counter[str] = Counter()
    wrong: list[dict[str, str]] = []
    slowest, begin, before = 0.0, time.perf_counter(), peak_megabytes()
    for message in messages:
        assert outcome(message) == "decoded"
    for _ in range(payloads):
        data = hostile_message(messages, rng)
        started = time.perf_counter()
        result = outcome(data)
        result = derivative(family, data, result == "decoded") or result
        slowest = max(slowest, time.perf_counter() - started)
        if result in ("decoded", "refused"):
            counts[result] += 1
            continue
        counts["wrong"] += 1
        if len(wrong) < 5:
            wrong.append({"what": result, "bytes": data.hex()})
    return {
        "payloads": payloads,
        **{name: counts[name] for name in ("refused", "decoded", "wrong")},
        "slowest_ms": 1e3 * slowest,
        "seconds": time.perf_counter() - begin,
        "peak_memory_growth_mb": peak_megabytes() - before,
        "examples": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--payloads", type=int, default=100_000, help="messages per codec")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", choices=list(FAMILIES), action="append", help="only this one (repeatable)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        name: fuzz(FAMILIES[name], arguments.payloads, arguments.seed) for name in arguments.codec or FAMILIES
    }
    print(json.dumps({"machine": environment(), "seed": arguments.seed, "codecs": found}, indent=2))
    sys.exit(any(counts["wrong"] for counts in found.values()))


if __name__ == "__main__":
    main()
