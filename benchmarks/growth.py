"""What growing saves: training FLOPs until a grown model is as good as the same model trained from scratch.

For each seed a small model is trained; then the large one, from scratch for `--steps` steps, and grown by each rule and
trained with the same settings until its test loss is the lowest that scratch had. All of a method's stages are
counted (LiGO's operator steps too); the small model's own training is not, as in the paper, but is given beside it.
Test losses are taken every `--every` steps and are not counted for anyone. They are those of the running average of the
weights, which is also what the small model is: a schedule that could have ended there, so that nobody gains by having
its learning rate lowered.

Finished parts are kept in `--out`, so an interrupted run goes on where it was: the small model and each method.

    python benchmarks/growth.py --task wikitext2 --out DIR --seeds 3      # about 75 minutes on one core; agnews as well
    python benchmarks/growth.py --task wikitext2 --out DIR --quick        # a minute, for a look
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import growth_report
import torch
from growth_report import best
from growth_tasks import DEFAULTS, Job, Size, job
from safetensors.torch import load_file, save_file
from torch import nn

import msfusion
from msfusion.costs import costs_of
from msfusion.experiment.environment import environment
from msfusion.files import write_json
from msfusion.growth import (
    Copy,
    FitSettings,
    GrownModel,
    LiGO,
    Start,
    copying,
    fit_operator,
    plan_growth,
    preserving,
)
from msfusion.objectives import cross_entropy, evaluate

METHODS = ("scratch", "ligo", "ligo-from-copies", "net2net", "stack", "interlace")
"""Rules of growth. No layer can be added to BERT without changing what it computes, as a LayerNorm of a LayerNorm is
another function: there is no "net2net" there, and LiGO from copies starts from stacked ones.
"""
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def trained(
    model: nn.Module, job: Job, seed: int, steps: int, until: float | None = None
) -> list[dict[str, float]]:
    """Train a model in place; its test loss after every so many steps, with the FLOPs until then.

    AdamW; the learning rate rises over 5 % of the steps and stays: such a curve can be left anywhere. The losses are
    those of the running average of the weights, and the model ends with it.
    """
    settings = job.settings
    per_step = step_flops(model, job)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    average = RunningAverage(model)
    curve = [{"step": 0, "flops": 0.0, "loss": evaluate(average.model, job.test).loss}]
    step = 0
    while step < steps and not (until is not None and curve[-1]["loss"] <= until):
        for batch in job.train.shuffled(settings.batch_size, generator):
            model.train()
            optimizer.param_groups[0]["lr"] = settings.learning_rate * min(
                1.0, (step + 1) / (0.05 * settings.steps)
            )
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            average.update(model, step)
            if step % settings.every == 0 or step == steps:
                loss = evaluate(average.model, job.test).loss
                curve.append({"step": step, "flops": float(step * per_step), "loss": loss})
                if until is not None and loss <= until:
                    break
            if step == steps:
                break
    model.load_state_dict(average.model.state_dict())
    return curve


class RunningAverage:
    """A model whose weights are an average over the last hundred steps or so of another's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model as it is after so many steps; the first ones are not averaged over a hundred."""
        share = max(0.01, 9 / (9 + step))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, share)


def step_flops(model: nn.Module, job: Job) -> int:
    """The FLOPs of one training step, the making of the weights included where an operator makes them."""
    batch = job.train.take(slice(job.settings.batch_size))
    return (
        costs_of(model, batch, batch_size=job.settings.batch_size).flops_per_example * job.settings.batch_size
    )


def small_model(job: Job, seed: int, folder: Path) -> tuple[nn.Module, float]:
    """The small model of a seed, trained once, and the FLOPs that took."""
    torch.manual_seed(seed)
    model = job.build(job.small)
    weights, record = folder / "small.safetensors", folder / "small.json"
    if not record.exists():
        curve = trained(model, job, seed, job.settings.small_steps)
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, weights)
        write_json(record, curve)
    model.load_state_dict(load_file(weights))
    return model, json.loads(record.read_text())[-1]["flops"]


def start(method: str, job: Job, seed: int, small: nn.Module) -> tuple[nn.Module, float]:
    """A large model as a method makes it, and the FLOPs that took."""
    torch.manual_seed(1000 + seed)
    target = job.build(job.large)
    if method == "scratch":
        return target, 0.0
    if not method.startswith("ligo"):
        name = {"net2net": "preserve"}.get(method, method)
        return msfusion.grow(small, target, name, example_inputs=job.inputs), 0.0
    settings = job.settings
    plan, *maps = plan_growth(small, target, job.inputs)
    first: Start | Copy = Start(settings.width_start, settings.depth_start)
    if method == "ligo-from-copies":
        can_preserve = settings.task == "wikitext2"
        state = small.state_dict()
        first = preserving(plan, *maps, state) if can_preserve else copying(plan, *maps, state, "stack")
    operator = LiGO(plan, first, tied=not settings.untied, seed=seed)
    fit = FitSettings(
        settings.operator_steps, settings.operator_rate, batch_size=settings.batch_size, seed=seed
    )
    losses = fit_operator(operator, small.state_dict(), target, job.train, fit)
    print(f"  operator: loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
    flops = float(step_flops(GrownModel(operator, small.state_dict(), target), job) * settings.operator_steps)
    return msfusion.grow(small, target, operator), flops


def measured(job: Job, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Every method of one seed, done or read back."""
    folder.mkdir(parents=True, exist_ok=True)
    small, small_flops = small_model(job, seed, folder)
    results: dict[str, dict[str, Any]] = {}
    for method in job.settings.methods:
        record = folder / f"{method}.json"
        if not record.exists():
            print(f"seed {seed}: {method}", flush=True)
            model, before = start(method, job, seed, small)
            until = None if method == "scratch" else best(results["scratch"]["curve"])["loss"]
            curve = trained(model, job, seed, job.settings.steps, until)
            write_json(record, {"start_flops": before, "curve": curve, "small_flops": small_flops})
        results[method] = json.loads(record.read_text())
    return results


def keep_to(described: dict[str, str], path: Path) -> None:
    """Go on in a folder with the settings it was begun with alone: its finished parts are taken as they are."""
    deciding = {name: value for name, value in described.items() if name not in ("seeds", "methods")}
    begun = json.loads(path.read_text()) if path.exists() else deciding
    for name, value in deciding.items():
        if begun.get(name) != value:
            raise SystemExit(
                f"{path.parent} was begun with {name} {begun.get(name)}, not {value}: choose another --out"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, deciding)


def size(text: str) -> Size:
    return Size(*map(int, text.split("x")))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=tuple(DEFAULTS), default="wikitext2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--small", type=size, default=Size(64, 2, 4))
    parser.add_argument("--large", type=size, default=Size(128, 4, 8))
    parser.add_argument("--examples", type=int, default=32000)
    parser.add_argument("--tests", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--small-steps", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--operator-steps", type=int, default=100)
    parser.add_argument("--operator-rate", type=float, default=1e-3)
    parser.add_argument("--width-start", default="copy")
    parser.add_argument("--depth-start", default="stack")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps")
    parser.set_defaults(**DEFAULTS[parser.parse_known_args()[0].task])
    args = parser.parse_args()
    if args.task == "agnews":
        args.methods = [method for method in args.methods if method != "net2net"]
    if args.quick:
        args.small, args.large, args.examples = Size(32, 1, 2), Size(64, 2, 4), 2000
        args.small_steps, args.steps, args.every, args.operator_steps = 200, 200, 20, 30
    if args.methods[0] != "scratch":
        args.methods = ["scratch", *(m for m in args.methods if m != "scratch")]
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    described = {name: str(value) for name, value in vars(args).items() if name not in ("out", "data")}
    keep_to(described, args.out / "settings.json")
    work = job(args)
    runs = [measured(work, seed, args.out / f"seed-{seed}") for seed in range(args.seeds)]
    print(growth_report.markdown(runs))
    table = growth_report.rows(runs)
    report = {"settings": described, "table": table, "runs": runs, "environment": environment()}
    write_json(args.out / "growth.json", report)


if __name__ == "__main__":
    main()
