"""What one participant of ten costs that sends the opposite of what it learnt, ten times as large, in every round.

The built-in job (digits, ten participants, Dirichlet 0.5), by each way of training and each average, with that
participant honest and not. Its update is below the bound of `method.max_update_norm` (20 times the median), so only the
average can help. Accuracies in percent on the test data, mean and standard deviation over the seeds; `cost` is paired.

    python benchmarks/robust.py --json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from msfusion.batch import Batch
from msfusion.experiment.config import load_config
from msfusion.experiment.environment import environment
from msfusion.experiment.report.spreads import spread
from msfusion.experiment.setup import prepare
from msfusion.federated.method import Task, Update
from msfusion.federated.rounds import run_rounds

WAYS = {
    "small": ["method.name=small"],
    "blocks": ["method.start=blocks", "method.first_block=0.5"],
    "copies": ["method.start=copies"],
}
AVERAGES = ("mean", "trimmed", "median")
LIAR, TIMES = 3, 10.0


class Lying:
    """A method one of whose participants sends what it was sent, less ten times what it would have changed."""

    def __init__(self, method: Any, liar: int = LIAR) -> None:
        self._method, self._liar = method, liar

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def train(self, task: Task, data: Batch) -> Update:
        """As the method does; of the liar turned round."""
        update: Update = self._method.train(task, data)
        if task.participant != self._liar:
            return update
        turned = {
            name: task.tensors[name] - TIMES * (tensor - task.tensors[name])
            if tensor.is_floating_point()
            else tensor
            for name, tensor in update.tensors.items()
        }
        return replace(update, tensors=turned)


def accuracy(way: Sequence[str], average: str, seed: int, rounds: int, lying: bool) -> float:
    """Of the trained model, in percent."""
    config = load_config(None, [*way, f"method.average={average}", f"seed={seed}", f"rounds={rounds}"])
    setup = prepare(config)
    method: Any = Lying(setup.method) if lying else setup.method
    settings = replace(setup.rounds, evaluate_every=rounds)
    *_, last = run_rounds(method, setup.data.participants, settings, test=setup.data.test)
    return 100 * method.evaluate(last.state, setup.data.test).accuracy


def main() -> None:
    """Measure, and print a line a row or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for way in options.ways:
        for average in AVERAGES:
            honest, lying = (
                [accuracy(WAYS[way], average, seed, options.rounds, lies) for seed in range(options.seeds)]
                for lies in (False, True)
            )
            costs = [one - other for one, other in zip(honest, lying, strict=True)]
            rows.append({"way": way, "average": average, "honest": spread(honest), "lying": spread(lying),
                         "cost": spread(costs)})  # fmt: skip
            if not options.json:
                row = rows[-1]
                told = {
                    key: f"{row[key]['mean']:.1f} ± {row[key]['sd'] or 0:.1f}"
                    for key in ("honest", "lying", "cost")
                }
                print(f"{way:8} {average:8} {told}", flush=True)
    if options.json:
        print(json.dumps({"machine": environment(), "rounds": options.rounds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
