"""What the simulation costs beyond the training itself, and what a second worker saves.

Compares the time of a round of `run_rounds` with a bare loop that does the same work and nothing else: it
cuts the same windows out of the global model (positions known beforehand), trains a hand-written narrow
network in plain PyTorch on the same mini-batches, and averages where windows overlap. Both run in this
process in turns, round by round, so that whatever else the machine does hits both. The ratio of each pair
of rounds is taken, then the median. A sum of blocks is compared with such a loop as well: there another block is
trained in every round, so that every participant runs a finished block over its examples in every round, and remembers
what it says.

    python benchmarks/simulator.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from slices import slices_of
from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.load import load_data
from msfusion.data.spec import DataSpec
from msfusion.engines.machine import on_this_machine
from msfusion.experiment.environment import environment
from msfusion.federated.capacities import Capacities
from msfusion.federated.method import Method
from msfusion.federated.problem import Problem
from msfusion.federated.rounds import RoundSettings, run_rounds
from msfusion.federated.training import TrainingSettings
from msfusion.methods.blocks import BlocksMethod
from msfusion.methods.narrow import NarrowMethod
from msfusion.methods.settings import MSfusion
from msfusion.models.convolutional import ResNet
from msfusion.seeds import seed_of
from msfusion.width.trace import trace

RATIO = 0.25
WIDTHS = (32, 64, 128)
TRAINING = TrainingSettings(optimizer="sgd", learning_rate=0.1, momentum=0.9, batch_size=16)
TARGETS = {1: 1.10, 2: 0.65}
REMEMBERING_TARGET = 1.15

Positions = dict[str, tuple[Tensor, ...]]
MethodBuilder = Callable[[int], NarrowMethod]


def positions_of(method: NarrowMethod, round_index: int, participant: int) -> Positions:
    """For each tensor the index of what a participant holds, to cut it out and to write it back."""
    window = method.window(round_index, participant)
    found: Positions = {}
    for name, shape in method.width_map.shapes.items():
        narrowed = method.width_map.axis_positions(name, window)
        axes = [narrowed.get(axis, torch.arange(length)) for axis, length in enumerate(shape)]
        found[name] = torch.meshgrid(*axes, indexing="ij") if len(axes) > 1 else (axes[0],)
    return found


def bare_rounds(method: NarrowMethod, data: Sequence[Batch], rounds: int) -> Iterator[float]:
    """The seconds of each round of the loop that one would write by hand for this network."""
    state = method.initial_state()
    narrow = ResNet(1, 10, widths=[int(width * RATIO) for width in WIDTHS])
    for round_index in range(rounds):
        held = [positions_of(method, round_index, participant) for participant in range(len(data))]
        begin = time.perf_counter()
        sums = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        counts = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for participant, own in enumerate(data):
            narrow.load_state_dict({name: state[name][index] for name, index in held[participant].items()})
            train_by_hand(narrow, own, seed_of(method.seed, round_index, participant))
            with torch.no_grad():
                for name, tensor in narrow.state_dict().items():
                    sums[name][held[participant][name]] += tensor * len(own)
                    counts[name][held[participant][name]] += len(own)
        state = {
            name: torch.where(counts[name] > 0, sums[name] / counts[name], old) for name, old in state.items()
        }
        yield time.perf_counter() - begin


def bare_blocks(method: BlocksMethod, data: Sequence[Batch], rounds: int) -> Iterator[float]:
    """The same for a sum of blocks: each is trained on what the others leave, which participants remember."""
    narrow = ResNet(1, 10, widths=[int(width * RATIO) for width in WIDTHS])
    blocks = [{name: tensor.clone() for name, tensor in each.items()} for each in method.awake]
    remembered: list[dict[int, Tensor]] = [{} for _ in data]
    for round_index in range(rounds):
        (held,), begin = method.held(0, round_index), time.perf_counter()
        sums = {name: torch.zeros_like(tensor) for name, tensor in blocks[held].items()}
        for participant, own in enumerate(data):
            if round_index:
                (last,) = method.held(0, round_index - 1)
                remembered[participant][last] = said_by_hand(narrow, blocks[last], own)
            others = [said for block, said in remembered[participant].items() if block != held]
            narrow.load_state_dict(blocks[held])
            seed = seed_of(method.small.seed, round_index, participant)
            train_by_hand(narrow, own, seed, sum(others[1:], others[0]) if others else None)
            with torch.no_grad():
                for name, tensor in narrow.state_dict().items():
                    sums[name] += tensor * len(own)
        examples = sum(map(len, data))
        blocks[held] = {name: tensor / examples for name, tensor in sums.items()}
        yield time.perf_counter() - begin


def said_by_hand(model: ResNet, state: dict[str, Tensor], data: Batch) -> Tensor:
    """A finished block's logits for all examples."""
    assert isinstance(data.inputs, tuple)
    model.load_state_dict(state)
    with torch.no_grad():
        return torch.cat([model.eval()(images) for images in data.inputs[0].split(256)])


def train_by_hand(model: ResNet, data: Batch, seed: int, offset: Tensor | None = None) -> None:
    """One epoch of plain PyTorch; `offset` is added to the logits of each example."""
    model.train()
    assert isinstance(data.inputs, tuple)
    images, labels = data.inputs[0], data.targets
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=TRAINING.learning_rate, momentum=TRAINING.momentum)
    for chosen in torch.randperm(len(labels), generator=generator).split(TRAINING.batch_size):
        if len(chosen) == 1 and len(labels) > 1:
            continue
        optimizer.zero_grad()
        logits = model(images[chosen])
        loss = F.cross_entropy(logits if offset is None else logits + offset[chosen], labels[chosen])
        loss.backward()
        optimizer.step()


def our_rounds(method: Method, data: Sequence[Batch], rounds: int, workers: int) -> Iterator[float]:
    """The seconds of each round of `run_rounds`."""
    results = run_rounds(method, data, RoundSettings(rounds=rounds), engine=on_this_machine(workers))
    while True:
        begin = time.perf_counter()
        if next(results, None) is None:
            return
        yield time.perf_counter() - begin


def compare(build: MethodBuilder, participants: int, workers: int, rounds: int) -> dict[str, Any]:
    """Median ratio of our round to the bare one, after two rounds of warming up.

    On a machine that others use as well, `ratio_of_fastest` (our fastest round over the fastest bare one)
    is nearer to the truth.
    """
    data = load_data(DataSpec(source="digits", participants=participants, partition="iid")).participants
    method = build(participants)
    bare = bare_rounds(method, data, rounds + 2)
    pairs = list(zip(bare, our_rounds(method, data, rounds + 2, workers), strict=True))[2:]
    return {"method": "slices", **compared(pairs, participants, workers, TARGETS[workers])}


def compare_blocks(participants: int, rounds: int) -> dict[str, Any]:
    """The same for a sum of four blocks, after each has been trained once; in one process."""
    data = load_data(DataSpec(source="digits", participants=participants, partition="iid")).participants
    method = blocks_of(participants, rounds + 5)
    bare = bare_blocks(method, data, rounds + 5)
    pairs = list(zip(bare, our_rounds(method, data, rounds + 5, 1), strict=True))[5:]
    return {"method": "blocks", **compared(pairs, participants, 1, REMEMBERING_TARGET)}


def blocks_of(participants: int, rounds: int) -> BlocksMethod:
    """A sum of four blocks, of which another is trained in every round."""
    torch.manual_seed(0)
    model = ResNet(1, 10, widths=WIDTHS)
    example = Batch((torch.randn(2, 1, 8, 8),), torch.zeros(2, dtype=torch.long))
    problem = Problem(
        model,
        example,
        Capacities((RATIO,) * participants),
        (TRAINING,) * participants,
        (1,) * participants,
        rounds=rounds,
        known_map=trace(model, example.inputs),
    )
    method = MSfusion(start="blocks", blocks=4, passes=rounds).build(problem)
    assert isinstance(method, BlocksMethod)
    return method


def compared(
    pairs: Sequence[tuple[float, float]], participants: int, workers: int, target: float
) -> dict[str, Any]:
    """Pairs of a bare round's seconds and ours, in figures."""
    ratio = statistics.median(ours / bare for bare, ours in pairs)
    return {
        "participants": participants,
        "workers": workers,
        "bare_seconds": statistics.median(bare for bare, _ in pairs),
        "seconds": statistics.median(ours for _, ours in pairs),
        "ratio": ratio,
        "ratio_of_fastest": min(ours for _, ours in pairs) / min(bare for bare, _ in pairs),
        "target": target,
        "met": ratio <= target,
    }


def ideal_for_two(participants: int, repeats: int = 7) -> float:
    """What two processes could reach on this machine now: the hand-written training, halved, over the whole.

    Nothing is sent or averaged. Two free cores give 0.5; cores that others use, or that share a cache, give
    more.
    """
    data = load_data(DataSpec(source="digits", participants=participants, partition="iid")).participants
    model = ResNet(1, 10, widths=[int(width * RATIO) for width in WIDTHS])
    ratios = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for own in data:
            train_by_hand(model, own, 0)
        middle = time.perf_counter()
        other = os.fork()
        for own in data[::2] if other else data[1::2]:
            train_by_hand(model, own, 0)
        if not other:
            os._exit(0)
        os.waitpid(other, 0)
        ratios.append((time.perf_counter() - middle) / (middle - begin))
    return statistics.median(ratios)


def method_builder() -> MethodBuilder:
    """A method for so many participants, on the built-in network."""
    torch.manual_seed(0)
    model = ResNet(1, 10, widths=WIDTHS)
    example = Batch((torch.randn(2, 1, 8, 8),), torch.zeros(2, dtype=torch.long))
    width_map = trace(model, example.inputs)
    return lambda participants: slices_of(model, width_map, example, participants, RATIO, TRAINING)


def start_up(build: MethodBuilder) -> dict[str, float]:
    """Seconds from the call of `run_rounds` to the first trained participant, and of `import msfusion`."""
    data = load_data(DataSpec(source="digits", participants=10, partition="iid")).participants
    found = {}
    for workers in (1, 2):
        method = build(10)
        arrivals: list[float] = []
        begin = time.perf_counter()
        rounds = run_rounds(
            method,
            data,
            RoundSettings(rounds=1),
            engine=on_this_machine(workers),
            on_participant=lambda _, arrivals=arrivals: arrivals.append(time.perf_counter()),
        )
        list(rounds)
        found[f"first_participant_{workers}_workers"] = arrivals[0] - begin
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import msfusion"], check=True)
    found["import_msfusion"] = time.perf_counter() - begin
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    build = method_builder()
    cases = [compare(build, n, workers, arguments.rounds) for n in (10, 20) for workers in (1, 2)]
    cases += [compare_blocks(n, arguments.rounds) for n in (10, 20)]
    report = {
        "machine": environment(),
        "cases": cases,
        "ideal_ratio_of_two_processes": ideal_for_two(20),
        "start_up_seconds": start_up(build),
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for case in cases:
        median, fastest, target = case["ratio"], case["ratio_of_fastest"], case["target"]
        print(f"{case['method']}, N = {case['participants']}, {case['workers']} workers: ", end="")
        print(f"{median:.3f} (of the fastest rounds {fastest:.3f}; target {target})")
    print(f"two processes without any exchange: {report['ideal_ratio_of_two_processes']:.3f}")
    for name, seconds in report["start_up_seconds"].items():
        print(f"{name}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
