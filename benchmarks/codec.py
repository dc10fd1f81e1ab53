"""Speed, size and error of the codecs on activations of a trained network, on one core.

Speed is measured against memcpy of the tensor and against a plain implementation as the authors of mask-encoded
sparsification describe it (torch.topk, a dense float mask, pickle), in turns; ratios are the medians over the
turns. Times are processor time of the one thread that works, which is the time on the clock of a machine that does
nothing else. Size and error are given at equal bytes: top-k and the dead zone quantiser are tuned until they send
as much as `paper` or `compact`.

    python benchmarks/codec.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from codec_activations import trained_activations
from torch import Tensor

from msfusion import codecs
from msfusion.experiment.environment import environment

DATA = Path(__file__).resolve().parents[2] / "shared/data/cifar10"
CACHE = Path("~/.cache/msfusion").expanduser()
ENCODE_TARGETS = (30.0, 30.0, 25.0)
DECODE_TARGET, MEMCPY_TARGET, COMPACT_TARGET = 7.0, 2.7, 24.0


def plain_encode(tensor: Tensor, ratio: float = 0.99, bits: int = 2) -> bytes:
    """Mask-encoded sparsification as one would write it from the paper's text."""
    flat = tensor.reshape(-1)
    ones = 2**bits - 1
    largest = torch.topk(flat, max(1, int((1 - ratio) * len(flat))))
    mask = torch.round(flat * ones / largest.values.min()).clamp(max=ones - 1)
    mask[largest.indices] = ones
    kept = flat[mask == ones]
    return pickle.dumps((tuple(tensor.shape), kept.numpy(), mask.numpy()), protocol=5)


def plain_decode(data: bytes, bits: int = 2) -> Tensor:
    shape, kept, mask = pickle.loads(data)  # noqa: S301 - what the codecs are compared with, our own bytes
    kept, mask = torch.from_numpy(kept), torch.from_numpy(mask)
    ones = 2**bits - 1
    result = mask * (kept.min() / ones)
    result[mask == ones] = kept
    return result.reshape(shape)


def in_turns(actions: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of processor time of each action in each turn, after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, action in actions.items():
            begin = time.thread_time()
            action()
            if turn:
                taken[name].append(time.thread_time() - begin)
    return taken


def median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def speed(tensor: Tensor, turns: int, target: float) -> dict[str, Any]:
    """`paper` and `compact` against the plain implementation and memcpy."""
    paper, compact = codecs.by_name("paper"), codecs.by_name("compact")
    message, compact_message, plain_message = (
        paper.encode(tensor),
        compact.encode(tensor),
        plain_encode(tensor),
    )
    buffer = torch.empty_like(tensor)
    taken = in_turns(
        {
            "plain_encode": lambda: plain_encode(tensor),
            "encode": lambda: paper.encode(tensor),
            "memcpy": lambda: buffer.copy_(tensor),
            "encode_compact": lambda: compact.encode(tensor),
            "plain_decode": lambda: plain_decode(plain_message),
            "decode_reused": lambda: paper.decode(message, out=buffer),
            "decode_fresh": lambda: paper.decode(message),
            "decode_compact_reused": lambda: compact.decode(compact_message, out=buffer),
        },
        turns,
    )
    found: dict[str, Any] = {
        "milliseconds": {name: 1e3 * statistics.median(times) for name, times in taken.items()},
        "encode_faster": median_ratio(taken["plain_encode"], taken["encode"]),
        "decode_reused_faster": median_ratio(taken["plain_decode"], taken["decode_reused"]),
        "decode_fresh_faster": median_ratio(taken["plain_decode"], taken["decode_fresh"]),
        "encode_memcpys": median_ratio(taken["encode"], taken["memcpy"]),
        "decode_reused_memcpys": median_ratio(taken["decode_reused"], taken["memcpy"]),
        "plain_bytes": len(plain_message),
    }
    found["met"] = {
        f"encode {target:g} times faster": found["encode_faster"] >= target,
        f"decode {DECODE_TARGET:g} times faster": found["decode_reused_faster"] >= DECODE_TARGET,
        f"encode in {MEMCPY_TARGET:g} memcpys": found["encode_memcpys"] <= MEMCPY_TARGET,
    }
    return found


def tuned(
    build: Callable[[float], codecs.Codec], tensor: Tensor, size: int, low: float, high: float
) -> codecs.Codec:
    """The codec whose message is just not larger than `size`; the larger the setting, the smaller the message."""
    for _ in range(14):
        middle = (low + high) / 2
        if len(build(middle).encode(tensor)) > size:
            low = middle
        else:
            high = middle
    return build(high)


def contenders(tensor: Tensor) -> Iterable[tuple[str, codecs.Codec]]:
    """Every codec, tuned to the bytes of `paper` or of `compact` where it can be."""
    sizes = {name: len(codecs.by_name(name).encode(tensor)) for name in ("paper", "compact")}
    yield "identity", codecs.Identity()
    for name in codecs.PROFILES:
        yield name, codecs.by_name(name)
    yield "paper, floor", codecs.MaskEncoded(rounding="floor")
    yield "quantized, 2 bits", codecs.Quantized(bits=2)
    yield "quantized, 1 bit", codecs.Quantized(bits=1)
    for budget, size in sizes.items():
        settings = {} if budget == "paper" else {"entropy": "zstd"}
        for codec in (codecs.TopK, codecs.RandomTopK):
            top_k = tuned(partial(_with_ratio, codec, settings), tensor, size, 0.5, 0.9999)
            yield f"{codec.name} at {budget}'s bytes", top_k
        dead_zone = tuned(lambda step: codecs.DeadZone(step=step), tensor, size, 0.01, 20.0)
        yield f"dead_zone at {budget}'s bytes", dead_zone


def _with_ratio(codec: type[codecs.Codec], settings: dict[str, str], ratio: float) -> codecs.Codec:
    return codecs.by_name(codec.name, ratio=ratio, **settings)


def quality(tensor: Tensor) -> list[dict[str, Any]]:
    """Bytes and relative l2 error of every codec, and the milliseconds it takes."""
    rows = []
    for label, codec in contenders(tensor):
        message = codec.encode(tensor)
        buffer = torch.empty_like(tensor)
        taken = in_turns(
            {"encode": partial(codec.encode, tensor), "decode": partial(codec.decode, message, out=buffer)}, 3
        )
        rows.append(
            {
                "label": label,
                "codec": repr(codec),
                "bytes": len(message),
                "bits_per_element": 8 * len(message) / tensor.numel(),
                "smaller_than_float32": 4 * tensor.numel() / len(message),
                "relative_error": float((buffer - tensor).norm() / tensor.norm()),
                "encode_ms": 1e3 * min(taken["encode"]),
                "decode_ms": 1e3 * min(taken["decode"]),
            }
        )
    return rows


def measure(tensor: Tensor, turns: int, target: float) -> dict[str, Any]:
    found = speed(tensor, turns, target)
    rows = {row["label"]: row for row in quality(tensor)}
    same_error = rows["compact"]["relative_error"] == rows["paper"]["relative_error"]
    enough = rows["compact"]["smaller_than_float32"] >= COMPACT_TARGET
    found["met"][f"compact {COMPACT_TARGET:g} times smaller at paper's error"] = enough and same_error
    return {
        "shape": list(tensor.shape),
        "positive": float((tensor > 0).float().mean()),
        "speed": found,
        "codecs": list(rows.values()),
    }


def show(case: dict[str, Any]) -> None:
    found = case["speed"]
    print(f"\n{'x'.join(map(str, case['shape']))}, {case['positive']:.0%} positive")
    print(f"  encode {found['encode_faster']:.1f} x faster, {found['encode_memcpys']:.2f} memcpys; ", end="")
    print(f"decode {found['decode_reused_faster']:.1f} x faster into a reused buffer, ", end="")
    print(f"{found['decode_fresh_faster']:.1f} x into a fresh one")
    print("  ms:", ", ".join(f"{name} {value:.2f}" for name, value in found["milliseconds"].items()))
    for name, met in found["met"].items():
        print(f"  {'met    ' if met else 'NOT MET'} {name}")
    for row in case["codecs"]:
        print(f"  {row['label']:28} {row['bits_per_element']:6.3f} bits/element ", end="")
        print(f"{row['smaller_than_float32']:6.2f} x smaller, error {row['relative_error']:.4f}, ", end="")
        print(f"encode {row['encode_ms']:.1f} ms, decode {row['decode_ms']:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of CIFAR-10")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the activations are kept")
    parser.add_argument("--turns", type=int, default=9, help="turns that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    activations, accuracy = trained_activations(arguments.data, arguments.cache)
    cases = []
    for tensor, target in zip(activations, ENCODE_TARGETS, strict=True):
        cases.append(measure(tensor, arguments.turns, target))
        print(f"measured {tuple(tensor.shape)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"machine": environment(), "accuracy": accuracy, "cases": cases}, indent=2))
        return
    print(f"network with {accuracy:.1%} test accuracy")
    for case in cases:
        show(case)


if __name__ == "__main__":
    main()
