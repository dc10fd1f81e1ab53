"""What training many small participants at once saves (`run.together`), on this machine's cores and on its GPU.

Runs the same federation twice in one process, in turns, round by round, so that whatever else the machine does
hits both: participants one after the other, and stacked. A case's `speed_up` is the median over its rounds of
the looped round's seconds over the stacked one's; `speed_up_cpu` is the same in seconds of the processor (one
worker on the CPU only), which do not count what other programs take. Rounds are whole: windows, training, fusion;
no evaluation.

`largest_difference` is that of any entry of the fused weights after two rounds, `apart` how many of the entries
differ by more than 1e-5. Rounding may put an activation on the other side of a ReLU's kink, and then a few
entries differ more; `largest_difference_float64`, of the same two rounds in float64, tells that from a mistake.

    python benchmarks/vectorised.py --json > benchmarks/results/vectorised.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from slices import slices_of
from torch.utils import _pytree as pytree

from msfusion.batch import Batch
from msfusion.data.federated import FederatedData, example_inputs
from msfusion.data.load import load_data
from msfusion.data.spec import DataSpec
from msfusion.engines.machine import on_this_machine
from msfusion.experiment.environment import environment
from msfusion.federated.rounds import RoundResult, RoundSettings, run_rounds
from msfusion.federated.training import TrainingSettings
from msfusion.methods.narrow import NarrowMethod
from msfusion.models.build import build_model
from msfusion.models.spec import ModelSpec
from msfusion.width.trace import trace

RATIO = 0.25
EXAMPLES = 12  # of each participant
TRAINING = TrainingSettings(optimizer="sgd", learning_rate=0.05, momentum=0.9, batch_size=4)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnet": ("digits", {}),
    "resnet": ("digits", {}),
    "decoder_lm": ("python-docs", {"features": 64, "heads": 8, "layers": 2}),
}
MOST = 50  # participants that are trained at once

Timed = tuple[RoundResult, float, float]


def federation(
    name: str, participants: int, dtype: torch.dtype = torch.float32
) -> tuple[NarrowMethod, FederatedData]:
    """A method and its data: few examples for everybody."""
    source, options = MODELS[name]
    data = load_data(
        DataSpec(
            source,
            participants=participants,
            partition="iid",
            max_train=EXAMPLES * participants,
            vocabulary_size=512,
            length=32,
        )
    )
    model = build_model(ModelSpec(name, options=options), data)
    model, data = model.to(dtype), in_type(data.for_model(model), dtype)
    width_map = trace(model, example_inputs(data))
    example = data.participants[0].take(slice(0, 2))
    return slices_of(model, width_map, example, participants, RATIO, TRAINING), data


def in_type(data: FederatedData, dtype: torch.dtype) -> FederatedData:
    """The data with images in a type; tokens stay."""

    def changed(own: Batch) -> Batch:
        inputs = pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, own.inputs)
        return Batch(inputs, own.targets)

    return replace(data, participants=tuple(map(changed, data.participants)), test=changed(data.test))


def timed(rounds: Iterator[RoundResult]) -> Iterator[Timed]:
    """Each round with its seconds by the clock and by the processor."""
    while True:
        begin, used = time.perf_counter(), time.process_time()
        result = next(rounds, None)
        if result is None:
            return
        yield result, time.perf_counter() - begin, time.process_time() - used


def differences(left: RoundResult, right: RoundResult) -> torch.Tensor:
    """The differences between all entries of two rounds' fused weights."""
    apart = [(left.state[name] - tensor).abs().flatten() for name, tensor in right.state.items()]
    return torch.cat(apart)


def difference_in_float64(name: str, participants: int, together: int) -> float:
    """The largest difference of the weights after two rounds in float64."""
    method, data = federation(name, participants, torch.float64)
    loop, stack = (
        list(run_rounds(method, data.participants, RoundSettings(rounds=2), together=limit))
        for limit in (1, together)
    )
    return float(differences(loop[1], stack[1]).max())


def compare(name: str, participants: int, device: str, workers: int, rounds: int) -> dict[str, Any]:
    """One case: looped over stacked, after one round of warming up."""
    method, data = federation(name, participants)
    together = min(MOST, math.ceil(participants / workers))
    loop, stack = (
        timed(
            run_rounds(
                method,
                data.participants,
                RoundSettings(rounds=rounds + 1),
                engine=on_this_machine(workers, device=device),
                together=limit,
            )
        )
        for limit in (1, together)
    )
    pairs = list(zip(loop, stack, strict=True))
    warm, apart = pairs[1:], differences(pairs[1][0][0], pairs[1][1][0])
    case = {
        "model": name,
        "participants": participants,
        "examples": len(data.participants[0]),
        "device": device,
        "workers": workers,
        "together": together,
        "looped_seconds": statistics.median(seconds for (_, seconds, _), _ in warm),
        "stacked_seconds": statistics.median(seconds for _, (_, seconds, _) in warm),
        "speed_up": statistics.median(slow / fast for (_, slow, _), (_, fast, _) in warm),
        "largest_difference": float(apart.max()),
        "apart": int((apart > 1e-5).sum()),
        "entries": apart.numel(),
    }
    if device == "cpu" and workers == 1:
        case["looped_cpu_seconds"] = statistics.median(used for (_, _, used), _ in warm)
        case["stacked_cpu_seconds"] = statistics.median(used for _, (_, _, used) in warm)
        case["speed_up_cpu"] = statistics.median(slow / fast for (_, _, slow), (_, _, fast) in warm)
        case["largest_difference_float64"] = difference_in_float64(name, participants, together)
    return case


def shown(case: dict[str, Any]) -> str:
    """A case in a line."""
    by_processor = f" ({case['speed_up_cpu']:.2f} by the processor)" if "speed_up_cpu" in case else ""
    return (
        f"{case['model']}, N = {case['participants']}, {case['device']}, {case['workers']} workers, "
        f"{case['together']} at once: {case['looped_seconds']:.3f} s -> {case['stacked_seconds']:.3f} s, "
        f"{case['speed_up']:.2f} times{by_processor}; largest difference {case['largest_difference']:.1e}, "
        f"{case['apart']} of {case['entries']} entries beyond 1e-5"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed, at least 1")
    parser.add_argument("--participants", type=int, nargs="+", default=[10, 40, 100])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    places = [("cpu", 1), ("cpu", 2), *([("cuda", 1)] if torch.cuda.is_available() else [])]
    cases = []
    machine, load = environment(), os.getloadavg()[0]
    for name in arguments.models:
        for participants in arguments.participants:
            for device, workers in places:
                cases.append(compare(name, participants, device, workers, arguments.rounds))
                if not arguments.json:
                    print(shown(cases[-1]), flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = {
        "machine": machine,
        "gpu": gpu,
        "load_average": [load, os.getloadavg()[0]],  # programs that wanted a core, before and after
        "cases": cases,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
