"""What the contrastive loss costs: a participant's round of local training with it, over one without.

Both train the same sub-model on the same mini-batches, in this process and in turns, so that whatever else the
machine does hits both. The ratio of each pair of rounds is taken, then the median. The participant has a
previous sub-model, so the loss is on; its `every` is the default, and 1 (the paper) for comparison.

    python benchmarks/contrastive_step.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from slices import slices_of
from torch import nn

from msfusion.batch import Batch
from msfusion.experiment.environment import environment
from msfusion.federated.method import Task
from msfusion.federated.training import TrainingSettings
from msfusion.methods.narrow import NarrowMethod
from msfusion.methods.parts.contrastive import ContrastiveSettings
from msfusion.models.convolutional import ConvNet, ResNet
from msfusion.models.transformer import DecoderLM
from msfusion.width.trace import trace

TRAINING = TrainingSettings(optimizer="adamw", learning_rate=0.001, batch_size=32)
WEIGHT = 1.0
TARGET = 1.35


def images(size: int, count: int) -> Batch:
    """Grey images of noise, ten classes."""
    return Batch((torch.randn(count, 1, size, size),), torch.randint(10, (count,)))


def text(vocabulary: int, length: int, count: int) -> Batch:
    """Random tokens, each followed by the next."""
    tokens = torch.randint(vocabulary, (count, length + 1))
    return Batch((tokens[:, :-1],), tokens[:, 1:])


def cases() -> dict[str, tuple[nn.Module, Batch, float]]:
    """By name: a model, a participant's examples, and its width ratio; the models are those of the experiments."""
    torch.manual_seed(0)
    return {
        "convnet": (ConvNet(1, 10, widths=(32, 64, 64)), images(28, 512), 0.25),
        "resnet": (ResNet(1, 10), images(8, 512), 0.25),
        "decoder_lm": (
            DecoderLM(4096, features=128, heads=4, layers=2, block_length=32),
            text(4096, 32, 256),
            0.5,
        ),
    }


def second_round(method: NarrowMethod, data: Batch) -> Task:
    """What participant 0 trains on in its second round: it remembers the first."""
    state = method.initial_state()
    first = method.train(method.assign(state, 0, 0), data)
    return replace(
        method.assign(method.fuse(state, [(method.assign(state, 0, 0), first)]), 1, 0), memory=first.memory
    )


def compare(model: nn.Module, data: Batch, ratio: float, every: int, rounds: int) -> dict[str, Any]:
    """Median ratio of a round with the loss to one without, after two rounds of warming up.

    On a machine that others use as well, `ratio_of_fastest` (the fastest round with the loss over the fastest
    without) is nearer to the truth.
    """
    example = data.take(slice(0, 2))
    width_map = trace(model, example.inputs)
    local_rounds: list[Callable[[], object]] = []
    for weight in (0.0, WEIGHT):
        settings = ContrastiveSettings(weight, every=every)
        method = slices_of(model, width_map, example, 4, ratio, TRAINING, settings)
        task = second_round(method, data)
        local_rounds.append(lambda method=method, task=task: method.train(task, data))
    pairs = []
    for _ in range(rounds + 2):
        seconds = []
        for local_round in local_rounds:
            begin = time.perf_counter()
            local_round()
            seconds.append(time.perf_counter() - begin)
        pairs.append(seconds)
    pairs = pairs[2:]
    return {
        "every": every,
        "plain_seconds": statistics.median(plain for plain, _ in pairs),
        "seconds": statistics.median(contrastive for _, contrastive in pairs),
        "ratio": statistics.median(contrastive / plain for plain, contrastive in pairs),
        "ratio_of_fastest": min(each for _, each in pairs) / min(plain for plain, _ in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of rounds that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    default = ContrastiveSettings().every
    found = []
    for name, (model, data, ratio) in cases().items():
        for every in (default, 2, 1):
            case = {"model": name, **compare(model, data, ratio, every, arguments.rounds)}
            if every == default:
                case |= {"target": TARGET, "met": case["ratio"] <= TARGET}
            found.append(case)
    report = {
        "machine": environment(),
        "cases": found,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for case in found:
        print(f"{case['model']}, every {case['every']}: {case['ratio']:.3f} ", end="")
        print(f"(of the fastest rounds {case['ratio_of_fastest']:.3f})")


if __name__ == "__main__":
    main()
