"""What a rank of a run without a server holds and waits for, against a run in one process.

    python benchmarks/sharded.py                     four ranks over gloo, 10.6 million parameters, four participants
    python benchmarks/sharded.py --ranks 2 --start blocks

Prints JSON. *Held*: the most bytes that all tensors of a process take up at one moment of its rounds, evaluations
included, from when its part of the state is there (building and tracing the model need the whole once). The data is
left out. Counted is every tensor that an operator makes, for as long as its memory lives: the state, sums, slices and
updates that were received, layers that an evaluation reads, and what training takes (a window's gradients and Adam's
state).
*Window* is what training a window takes in a run in one process, from its slice to its update. A rank should hold no
more than a window and its share of the rest:

    bound  =  window  +  1.1 * (held by one process - window) / ranks

*Seconds beyond training*: of a round, without the training of its slowest participant; evaluations are another figure.
*Processor seconds* are what a rank itself computes, sends and receives meanwhile: where ranks share cores, or others
use them, the clock says more about those.
Both runs end with the same bits, or this fails.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import msfusion
from msfusion.batch import Batch
from msfusion.digests import digest_of_tensors
from msfusion.engines.sharded import engine as engine_module
from msfusion.engines.sharded.engine import Sharded
from msfusion.engines.sharded.on_shard import OnShard
from msfusion.engines.sharded.parcels import collected
from msfusion.engines.sharded.ranks import Torchrun
from msfusion.federated import engine as in_process
from msfusion.federated.capacities import Capacities
from msfusion.federated.engine import Engine, InProcess
from msfusion.federated.method import Method
from msfusion.federated.participation import RoundSettings
from msfusion.federated.problem import Problem
from msfusion.federated.rounds import run_rounds
from msfusion.federated.sharding import Shard, hollow
from msfusion.federated.training import TrainingSettings
from msfusion.scoring import Scoring

INPUTS, FEATURES, LAYERS, CLASSES = 64, 1024, 10, 10


class Counted(TorchDispatchMode):
    """The bytes of all tensors that operators have made and that are still alive, and the most that there were."""

    def __init__(self, there: Sequence[Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.most = 0
        for tensor in there:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in pytree.tree_leaves(made):
            if isinstance(each, Tensor):
                self._add(each)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self.now += storage.nbytes() - (0 if known is None else known[1])
        self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.now > self.most:
            self.settle()
            self.most = max(self.most, self.now)

    def settle(self) -> int:
        """Forget what is gone."""
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        self.now = sum(size for _, size in self._alive.values())
        return self.now


class Network(nn.Module):
    """A plain one, of layers that are all alike."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [INPUTS, *[FEATURES] * (LAYERS + 1)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def data_of(count: int, seed: int) -> Batch:
    inputs = torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(seed))
    return Batch((inputs,), inputs[:, :CLASSES].argmax(1))


def problem_of(people: int, rounds: int) -> Problem:
    torch.manual_seed(0)
    training = TrainingSettings("adamw", 0.001, batch_size=8, rounds=rounds)
    example = data_of(2, 0)
    return Problem(
        Network(), example, Capacities((0.25,) * people), (training,) * people, (8,) * people, rounds,
        scoring=Scoring(batch_size=64),
    )  # fmt: skip


class Timed:
    """`perform`, with the seconds that it takes, and the most bytes at a time beyond those that were there."""

    def __init__(self, counted: Counted) -> None:
        self._perform, self._counted = in_process.perform, counted
        self.seconds, self.work, self.window = 0.0, 0.0, 0

    def __call__(self, *arguments: Any) -> Any:
        """As `perform`."""
        before, most = self._counted.settle(), self._counted.most
        self._counted.most = before
        begin, work = time.perf_counter(), time.process_time()
        answer = self._perform(*arguments)
        self.seconds += time.perf_counter() - begin
        self.work += time.process_time() - work
        self.window = max(self.window, self._counted.most - before)
        self._counted.most = max(most, self._counted.most)
        return answer


@contextmanager
def timed(counted: Counted) -> Iterator[Timed]:
    """Both engines with a `Timed`."""
    made = Timed(counted)
    for module in (in_process, engine_module):
        module.perform = made  # type: ignore[attr-defined]
    yield made


def measured(
    method: Method,
    engine: Engine,
    state: dict[str, Tensor],
    options: argparse.Namespace,
    count: bool,
    template: Sequence[Tensor] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All rounds, evaluated in the last: with `count` the bytes, else the seconds. `template` are tensors held."""
    people, rounds = options.people, options.rounds
    data, test = [data_of(8, each) for each in range(people)], data_of(128, 99)
    gc.collect()
    gc.freeze()  # Python would look through all of PyTorch for garbage now and then
    counted = Counted([*state.values(), *template])
    beyond, seconds, work = list[float](), list[float](), list[float]()
    with timed(counted) as training:
        if count:
            counted.__enter__()
        settings = RoundSettings(rounds, evaluate_every=rounds)
        results = run_rounds(method, data, settings, state=state, engine=engine, test=test)
        del state
        begin = time.process_time()
        for result in results:
            seconds.append(result.seconds)
            beyond.append(result.seconds - training.seconds)
            work.append(time.process_time() - begin - training.work)
            training.seconds = training.work = 0.0
            final = result.state
            evaluation = result.evaluation
            del result
            begin = time.process_time()
        if count:
            counted.__exit__(None, None, None)
    return {
        "held": counted.most,
        "training": training.window,
        "round": seconds,
        "beyond": beyond,
        "work": work,
        "loss": evaluation and evaluation.loss,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }, final


def alone(options: argparse.Namespace, count: bool, answers: Any) -> None:
    """The run in one process."""
    torch.set_num_threads(1)
    problem = problem_of(options.people, options.rounds)
    method, whole = made(options, problem), [*problem.model.parameters()]
    found, state = measured(method, InProcess(), method.initial_state(), options, count, whole)
    found["digest"] = digest_of_tensors(state)
    found["state"] = sum(each.nbytes for each in state.values())
    answers.put((0, found))


def made(options: argparse.Namespace, problem: Problem) -> Method:
    return msfusion.MSfusion(start=options.start).chosen(problem).method


def one_rank(rank: int, options: argparse.Namespace, port: int, count: bool, answers: Any) -> None:
    """The run as one of several."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    problem = problem_of(options.people, options.rounds)
    sharding = made(options, problem).sharding()
    shard = Shard(sharding, rank, options.ranks)
    ranks = Torchrun()
    method, engine = OnShard(sharding, shard, ranks), Sharded(ranks, sharding, shard)
    hollow(problem.model)
    del problem, sharding
    state = method.initial_state()
    found, final = measured(method, engine, state, options, count)
    found["digest"] = digest_of_tensors(collected(ranks, shard, final, [*final], everywhere=True))
    found["state"] = sum(each.nbytes for each in final.values())
    answers.put((rank, found))
    ranks.share(b"")
    ranks.close()


def run(options: argparse.Namespace, count: bool, ranks: bool) -> list[dict[str, Any]]:
    """What each process has found."""
    forks = multiprocessing.get_context("fork")
    answers = forks.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        forks.Process(target=one_rank, args=(rank, options, port, count, answers))
        for rank in range(options.ranks)
    ]
    if not ranks:
        processes = [forks.Process(target=alone, args=(options, count, answers))]
    for each in processes:
        each.start()
    found = dict(answers.get(timeout=600) for _ in processes)
    for each in processes:
        each.join()
    return [found[rank] for rank in sorted(found)]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--people", type=int, default=4, help="participants")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start", default="fresh", help="of msfusion: fresh, blocks or copies")
    options = parser.parse_args()
    (whole,), each = run(options, True, False), run(options, True, True)
    (plain,), clocks = run(options, False, False), run(options, False, True)
    if len({found["digest"] for found in (whole, plain, *each, *clocks)}) != 1:
        sys.exit("the models differ")
    window = whole["training"]
    bound = window + 1.1 * (whole["held"] - window) / options.ranks
    held = [found["held"] for found in each]

    def median(name: str, of: Sequence[dict[str, Any]]) -> float:
        """Of all rounds but the first and the last, in which it is evaluated; of the rank that trained longest."""
        rounds = zip(*(found[name][1:-1] for found in of), strict=True)
        return round(statistics.median(min(values) for values in rounds), 4)

    print(
        json.dumps(
            {
                "parameters": sum(each.numel() for each in Network().parameters()),
                "ranks": options.ranks,
                "participants": options.people,
                "start": options.start,
                "state_bytes": {"one_process": whole["state"], "ranks": [found["state"] for found in each]},
                "held_bytes": {
                    "one_process": whole["held"],
                    "ranks": held,
                    "window": window,
                    "bound": round(bound),
                },
                "within_the_bound": max(held) <= bound,
                "largest_rss_bytes": {
                    "one_process": plain["rss"],
                    "ranks": [found["rss"] for found in clocks],
                },
                "seconds_beyond_training": {
                    "one_process": median("beyond", [plain]),
                    "ranks": median("beyond", clocks),
                },
                "processor_seconds_beyond_training": {
                    "one_process": median("work", [plain]),
                    "ranks": [median("work", [found]) for found in clocks],
                },
                "seconds_of_a_round": {
                    "one_process": median("round", [plain]),
                    "ranks": median("round", clocks),
                },
                "seconds_of_the_last_round_with_evaluation": {
                    "one_process": round(plain["round"][-1], 4),
                    "ranks": round(max(found["round"][-1] for found in clocks), 4),
                },
                "loss": [plain["loss"], clocks[0]["loss"]],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
